"""Speed and memory of models as plain transformers runs them, greedy: what a user waits for, and what a machine gives.

Peak memory is only exact in a process that never held anything else, and timings are only fair when other load on the
machine slows all models alike. So each model gets a process of its own, all of them stay alive, and they are asked
strictly in turn. Where the models do not fit in memory together they run one after another, and the result says so
(`interleaved: false`).

A cell is one batch size with one context length. First each is measured once, as far as the time allows, then the batch
grows until it gives no more tokens per second, then what is quickest to measure is repeated. All models get the same
cells and repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.evaluation.speed import SpeedConfig
from kdscale.errors import MachineError
from kdscale.eval.sizes import fit_together
from kdscale.eval.speed.figures import cell_figures, model_figures
from kdscale.eval.speed.process import Worker, worker
from kdscale.eval.speed.worker import arguments_of
from kdscale.models.loading import quantization_of
from kdscale.runs.models import TEACHER

if TYPE_CHECKING:
    from kdscale.runtime.progress import Bar, Reporter

_WORTH_DOUBLING = 0.05  # the least gain in tokens per second for which the batch is doubled once more
_GROWTH_TOKENS = 6
_OF_LOADING = 0.2  # what of the bar the loading of the models takes
_NO_TIME, _NO_MEMORY = "eval.speed.seconds did not suffice", "memory did not suffice"


@dataclass(frozen=True)
class Cell:
    """One batch size with one context length."""

    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return self.batch * self.context


@dataclass
class Measurements:
    """What one model's process has answered so far."""

    process: Worker
    loaded: dict[str, Any] = field(default_factory=dict)
    cells: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)
    lacks_memory: dict[Cell, str] = field(default_factory=dict)
    growth: list[dict[str, Any]] = field(default_factory=list)  # batch and tokens per second, and joules a token
    growth_ended: str | None = None
    headline_peak: int = 0


def left_out(models: Mapping[str, Path]) -> dict[str, str]:
    """The models that are not timed, and why. A quantised teacher is timed, as the plain model that teaches."""
    return {
        name: "kdscale restores its weights to plain ones; measure it in the engine that will serve it"
        for name, path in models.items()
        if name != TEACHER and quantization_of(path) is not None
    }


