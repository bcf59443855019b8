"""A sweep: which fields of a run's config are tried with which values, on how small a budget, and what counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from kdscale.config.fields import Count, Section, explain_errors
from kdscale.config.load import parse_yaml
from kdscale.errors import ConfigError
from kdscale.files import read_text

_MAX_BYTES = 256 << 10

# What a trial can be judged by: the figure in eval.json, and whether less of it is better.
OBJECTIVES: dict[str, bool] = {
    "perplexity": True,
    "kl_to_teacher": True,
    "bits_per_byte": True,
    "top1_agreement": False,
    "acceptance": False,
    "top1_accuracy": False,
    "expected_calibration_error": True,
}
SIZES = ("parameters", "non_embedding_parameters", "weight_bytes", "kv_cache_bytes_per_token")  # less is better

Value = str | int | float | bool | None


class Range(Section):
    """Numbers between two ends, both included; whole ones where both ends are."""

    low: Annotated[float | int, Field(ge=-1e15, le=1e15)]
    high: Annotated[float | int, Field(ge=-1e15, le=1e15)]
    log: bool = False  # drawn evenly in their logarithm
    step: Annotated[float | int, Field(gt=0, le=1e15)] | None = None  # from low on

    @model_validator(mode="after")
    def _ends_are_in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 with log: true")
        if self.log and self.step is not None:
            raise ValueError(f"step ({self.step}) does not go with log: true")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step ({self.step}) must not be larger than high - low")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    @property
    def ends(self) -> tuple[Value, ...]:
        """Both ends and a value between them, which are tried before any work."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step is not None:
            middle = self.low + self.step * ((middle - self.low) // self.step)
        return (self.low, int(middle) if self.whole else middle, self.high)


def _parsed(value: Any) -> Any:
    """A list stays one, and a mapping is a range."""
    if isinstance(value, list | tuple):
        if not value or len(value) > 256:
            raise ValueError(f"expected 1 to 256 values, got {len(value)}")
        if any(isinstance(item, dict | list) for item in value):
            raise ValueError("expected plain values")
        if len({(type(item), item) for item in value}) < len(value):
            raise ValueError("expected every value once")
        return tuple(value)
    return value


Choices = Annotated[tuple[Value, ...] | Range, BeforeValidator(_parsed)]


class SweepConfig(Section):
    """What `kdscale sweep` reads."""

    base: Annotated[str, Field(min_length=1)]  # a config file, or the name of a shipped one
    folder: Annotated[str, Field(min_length=1)]  # where the trials, the study and the results are
    search: Annotated[dict[str, Choices], Field(min_length=1, max_length=64)]  # dotted fields of the config
    trials: Annotated[int, Field(gt=0, le=10_000)] = 12
    tokens: Count | None = None  # that each trial distils; None: as many as the base config
    eval_tokens: Count | None = None  # that each trial is measured on; None: as many as the base config
    objective: Literal[tuple(OBJECTIVES)] = "kl_to_teacher"  # type: ignore[valid-type]
    # a second figure to keep small: the result is a Pareto front, and no trial ends early
    size: Literal[SIZES] | None = None  # type: ignore[valid-type]
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    # end a trial at a validation where it is worse than the best third of those before it (successive halving)
    end_early: bool = True
    # whose weights stay: of the best trials, of all of them, of none
    keep: Literal["best", "all", "none"] = "best"

    @model_validator(mode="after")
    def _grid_is_finite(self) -> SweepConfig:
        endless = [name for name, choices in self.search.items() if isinstance(choices, Range) and not choices.step]
        if self.sampler == "grid" and endless:
            raise ValueError(f"sampler (grid) needs values or a step for each field; a range has: {', '.join(endless)}")
        return self


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's YAML file. Raises ConfigError, with every problem in it."""
    if not path.is_file():
        raise ConfigError(
            f"sweep {path} does not exist", expected="a YAML file with base, folder and search",
            hint="configs/sweeps/ in the repository has one to start from",
        )  # fmt: skip
    tree = parse_yaml(read_text(path, ConfigError, _MAX_BYTES), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"sweep {path} holds no settings", expected="a mapping", got=type(tree).__name__)
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in explain_errors(error, SweepConfig))
        raise ConfigError(f"{path} cannot be used:\n{problems}") from error
