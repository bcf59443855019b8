"""`responses`: the teacher answers prompts, and the student learns from the answers; null: no such stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdscale.config.data import PromptSourceConfig
from kdscale.config.distill.targets import MOST_LOGPROBS
from kdscale.config.endpoint import EndpointConfig
from kdscale.config.fields import Count, Dtype, Few, Length, Section
from kdscale.config.responses.filters import FilterEntry

Money = Annotated[float, Field(ge=0.0, le=1e9)]


class SamplingConfig(Section):
    """How answers are drawn."""

    n: Annotated[int, Field(ge=1, le=128)] = 1  # answers to each prompt
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.7  # 0: the most likely token
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Length = 1024
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # null: an endpoint draws as it likes; locally the run's
    # kept with each token of an answer, where the endpoint can; distill.teacher_placement: responses learns them
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0


class LimitsConfig(Section):
    """What an endpoint may be asked and what that may cost; null: no limit."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    total_tokens: Count | None = None  # prompts and answers of the run
    total_cost: Money | None = None  # in the currency of the prices
    input_price: Money = 0.0  # for a million tokens of prompts
    output_price: Money = 0.0  # for a million tokens of answers


class ResponsesConfig(Section):
    """Which prompts are answered, by whom, and which answers are kept."""

    prompts: tuple[PromptSourceConfig, ...] = Field(strict=False, min_length=1, max_length=1000)
    system: str | None = Field(min_length=1, max_length=100_000, default=None)  # begins chats that have none
    teacher: Literal["local", "endpoint"] = "local"  # the run's own, through transformers; or responses.endpoint
    sampling: SamplingConfig = SamplingConfig()
    filters: tuple[FilterEntry, ...] = Field(strict=False, max_length=100, default=())  # one after another
    # local
    processes: Few | None = None  # ranks on this machine that share the prompts; null: one a GPU, one on a CPU
    micro_batch: Few = 8  # prompts a forward, a rank
    dtype: Dtype = "auto"
    # endpoint
    endpoint: EndpointConfig = EndpointConfig()
    request: dict[str, Any] = Field(default_factory=dict)  # further fields of each request; null takes one away
    concurrency: Few = 16  # requests under way at a time
    retries: Annotated[int, Field(ge=0, le=1000)] = 8  # of a request that fails for a reason that may pass
    on_refusal: Literal["stop", "skip"] = "stop"  # when the endpoint refuses a single prompt (400, 413, 422)
    max_answer_bytes: Count = 16 << 20  # of one answer of the endpoint, with everything around the text
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _somebody_answers(self) -> ResponsesConfig:
        if self.teacher == "endpoint" and (missing := self.endpoint.missing()):
            raise ValueError(f"teacher: endpoint needs endpoint.{' and endpoint.'.join(missing)}")
        if self.teacher == "local" and self.sampling.top_logprobs:
            raise ValueError(
                "sampling.top_logprobs: is for teacher: endpoint; the run's own teacher gives its whole distribution "
                "when it trains"
            )
        if self.limits.total_cost is not None and not (self.limits.input_price or self.limits.output_price):
            raise ValueError("limits.total_cost: needs input_price or output_price, for a million tokens")
        if own := sorted({"messages", "model", "n", "stream"} & set(self.request)):
            raise ValueError(f"request: {', '.join(own)} cannot be set here")
        for name in ("max_tokens", "max_completion_tokens"):
            if not isinstance(limit := self.request.get(name), int | None) or (limit is not None and limit < 1):
                raise ValueError(f"request: {name}: expected a number of tokens, got {limit!r}")
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> ResponsesConfig:
        if self.sampling.n > 1 and self.sampling.temperature == 0.0:
            raise ValueError("sampling.n: several answers differ only at a temperature above 0")
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings that the answers depend on: all but where and how fast they are made."""
        plain = self.model_dump(mode="json")
        return {
            **{key: value for key, value in plain.items() if key not in FREE_RESPONSES},
            "endpoint": {"model": self.endpoint.model},
        }

    @property
    def most_processes(self) -> int:
        """Ranks that can share the prompts."""
        return 1 if self.teacher == "endpoint" else 1 << 16


# A run may change these and go on: the answers do not depend on them.
FREE_RESPONSES = {"processes", "concurrency", "retries", "max_answer_bytes", "limits", "endpoint"}