def measure(
    models: Mapping[str, Path],
    cfg: EvalConfig,
    *,
    device: str,
    threads: int,
    reporter: Reporter,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Speed and peak memory of each model that is not `left_out`.

    Raises what a model's process raised, MachineError when it ran out of memory or was killed, RuntimeError with its
    trace when it failed as it never should.
    """
    unfit = left_out(models)
    timed = {name: path for name, path in models.items() if name not in unfit}
    if not timed:
        return {}
    together = fit_together(timed, cfg.dtype, device)
    groups = [list(timed)] if together else [[name] for name in timed]
    if cfg.speed.cuda_graphs and device != "cuda":
        reporter.say("note: eval.speed.cuda_graphs is for GPUs; this is a CPU, and speed is measured without them")
    found: dict[str, dict[str, Any]] = {}
    with reporter.bar("speed and memory", 100, unit="%") as bar:
        for names in groups:
            with ExitStack() as stack:
                workers = {
                    name: stack.enter_context(
                        worker(
                            timed[name],
                            arguments_of(
                                timed[name], device, cfg.dtype, threads, cfg.speed.cuda_graphs, trust_remote_code
                            ),
                        )
                    )
                    for name in names
                }
                session = _Session(
                    {name: Measurements(process) for name, process in workers.items()},
                    cfg.speed,
                    bar,
                    100 / len(groups),
                )
                session.measure()
                for name, of_model in session.models.items():
                    found[name] = _figures(of_model, session, cfg.speed) | {"interleaved": together and len(timed) > 1}
    return {name: found[name] for name in timed}


class _Session:
    """Models that are asked in turn, and the time that is left for them."""

    def __init__(self, models: Mapping[str, Measurements], cfg: SpeedConfig, bar: Bar, percent: float):
        self.models = models
        self.left_out: dict[Cell, str] = {}
        self._cfg, self._bar, self._percent = cfg, bar, percent  # what of the bar is this session's
        self.cells = [Cell(batch, context) for batch in cfg.batch_sizes for context in cfg.context_lengths]
        self._seconds: dict[Cell, float] = {}  # that all models together took for a cell
        self._turns = 0
        self._end = 0.0
        self._shown = 0.0  # the share of the time that the bar has shown to be over

    def measure(self) -> None:
        """Load the models, then measure as the head of this file says."""
        for name, model in self.models.items():  # in turn too: one that loads would slow down one that is timed
            model.loaded = model.process.ask("load")
            self._bar.advance(self._percent * _OF_LOADING / len(self.models), name)
        self._end = time.monotonic() + self._cfg.seconds * len(self.models)
        headline = self.cells[0]
        on_gpu = any(model.loaded["device"] == "cuda" for model in self.models.values())
        for cell in self.cells if on_gpu else [headline]:
            self._warm_up(cell)
        for cell in sorted(self.cells, key=lambda cell: cell.tokens):
            if cell != headline and time.monotonic() + self._expected(cell) > self._end:
                self.left_out[cell] = _NO_TIME
            else:
                self._time(cell)
        if self._cfg.max_batch_size is not None:
            self._grow(headline.context, self._cfg.max_batch_size)
        for cell in sorted(self._seconds, key=lambda cell: self._seconds[cell]):
            for _ in range(1, self._cfg.repeats):
                if time.monotonic() + self._seconds[cell] > self._end:
                    break
                self._time(cell)
        self._end = time.monotonic()
        self._show("")

    def _warm_up(self, cell: Cell) -> None:
        for model in self.models.values():
            answer = self._ask(model, "generate", cell, self._cfg.new_tokens)
            model.headline_peak = model.headline_peak or answer.get("peak_memory_bytes", 0)

    def _time(self, cell: Cell) -> None:
        """One measurement of a cell on every model that has the memory; the order alternates."""
        started = time.monotonic()
        models = list(self.models.values())
        self._turns += 1
        for model in models if self._turns % 2 else models[::-1]:
            if cell in model.lacks_memory:
                continue
            answer = self._ask(model, "generate", cell, self._cfg.new_tokens)
            if reason := answer.get("lacks_memory"):
                model.lacks_memory[cell] = reason
            else:
                model.cells.setdefault(cell, []).append(answer)
        if any(cell in model.cells for model in models):  # what nobody has the memory for takes no time
            self._seconds[cell] = time.monotonic() - started

    def _expected(self, cell: Cell) -> float:
        """Seconds that a cell will take that was not measured yet, by the largest one that was."""
        if not self._seconds:
            return 0.0
        known = max(self._seconds, key=lambda other: other.tokens)
        new = self._cfg.new_tokens
        return self._seconds[known] * (cell.tokens + cell.batch * new) / (known.tokens + known.batch * new)

    def _grow(self, context: int, most: int) -> None:
        """Double the batch of every model until that gains too little, memory ends or `most` is reached."""
        batch, growing = 1, list(self.models.values())
        while growing:
            for model in growing:
                if model.growth and time.monotonic() > self._end:
                    model.growth_ended = "seconds"
                else:
                    self._grow_to(model, Cell(batch, context))
            batch *= 2
            for model in growing:
                if model.growth_ended is None and batch > most:
                    model.growth_ended = "max_batch_size"
            growing = [model for model in growing if model.growth_ended is None]

    def _grow_to(self, model: Measurements, cell: Cell) -> None:
        answer = self._ask(model, "grow", cell, _GROWTH_TOKENS)
        if "lacks_memory" in answer:
            model.growth_ended = "memory"
            return
        tokens = cell.batch * len(answer["gaps"])
        joules = answer["joules"]
        model.growth.append(
            {
                "batch": cell.batch,
                "tokens_per_second": cell.batch / statistics.median(answer["gaps"]),
                "joules_per_token": None if joules is None else joules / tokens,
            }
        )
        rates = [step["tokens_per_second"] for step in model.growth]
        # two doublings in vain: a single one may have met other work of the machine
        if len(rates) > 2 and max(rates[-2:]) < (1 + _WORTH_DOUBLING) * max(rates[:-2]):
            model.growth_ended = "gain"

    def _ask(self, model: Measurements, do: str, cell: Cell, new_tokens: int) -> dict[str, Any]:
        answer = model.process.ask(do, batch=cell.batch, context=cell.context, new_tokens=new_tokens)
        self._show(f"batch {cell.batch}, {cell.context} tokens")
        return answer

    def _show(self, note: str) -> None:
        """Move the bar as far as time has gone: how often each cell is measured is not known before."""
        now = time.monotonic()
        share = 1.0 if now > self._end else max(0.0, 1 - (self._end - now) / (self._cfg.seconds * len(self.models)))
        self._bar.advance((share - self._shown) * self._percent * (1 - _OF_LOADING), note)
        self._shown = share


def _figures(model: Measurements, session: _Session, cfg: SpeedConfig) -> dict[str, Any]:
    headline, *_ = session.cells
    if reason := model.lacks_memory.get(headline):
        raise MachineError(
            f"measuring the speed of {model.process.path}",
            expected=f"memory for {headline.batch} x {headline.context:,} tokens",
            got=reason,
            hint="lower eval.speed.batch_sizes or context_lengths, or set eval.efficiency to false",
        )
    cells = [
        cell_figures(
            cell.batch,
            cell.context,
            model.cells.get(cell, []),
            _NO_MEMORY if cell in model.lacks_memory else session.left_out.get(cell),
        )
        for cell in session.cells
    ]
    refused = [answer["cuda_graphs_refused"] for answers in model.cells.values() for answer in answers]
    return model_figures(cells, model.growth, model.growth_ended, headline.context, cfg) | {
        "peak_memory_bytes": model.headline_peak,
        **model.loaded,
        "cuda_graphs": cfg.cuda_graphs and model.loaded["device"] == "cuda" and not any(refused),
        "cuda_graphs_refused": next(filter(None, refused), None),
    }
