"""Sections of `distill` about its steps: the optimiser, shorter sequences at first, NaN, and a grid for the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdscale.config.fields import MOST, Few, Length, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    """AdamW with a linear warm-up and a cosine decay."""

    lr: Annotated[float, Field(gt=0.0, le=10.0)] = 1e-4
    min_lr: Annotated[float, Field(ge=0.0, le=10.0)] = 1e-5
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] = 40
    betas: tuple[Beta, Beta] = Field(strict=False, default=(0.9, 0.95))
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    gradient_clipping: Annotated[float, Field(gt=0.0, le=1e9)] = 1.0


class ShorterPhase(Section):
    """Shorter sequences than distill.seq_len, as many more of them: a step and a forward have as many tokens."""

    seq_len: Length
    until: Annotated[float, Field(gt=0.0, lt=1.0)]  # share of the steps


class GuardConfig(Section):
    """What to do about NaN and Inf: the step is skipped and counted; this many in a row end the run."""

    max_skipped_in_a_row: Few = 5


class FakeQuantizeConfig(Section):
    """The integers that the student's linear layers will be stored as: it is trained with their values."""

    bits: Literal[4, 8] = 4
    group: Literal[32, 64, 128] | None = 64  # inputs that share a scale; null: all of a row
