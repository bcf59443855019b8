"""`eval`: what is measured at the end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdscale.config.evaluation.downstream import DownstreamConfig
from kdscale.config.evaluation.draft import DraftConfig
from kdscale.config.evaluation.speed import SpeedConfig
from kdscale.config.fields import Count, Dtype, Few, Length, Section


class EvalConfig(Section):
    """How much held-out text is scored, what the samples continue, and whether speed is measured."""

    tokens: Count = 16_384
    seq_len: Length = 512
    micro_batch: Few = 4
    # ranks on this machine that share the text and the prompts; None: one a GPU, one on a CPU
    processes: Few | None = None
    dtype: Dtype = "float32"
    prompts: tuple[Annotated[str, Field(min_length=1, max_length=100_000)], ...] = Field(
        strict=False,
        max_length=64,
        default=(
            "The capital of France is",
            "Elizabeth was surprised, and said to her sister,",
            "And it came to pass in those days, that",
            "A computer program is",
        ),
    )
    sample_tokens: Length = 48
    # 0 is greedy, with which small models tend to loop; the draws are seeded and the same for every model
    sample_temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.7
    sample_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    efficiency: bool = True
    speed: SpeedConfig = SpeedConfig()
    draft: DraftConfig | None = None  # None: the students are not tried as drafts of the teacher
    downstream: DownstreamConfig | None = None  # None: no tasks are scored

    @model_validator(mode="after")
    def _drafts_have_prompts(self) -> EvalConfig:
        if self.draft is not None and not self.prompts:
            raise ValueError("prompts: expected at least one with draft, whose steps are timed after the longest")
        return self

    @property
    def most_processes(self) -> int:
        """The batches of held-out text, at least: with more ranks some would have none."""
        return max(1, self.tokens // (self.seq_len * self.micro_batch))
