"""Settings of an objective that may change while the student is trained: a number, or a schedule over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from kdscale.config.fields import MOST, Section

_Value = Annotated[float, Field(ge=0.0, le=1e6)]  # each setting has a narrower range of its own: Between


class Schedule(Section):
    """From `start` at the first step to `end`, which is reached after `over` and kept from then on.

    It depends on the number of the step alone, so that a resumed run is on the same schedule, on any number of ranks.
    """

    start: _Value
    end: _Value
    # `step` is `start` until `over` and `end` afterwards
    shape: Literal["linear", "cosine", "step"] = "linear"
    # up to 1: the share of the run's steps; above: a number of steps
    over: Annotated[float, Field(gt=0.0, le=MOST)] = 1.0

    @model_validator(mode="after")
    def _it_goes_somewhere(self) -> Schedule:
        if self.over > 1 and not self.over.is_integer():
            raise ValueError(f"over ({self.over:g}) must be a share of the steps, up to 1, or a whole number of steps")
        if self.start == self.end:
            raise ValueError(f"end ({self.end:g}) must differ from start: write the number alone instead")
        return self

    def in_steps(self, steps: int) -> Schedule:
        """The same in a run of `steps` steps, with `over` as a number of steps, at least 2."""
        return self if self.over > 1 else self.model_copy(update={"over": float(max(2, round(self.over * steps)))})

    def at(self, step: int | None) -> float:
        """The value at optimiser step `step`, counted from 0; None: after all steps. `over` must be in steps."""
        assert self.over > 1, "a share of the steps: call in_steps first"
        if step is None or step >= self.over:
            return self.end
        if self.shape == "step":
            return self.start
        progress = step / (self.over - 1)
        if self.shape == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress

    def __str__(self) -> str:
        over = f"{self.over:.0f} steps" if self.over > 1 else f"{self.over:.0%} of the steps"
        return f"{self.start:g} → {self.end:g} ({self.shape}, {over})"

    def __format__(self, _spec: str) -> str:
        return str(self)


def at(value: float | Schedule, step: int | None) -> float:
    """A setting at optimiser step `step`; None: after all steps."""
    return value.at(step) if isinstance(value, Schedule) else value


def _number_or_schedule(value: Any) -> float | Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, dict):
        return Schedule.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number, or a schedule: a mapping with start, end, shape and over")  # noqa: TRY004
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


@dataclass(frozen=True)
class Between:
    """Annotates a setting from `low` to `high` (`above`: greater than `low`) that is a number or a schedule.

    The ends of a schedule may be `low` itself, so that an objective can be faded in or out.
    """

    low: float
    high: float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        checked = core_schema.no_info_after_validator_function(self._check, handler(source))
        return core_schema.no_info_before_validator_function(_number_or_schedule, checked)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        plain = handler(schema)
        low = "exclusiveMinimum" if self.above else "minimum"
        ranges = {"number": {low: self.low, "maximum": self.high}}
        return {**plain, "anyOf": [{**kind, **ranges.get(kind.get("type", ""), {})} for kind in plain["anyOf"]]}

    def _check(self, value: float | Schedule) -> float | Schedule:
        ends = (value.start, value.end) if isinstance(value, Schedule) else (value,)
        above = self.above and not isinstance(value, Schedule)
        if not all((self.low < end if above else self.low <= end) and end <= self.high for end in ends):
            least = f"greater than {self.low:g}" if above else f"at least {self.low:g}"
            raise ValueError(f"should be {least} and at most {self.high:g}")
        return value
