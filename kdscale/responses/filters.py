"""Which answers are dropped: by length, as refusals, by vote. Each filter sees what those before it have left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

from kdscale.config.responses.filters import FilterConfig, LengthConfig, RefusalsConfig, VoteConfig
from kdscale.config.responses.settings import ResponsesConfig
from kdscale.responses.chat import Answer
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Reporter

_SEARCHED_CHARS = 400  # of an answer's beginning, for a refusal
_CANNOT = (
    r"\b(?:can(?:no|['’])t|can not|(?:am |['’]m )?(?:unable|not able|not allowed|not going) to|will not|won['’]?t)\b"
)
# The beginnings of answers that help with nothing, in English; our own list.
_REFUSALS = (
    rf"^\W*(?:i['’]?m|i am) (?:very |so |really |truly )?(?:sorry|afraid)\b.{{0,60}}?{_CANNOT}",
    rf"^\W*(?:sorry|my apologies|i apologi[sz]e)\b.{{0,60}}?{_CANNOT}",
    rf"^\W*(?:unfortunately|regrettably)\b.{{0,20}}?\bi {_CANNOT}",
    rf"^\W*i (?:{_CANNOT}|must decline|have to decline|decline to)\W.{{0,40}}?\b(?:help|assist|comply|provide|answer"
    r"|do that|fulfil|create|write|generate|continue|discuss|support|engage)",
    rf"^\W*as an? (?:ai|artificial|(?:large )?language model|assistant)\b.{{0,80}}?(?:{_CANNOT}|do not|don['’]?t)",
    rf"\bi {_CANNOT} (?:help|assist)(?: you)? with (?:that|this)\b",
    r"\b(?:violates?|goes against|contrary to|against) (?:my|our|the) (?:usage |content |safety )?"
    r"(?:polic(?:y|ies)|guidelines)\b",
)


@dataclass
class Group:
    """A prompt and all answers to it."""

    prompt: Prompt
    answers: list[Answer]

    @property
    def kept(self) -> list[Answer]:
        """The answers that no filter has dropped yet."""
        return [answer for answer in self.answers if not answer.dropped_by]


@dataclass(frozen=True)
class Tools:
    """What filters may need beside their settings."""

    settings: ResponsesConfig
    count_tokens: Callable[[str], int]
    journal: Path  # a folder, of a filter that asks somebody
    reporter: Reporter


class Filter(Protocol):
    """One filter; made from its entry in responses.filters and the tools."""

    def __call__(self, groups: Sequence[Group]) -> None:
        """Drop answers of these groups: set `dropped_by`. Called with one part after another of all groups, in order.

        May raise ServiceError where it asks somebody.
        """


def make_filters(entries: Sequence[FilterConfig], tools: Tools) -> list[Filter]:
    """The filters of a config, in its order."""
    return [resolve_name(entry.implementation)(entry, tools) for entry in entries]


class TooShortOrLong:
    """The filter `length`."""

    def __init__(self, settings: LengthConfig, tools: Tools):
        self._settings, self._count_tokens = settings, tools.count_tokens

    def __call__(self, groups: Sequence[Group]) -> None:
        """Drop answers outside the bounds, and those that were cut off."""
        for group in groups:
            for answer in group.kept:
                if (self._settings.cut_off and answer.finish_reason == "length") or not self._fits(answer.text):
                    answer.dropped_by = self._settings.name

    def _fits(self, text: str) -> bool:
        settings = self._settings
        if not settings.min_chars <= len(text.strip()) <= (settings.max_chars or len(text)):
            return False
        if settings.min_tokens is None and settings.max_tokens is None:
            return True
        tokens = self._count_tokens(text)
        return (settings.min_tokens or 0) <= tokens <= (settings.max_tokens or tokens)


class Refusals:
    """The filter `refusals`: what it looks for must be in the first 400 characters."""

    def __init__(self, settings: RefusalsConfig, tools: Tools):
        del tools
        self._name = settings.name
        self._refuses = refusal_test(settings.patterns, settings.builtin)

    def __call__(self, groups: Sequence[Group]) -> None:
        """Drop answers that one of the patterns matches."""
        for group in groups:
            for answer in group.kept:
                if self._refuses(answer.text):
                    answer.dropped_by = self._name


def refusal_test(patterns: Sequence[str] = (), builtin: bool = True) -> Callable[[str], bool]:
    """Whether a text begins as a refusal: by our own list, and by `patterns` beside it."""
    compiled = [
        re.compile(one, re.IGNORECASE | re.DOTALL) for one in (*(_REFUSALS if builtin else ()), *patterns)
    ]  # fmt: skip
    return lambda text: any(pattern.search(text[:_SEARCHED_CHARS]) for pattern in compiled)


class Vote:
    """The filter `vote`: self-consistency (Wang et al. 2022, arXiv 2203.11171, section 2)."""

    def __init__(self, settings: VoteConfig, tools: Tools):
        del tools
        self._settings, self._pattern = settings, re.compile(settings.pattern, re.DOTALL)

    def __call__(self, groups: Sequence[Group]) -> None:
        """Keep the answers with the most frequent value, where it is frequent enough; among equals, the first."""
        for group in groups:
            values = [self._value(answer.text) for answer in group.kept]
            counts = Counter(value for value in values if value is not None)
            winner, votes = counts.most_common(1)[0] if counts else (None, 0)
            wins = votes >= self._settings.min_share * len(values)
            for answer, value in zip(group.kept, values, strict=True):
                if value is None or value != winner or not wins:
                    answer.dropped_by = self._settings.name

    def _value(self, text: str) -> str | None:
        """What an answer votes for: the last match, without the white space around it and its case."""
        found = None
        for found in self._pattern.finditer(text):  # noqa: B007 (the last one counts)
            pass
        if found is None:
            return None
        value = found[found.lastindex] if found.lastindex else found[0]
        return " ".join(value.split()).casefold()
