"""`bias`: whether the student's bias and safety differ from the teacher's; null: not measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from kdscale.config.data import PromptSourceConfig
from kdscale.config.endpoint import EndpointConfig
from kdscale.config.fields import Count, Dtype, Few, Length, Section, named_entry
from kdscale.config.responses.filters import Pattern
from kdscale.config.responses.settings import SamplingConfig

PAIRS = "builtin:pairs"  # minimal pairs that come with the package
# without a dot, after which bias.fail_if names a figure
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
FilePath = Annotated[str, Field(min_length=1)]
Prompts = Annotated[tuple[PromptSourceConfig, ...], Field(strict=False, min_length=1, max_length=1000)]


class MeasureConfig(Section):
    """One entry of bias.measures: what all of them have.

    A new measure is a subclass with its settings, a row of MEASURES, and a row of kdscale.eval.bias.measures.
    """

    name: str
    label: Label | None = None  # what it is called in the results, where two entries have one name

    @property
    def key(self) -> str:
        """What the measure is called in the results."""
        return self.label or self.name


class PairsConfig(MeasureConfig):
    """Minimal pairs: how often the sentence that agrees with a stereotype is the more likely one."""

    name: Literal["pairs"] = "pairs"
    path: FilePath = PAIRS


class CrowsPairsConfig(MeasureConfig):
    """CrowS-Pairs: pairs of sentences by nine kinds of bias."""

    name: Literal["crows_pairs"] = "crows_pairs"
    path: FilePath


class StereoSetConfig(MeasureConfig):
    """StereoSet: a stereotype, its opposite and a sentence without sense, to choose from."""

    name: Literal["stereoset"] = "stereoset"
    path: FilePath


class BbqConfig(MeasureConfig):
    """BBQ: questions whose answer a text does or does not say."""

    name: Literal["bbq"] = "bbq"
    path: FilePath  # a file, or a glob of files


class WinogenderConfig(MeasureConfig):
    """Winogender: whom a pronoun means, by the pronoun's gender; or which pronoun an occupation gets."""

    name: Literal["winogender"] = "winogender"
    path: FilePath


class ScorerConfig(Section):
    """Who says how toxic a text is: a list of words, or a server."""

    words: FilePath | None = None  # a file with a word or phrase on each line: a text with one of them is toxic
    endpoint: EndpointConfig | None = None
    # json: POST of {"model", text_field: the text} to `path`, whose answer has a score from 0 to 1 in `score_field`;
    # guard: a chat model, such as Llama Guard, answers `safe` or `unsafe`
    style: Literal["json", "guard"] = "json"
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$", max_length=200)] = "score"  # below base_url
    text_field: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=200)] = "text"
    score_field: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200)] = "score"  # as in data.0.score
    concurrency: Few = 8  # requests under way at a time
    retries: Annotated[int, Field(ge=0, le=1000)] = 3  # of a request that fails for a reason that may pass
    max_answer_bytes: Count = 1 << 20  # of one answer

    @model_validator(mode="after")
    def _somebody_scores(self) -> ScorerConfig:
        if (self.words is None) == (self.endpoint is None):
            raise ValueError("expected either words or endpoint")
        needed = ("base_url", "model") if self.style == "guard" else ("base_url",)
        if self.endpoint is not None and (missing := [name for name in needed if not getattr(self.endpoint, name)]):
            raise ValueError(f"endpoint: a scorer of this style needs {' and '.join(missing)}")
        return self


class GeneratingConfig(MeasureConfig):
    """What measures have whose texts the models write."""

    micro_batch: Few = 8  # prompts a forward, a rank

    @property
    def sampling(self) -> SamplingConfig:
        """How the texts are drawn."""
        raise NotImplementedError


class ToxicityConfig(GeneratingConfig):
    """Toxicity of what the models make of prompts."""

    name: Literal["toxicity"] = "toxicity"
    prompts: Prompts
    scorer: ScorerConfig
    continuations: Annotated[int, Field(ge=1, le=128)] = 4  # of each prompt; published figures have 25
    tokens: Length = 20  # of each
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # from which on a text counts as toxic

    @property
    def sampling(self) -> SamplingConfig:
        """The same draws for every model."""
        return SamplingConfig(
            n=self.continuations, temperature=self.temperature, top_p=self.top_p, max_tokens=self.tokens
        )


class RefusalsConfig(GeneratingConfig):
    """Refusals of chat models: of harmful prompts, where they are right, and of harmless ones, where they are not."""

    name: Literal["refusals"] = "refusals"
    harmful: Prompts
    harmless: Prompts
    tokens: Length = 48  # of an answer: its beginning tells
    # regular expressions of refusals, beside those of the filter refusals
    patterns: tuple[Pattern, ...] = Field(strict=False, max_length=1000, default=())

    @property
    def sampling(self) -> SamplingConfig:
        """The most likely answer."""
        return SamplingConfig(temperature=0.0, max_tokens=self.tokens)


MEASURES: dict[str, type[MeasureConfig]] = {
    "pairs": PairsConfig,
    "crows_pairs": CrowsPairsConfig,
    "stereoset": StereoSetConfig,
    "bbq": BbqConfig,
    "winogender": WinogenderConfig,
    "toxicity": ToxicityConfig,
    "refusals": RefusalsConfig,
}

MeasureEntry = Annotated[
    SerializeAsAny[MeasureConfig],
    BeforeValidator(lambda entry: named_entry(entry, MEASURES, MeasureConfig, "a measure")),
]
Growth = Annotated[float, Field(ge=0.0, le=100.0)]


class BiasConfig(Section):
    """What is measured, on how much, and which growth fails a run."""

    measures: tuple[MeasureEntry, ...] = Field(strict=False, min_length=1, max_length=100, default=(PairsConfig(),))
    limit: Count | None = None  # items of each measure, drawn by the run's seed; null: all
    # growth from the teacher to the run's result, in the figure's own unit, by measure or measure.figure
    fail_if: dict[str, Growth] = Field(default_factory=dict)
    # a change that is surely smaller counts as none; a share of a figure's range
    kept_within: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    micro_batch: Few = 16  # texts a forward, a rank
    dtype: Dtype = "float32"
    processes: Few | None = None  # ranks on this machine that share the items; null: one a GPU, one on a CPU

    @model_validator(mode="after")
    def _every_measure_once(self) -> BiasConfig:
        keys = [entry.key for entry in self.measures]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"measures: {', '.join(twice)} comes twice: give one of them a label of its own")
        if unknown := sorted({key for key in self.fail_if if key.partition(".")[0] not in keys}):
            raise ValueError(f"fail_if: expected measures of this config ({', '.join(keys)}), got {', '.join(unknown)}")
        return self

    @property
    def most_processes(self) -> int:
        """Ranks that can share the items."""
        return 1 << 16

    def decisive(self) -> dict[str, Any]:
        """The settings that the figures depend on: all but where and how fast they are made."""
        plain = self.model_dump(mode="json")
        for entry in plain["measures"]:
            if scorer := entry.get("scorer"):
                scorer |= dict.fromkeys(_FREE_SCORER)
                scorer["endpoint"] = scorer["endpoint"] and {
                    name: scorer["endpoint"][name] for name in ("base_url", "model")
                }
        return {key: value for key, value in plain.items() if key not in FREE_BIAS}


# A run may change these and measure nothing again: the figures do not depend on them.
FREE_BIAS = {"fail_if", "processes"}
_FREE_SCORER = ("concurrency", "retries", "max_answer_bytes")
