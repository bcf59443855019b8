"""Time and gradient error of contestants (peak memory: memory.py).

All contestants of an op take turns in one process, so that whatever else the machine does slows all of them; the ratio
to ours is taken within each round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from contestants import Contestant, NotHereError, own_and_torch, step, teacher_product
from inputs import ERROR_ROWS, REGIMES, Inputs, exact_gradients, make_inputs, relative_errors
from peers import peers
from shapes import LossShape

Result = TypeVar("Result")
Key = tuple[str, str]


def registry(device: torch.device) -> list[Contestant]:
    """Everyone who takes part on this device."""
    return own_and_torch(device) + peers(device)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """(result, "") or (None, what went wrong in one line)."""
    try:
        return action(), ""
    except NotHereError as error:
        return None, f"cannot run here: {error}"
    except torch.OutOfMemoryError:
        failure = "failed: out of memory"
    except Exception as error:  # noqa: BLE001 - a contestant's failure is its row, not the end of the table
        failure = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU; with one, what failed must not crowd out the next
    return None, failure


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Setting:
    """What is common to all contestants of one measurement."""

    shape: LossShape
    dtype: torch.dtype
    device: torch.device
    direction: str


class Seconds(NamedTuple):
    """Time of one call."""

    wall: float
    cpu: float  # of all threads of this process; what a neighbour's load changes least
    caller: (
        float  # of the calling thread alone: about the wall time on a CPU with idle cores, if threads wait passively
    )


class Bench:
    """The inputs of one setting, made once for each kind of contestant."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._inputs: dict[str, Inputs] = {}

    def inputs(self, contestant: Contestant) -> Inputs:
        """Ready for one call: without gradients, and with logits of its own where they will be written over."""
        needs, setting = contestant.needs, self.setting
        if needs not in self._inputs:
            self._inputs[needs] = make_inputs(setting.shape, setting.dtype, setting.device, needs=needs)
        inputs = self._inputs[needs]
        inputs.forget_gradients()
        if contestant.fresh_logits:
            inputs = inputs.with_own_logits()
        synchronise(setting.device)
        return inputs

    def seconds(self, contestant: Contestant) -> Seconds:
        """Of one call, from an idle device until the device is idle again."""
        inputs = self.inputs(contestant)
        spent = self._spent(lambda: step(contestant, inputs, self.setting.direction))
        if contestant.less_product:
            product = self._spent(lambda: teacher_product(inputs))
            spent = Seconds(*(whole - part for whole, part in zip(spent, product, strict=True)))
        return spent

    def _spent(self, action: Callable[[], None]) -> Seconds:
        clocks = (time.perf_counter, time.process_time, time.thread_time)
        before = [clock() for clock in clocks]
        action()
        synchronise(self.setting.device)
        return Seconds(*(clock() - start for clock, start in zip(clocks, before, strict=True)))


def interleaved(
    contestants: Sequence[Contestant], setting: Setting, rounds: int
) -> tuple[dict[Key, list[Seconds]], dict[Key, str]]:
    """(seconds of each round, what went wrong), by contestant; the first calls of each warm up and are not kept."""
    stage = Bench(setting)
    times: dict[Key, list[Seconds]] = {}
    wrong: dict[Key, str] = {}
    for contestant in contestants:
        _, failure = attempt(lambda c=contestant: _warm_up(stage, c))  # type: ignore[misc]
        if failure:
            wrong[contestant.key] = failure
        else:
            times[contestant.key] = []
    for _ in range(rounds):
        for contestant in [c for c in contestants if c.key in times]:
            spent, failure = attempt(lambda c=contestant: stage.seconds(c))  # type: ignore[misc]
            if spent is None:
                del times[contestant.key]
                wrong[contestant.key] = failure
            else:
                times[contestant.key].append(spent)
    return times, wrong


def _warm_up(stage: Bench, contestant: Contestant) -> None:
    if contestant.absent:
        raise NotHereError(contestant.absent)
    for _ in range(1 + (contestant.compiled or stage.setting.device.type != "cpu")):
        stage.seconds(contestant)


def gradient_errors(contestants: Sequence[Contestant], setting: Setting) -> dict[Key, dict[str, float]]:
    """Relative errors of dX and dW by contestant, at the setting's H and V and at most ERROR_ROWS rows.

    {"dX_<regime>": error, ...}; a contestant that cannot run is left out (its row says why already).
    """
    shape = setting.shape._replace(n=min(setting.shape.n, ERROR_ROWS))
    by_contestant: dict[Key, dict[str, float]] = {}
    for needs in sorted({c.needs for c in contestants}):
        for regime, noise in REGIMES.items():
            inputs = make_inputs(shape, setting.dtype, setting.device, noise, needs)
            compared = [c for c in contestants if c.loss and c.needs == needs and not c.absent]
            exact = exact_gradients(inputs, {c.loss for c in compared if c.loss})
            for contestant in compared:
                own = inputs.with_own_logits() if contestant.fresh_logits else inputs
                own.forget_gradients()
                _, failure = attempt(lambda c=contestant, p=own: step(c, p, "forward+backward"))  # type: ignore[misc]
                if failure:
                    continue
                errors = relative_errors(own, shape.n if contestant.mean else 1.0, exact[contestant.loss or ""])
                named = zip(("dX", "dW"), errors, strict=False)
                by_contestant.setdefault(contestant.key, {}).update({f"{what}_{regime}": e for what, e in named})
            del inputs, exact
            gc.collect()
    return by_contestant
