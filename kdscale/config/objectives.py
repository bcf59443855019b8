"""`distill.loss`: what the student is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdscale.config.fields import Count, Section


class LossConfig(Section):
    """α·CE + (1−α)·T²·divergence on the teacher's top-K and one tail bucket, or on the whole vocabulary."""

    targets: Literal["topk", "full"] = "topk"
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"] = "forward_kl"
    ce_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Count = 64
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    tail: Literal["bucket", "truncated", "renormalised"] = "bucket"

    @model_validator(mode="after")
    def _whole_vocabulary_has_no_tail(self) -> LossConfig:
        if self.targets == "full" and self.tail != "bucket":
            raise ValueError(f"tail ({self.tail}) is about topk targets: leave it out with targets: full")
        return self
