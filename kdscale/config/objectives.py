"""`distill.loss`: what the student is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdscale.config.fields import Count, Section
from kdscale_kernels.divergence import Divergence


class LossConfig(Section):
    """α·CE + (1−α)·T²·divergence on the teacher's top-K and one tail bucket, or on the whole vocabulary."""

    targets: Literal["topk", "full"] = "topk"
    divergence: str = "forward_kl"  # a row of kdscale_kernels.DIVERGENCES
    divergence_parameter: float | None = None  # its β or s; None: the default of that row
    ce_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Count = 64
    tail: Literal["bucket", "truncated", "renormalised"] = "bucket"

    @model_validator(mode="after")
    def _divergence_is_known(self) -> LossConfig:
        Divergence(self.divergence, self.divergence_parameter)
        return self

    @model_validator(mode="after")
    def _whole_vocabulary_has_no_tail(self) -> LossConfig:
        if self.targets == "full" and self.tail != "bucket":
            raise ValueError(f"tail ({self.tail}) is about topk targets: leave it out with targets: full")
        return self
