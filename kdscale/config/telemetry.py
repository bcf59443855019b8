"""How a distillation is watched: spikes, the profiler, trackers. None of it changes the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdscale.config.fields import MOST, Section


class SpikeConfig(Section):
    """A spike is a loss above the median of the last 16 + factor · σ; σ from the last `window` differences of steps."""

    enabled: bool = True
    window: Annotated[int, Field(ge=8, le=100_000)] = 64
    factor: Annotated[float, Field(gt=0.0, le=1e6)] = 8.0
    after: Annotated[int, Field(ge=4, le=100_000)] = 16  # losses that must be known before anything counts as a spike


Step = Annotated[int, Field(ge=1, le=MOST)]


class ProfileConfig(Section):
    """torch.profiler around the steps `first` to `last`, counted from 1 as in the log; null: no profile."""

    steps: tuple[Step, Step] | None = Field(strict=False, default=None)
    ranks: Literal["first", "all"] = "first"
    shapes: bool = False  # of every operator's inputs
    memory: bool = False
    stacks: bool = False

    @model_validator(mode="after")
    def _steps_are_a_range(self) -> ProfileConfig:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps: expected [first, last] with 1 ≤ first ≤ last, got {list(self.steps)}")
        return self


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = Field(min_length=1, default="kdscale")
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    tags: tuple[str, ...] = Field(strict=False, default=())


class MlflowConfig(Section):
    """MLflow."""

    # a server, `sqlite:///file.db`, or a folder; null: what MLFLOW_TRACKING_URI says
    uri: str | None = None
    experiment: str = Field(min_length=1, default="kdscale")


class TrackioConfig(Section):
    """trackio."""

    project: str = Field(min_length=1, default="kdscale")
    space: str | None = None  # a Hugging Face space that shows the run; null: this machine only


class TrackingConfig(Section):
    """Trackers to which the rows of metrics.jsonl are sent too, through their own libraries; null: not used."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    trackio: TrackioConfig | None = None
