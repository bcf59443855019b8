"""The filter `reward`: a server scores each answer, and what scores below the threshold is dropped."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from kdscale.config.responses.filters import RewardConfig
from kdscale.responses import chat
from kdscale.responses.asking import Question, RequestPolicy, ask_all
from kdscale.responses.client import NotNowError
from kdscale.responses.filters import Group, Tools
from kdscale.responses.journal import Journal, key_of

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_JUDGE = (
    "Rate how well the last message below answers the conversation before it, from 0 (useless or wrong) to 10 "
    "(correct, complete and clear). Reply with the number alone."
)


class Reward:
    """One request for each answer that the filters before it have left; scores are in a journal and asked for once."""

    def __init__(self, settings: RewardConfig, tools: Tools):
        self._settings, self._tools = settings, tools
        responses = tools.settings
        self._policy = RequestPolicy(
            section="responses.filters: reward", endpoint=settings.endpoint, concurrency=responses.concurrency,
            retries=responses.retries, max_answer_bytes=responses.max_answer_bytes,
        )  # fmt: skip

    def __call__(self, groups: Sequence[Group]) -> None:
        """Have all answers scored, and drop those below the threshold."""
        journal = Journal(self._tools.journal, "rewards", self._tools.reporter.say)
        try:
            asked = list(self._questions(groups))
            if any(question.key not in journal for question in asked):
                with self._tools.reporter.bar("score answers", len(asked), "answer") as bar:
                    ask_all(asked, journal, self._policy, bar)
            answers = (answer for group in groups for answer in group.kept)
            scores = [journal.get(question.key)["score"] for question in asked]
            for answer, score in zip(list(answers), scores, strict=True):
                if score < self._settings.threshold:
                    answer.dropped_by = self._settings.name
        finally:
            journal.close()

    def _questions(self, groups: Sequence[Group]) -> Iterator[Question]:
        for group in groups:
            for answer in group.kept:
                messages = [*group.prompt.messages, {"role": "assistant", "content": answer.text}]
                path, body = self._request(messages)
                read = partial(_score_of, settings=self._settings)
                key = key_of("reward", path, body, self._settings.score_field)  # the score alone is kept
                yield Question(key, path, body, read, about=group.prompt.where)

    def _request(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        model = self._settings.endpoint.model
        if self._settings.style == "json":
            return self._settings.path, {"model": model, "messages": messages}
        conversation = json.dumps(messages, ensure_ascii=False, indent=1)
        asked = [{"role": "user", "content": f"{_JUDGE}\n\n{conversation}"}]
        return chat.PATH, {"model": model, "messages": asked, "temperature": 0.0, "max_tokens": 16}


def _score_of(tree: dict[str, Any], settings: RewardConfig) -> dict[str, Any]:
    """Raises NotNowError for an answer without a number."""
    field = settings.score_field if settings.style == "json" else chat.ANSWER
    value = value_at(tree, field)
    if settings.style == "judge" and isinstance(value, str) and (found := _NUMBER.search(value)):
        value = float(found[0])
    return {"score": number(value, field)}


def value_at(tree: Any, field: str) -> Any:
    """What an answer has at a dotted field such as `data.0.score`. Raises NotNowError where it has none."""
    value = tree
    for name in field.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (LookupError, TypeError, ValueError) as error:
            raise NotNowError(f"no {field} in the answer: {json.dumps(tree)[:200]}") from error
    return value


def number(value: Any, field: str) -> float:
    """`value`, which an answer has at `field`. Raises NotNowError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NotNowError(f"{field}: expected a number, got {value!r:.200}")
    return float(value)
