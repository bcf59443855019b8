"""`correct`: the teacher is fine-tuned on the run's text before it teaches (arXiv 2408.11796, "Teacher Correction")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdscale.config.distill.teachers import TEACHER_SETTINGS
from kdscale.config.fields import Count, Section


class ShortTraining(Section):
    """A training beside the distillation, with the settings of `distill` except for what is here."""

    tokens: Count | None = None  # None: a tenth of distill.tokens, and at least a step
    lr_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # of the peak distill.optimizer.lr
    # what it says differently of distill
    distill: dict[str, Any] = Field(default_factory=dict)


class CorrectConfig(ShortTraining):
    """A short fine-tuning of the teacher by cross-entropy, which is larger than the student."""

    # which stages see the corrected teacher: importance, plan, prune and distill, or the distillation alone
    use: Literal["prune_and_distill", "distill"] = "prune_and_distill"

    @model_validator(mode="after")
    def _learns_from_text(self) -> CorrectConfig:
        fixed = {"tokens", "objectives", *TEACHER_SETTINGS}
        if given := sorted(fixed & set(self.distill)):
            raise ValueError(
                f"distill.{given[0]}: the fine-tuning learns from the text alone, for correct.tokens: leave it out"
            )
        return self
