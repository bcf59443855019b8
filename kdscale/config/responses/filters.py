"""`responses.filters`: which of the teacher's answers the student does not learn from."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from kdscale.config.endpoint import EndpointConfig
from kdscale.config.fields import Length, Section, named_entry


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {pattern!r} ({error})") from error
    return pattern


Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_compiles)]


class FilterConfig(Section):
    """One entry of responses.filters: what all of them have.

    A new filter is a subclass with its settings, a row of FILTERS, and a class in kdscale/responses/ that it names.
    """

    implementation: ClassVar[str]  # "module:class", called with the entry and the stage's tools

    name: str


class LengthConfig(FilterConfig):
    """Answers that are too short, too long, or were cut off at `sampling.max_tokens`."""

    implementation = "kdscale.responses.filters:TooShortOrLong"

    name: Literal["length"] = "length"
    min_chars: Length = 1
    max_chars: Length | None = None
    min_tokens: Length | None = None  # of the teacher's tokenizer
    max_tokens: Length | None = None
    cut_off: bool = True  # drop answers that ended at sampling.max_tokens

    @model_validator(mode="after")
    def _ranges(self) -> LengthConfig:
        for unit, least, most in (
            ("chars", self.min_chars, self.max_chars),
            ("tokens", self.min_tokens, self.max_tokens),
        ):
            if least is not None and most is not None and least > most:
                raise ValueError(f"max_{unit}: expected at least min_{unit} ({least}), got {most}")
        return self


class DuplicatesConfig(FilterConfig):
    """Answers that are equal to an earlier one, or nearly so: MinHash of runs of five words (Broder 1997)."""

    implementation = "kdscale.responses.duplicates:Duplicates"

    name: Literal["duplicates"] = "duplicates"
    within: Literal["all", "prompt"] = "all"  # compared with every earlier answer, or with those to the same prompt
    # answers share so large a part of their word runs, about; null: only equal ones count
    similarity: Annotated[float, Field(ge=0.3, le=1.0)] | None = 0.8


class RefusalsConfig(FilterConfig):
    """Answers whose beginning says that the teacher will not or cannot help, in English, or as `patterns` say."""

    implementation = "kdscale.responses.filters:Refusals"

    name: Literal["refusals"] = "refusals"
    patterns: tuple[Pattern, ...] = Field(strict=False, max_length=1000, default=())  # regular expressions, beside ours
    builtin: bool = True  # our own list too


class VoteConfig(FilterConfig):
    """Answers that disagree with most of the answers to their prompt (self-consistency, arXiv 2203.11171)."""

    implementation = "kdscale.responses.filters:Vote"

    name: Literal["vote"] = "vote"
    # finds what is voted on: its last match in an answer, or the last group of that match
    pattern: Pattern
    min_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # of all answers to the prompt, for the one that wins


class RewardConfig(FilterConfig):
    """Answers that a reward server scores below a threshold."""

    implementation = "kdscale.responses.reward:Reward"

    name: Literal["reward"] = "reward"
    endpoint: EndpointConfig
    # json: POST of {"model", "messages"} to `path`, whose answer has the score in `score_field`;
    # judge: a chat model is asked for a number
    style: Literal["json", "judge"] = "json"
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$", max_length=200)] = "score"  # below base_url
    score_field: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200)] = "score"  # as in data.0.score
    threshold: float

    @model_validator(mode="after")
    def _has_somebody_to_ask(self) -> RewardConfig:
        if missing := self.endpoint.missing():
            raise ValueError(f"endpoint: the filter reward needs {' and '.join(missing)}")
        return self


FILTERS: dict[str, type[FilterConfig]] = {
    "length": LengthConfig,
    "duplicates": DuplicatesConfig,
    "refusals": RefusalsConfig,
    "vote": VoteConfig,
    "reward": RewardConfig,
}


FilterEntry = Annotated[
    SerializeAsAny[FilterConfig],
    BeforeValidator(lambda entry: named_entry(entry, FILTERS, FilterConfig, "a filter")),
]
