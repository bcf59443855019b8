"""The candidates that a plan records: shapes that met the budget, with all their scores."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kdscale.config.fields import MOST
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.axes import Sizes

Size = Annotated[int, Field(ge=1, le=MOST)]


class PlanSection(BaseModel):
    """A section of plan.json: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TaskScore(PlanSection):
    """A shape's answers to the questions of `prune.search.tasks`: means over tasks, each ± its standard error.

    `score` decides (search/questions.py), `accuracy` is the share of right answers, `behind` what is missing to the
    best candidate's score; its error is that of the differences on the same items.
    """

    score: float
    score_error: float
    accuracy: float
    accuracy_error: float
    behind: float
    behind_error: float
    teacher_score: float
    teacher_accuracy: float
    items: Size


class MaskedScore(PlanSection):
    """A shape run in memory on calibration text, before it is written: nats per token, and how it was run.

    `acceptance`: the mean of Σ min(p, q), where it was asked for: how likely the teacher accepts a token drawn from it.
    """

    loss: float
    kl: float
    teacher_loss: float
    tokens: Size
    compensate: str
    acceptance: float | None = None
    task: TaskScore | None = None


class ProbeResult(PlanSection):
    """Held-out loss (the distillation's own, in nats per token) after a short distillation."""

    tokens: Size
    loss: float


class ShapeCandidate(PlanSection):
    """One shape that met the budget, and all its scores; `params` as `target.count` counts them."""

    hidden: Size
    ffn: Size
    heads: Size
    kv_heads: Size
    layers: Size
    experts: Annotated[int, Field(ge=0)] = 0
    ssm_heads: Annotated[int, Field(ge=0)] = 0
    ssm_head_dim: Annotated[int, Field(ge=0)] = 0
    ssm_state: Annotated[int, Field(ge=0)] = 0
    params: Size
    active: Size | None = None  # as in ParamCounts
    bytes: Size
    kv_bytes: Size
    decode_ms: float | None = None
    prefill_ms: float | None = None
    latency_spread: float | None = None  # of repeated timings, as a share; None where the times are predicted
    score: float
    masked: MaskedScore | None = None
    probes: list[ProbeResult] = []

    def sizes(self) -> Sizes:
        """The candidate's size on every axis."""
        return Sizes(*(getattr(self, axis) for axis in SHAPE_AXES))
