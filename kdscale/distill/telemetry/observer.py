"""What watches a distillation: the step's clock, the log, spikes, trackers, the profiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.config.distill.objective import Term
from kdscale.config.distill.objectives import farther_from_teacher
from kdscale.config.root import Config
from kdscale.data.batches import PackedLoader
from kdscale.distill.telemetry.clock import Clock
from kdscale.distill.telemetry.collectives import CollectiveTimer
from kdscale.distill.telemetry.profiling import StepProfiler
from kdscale.distill.telemetry.spikes import SpikeDetector, describe_batch, name_documents
from kdscale.distill.telemetry.throughput import SpeedReport, peak_flops
from kdscale.distill.telemetry.trackers import Trackers, open_trackers
from kdscale.runs.folder import BAD_BATCHES, METRICS, TENSORBOARD
from kdscale.runs.metrics_log import MetricsLog, read_metrics
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_main, rank, world_size
from kdscale.sizing.flops import ModelFlops, mfu, step_flops
from kdscale.sizing.job import Adapters
from kdscale.sizing.layer_losses import LayerLosses
from kdscale.sizing.model_shape import ModelShape
from kdscale.teacher.folders import teacher_folders
from kdscale.weights import read_config

COMMUNICATION = "communication"  # a phase that lies within the others


@dataclass(frozen=True)
class StepFacts:
    """One optimiser step over all ranks."""

    step: int  # from 0
    lr: float
    means: Mapping[str, float]
    scheduled: Mapping[str, float]  # settings that follow a schedule, as they are at this step
    grad_norm: float
    labels: int
    skipped: bool
    skipped_total: int
    memory: Sequence[float]  # peak bytes, by rank
    micro_sums: Sequence[float]  # summed losses of the micro-batches of all ranks, in the global order


@dataclass(frozen=True)
class StepWork:
    """What a step computes, for tokens/s and MFU; `peak` FLOP/s are those of all ranks, None where not known."""

    tokens: int  # a step, global
    teacher: ModelFlops | None  # None: it runs elsewhere
    student: ModelFlops
    peak: float | None
    losses: ModelFlops | None = None  # on layers
    adapters: int | None = None  # parameters of adapters, where these alone are trained

    def mfu(self, labels: int, seconds: float, documents: Callable[[], Iterable[int]]) -> float | None:
        """Model FLOPs utilisation of a step with `labels` that took `seconds`; None without a peak.

        `documents` gives the lengths of all of its documents.
        """
        if self.peak is None:
            return None
        flops = step_flops(self.teacher, self.student, self.tokens, labels, documents(), self.losses, self.adapters)
        return mfu(flops, seconds, self.peak)


@dataclass(frozen=True)
class Records:
    """Where rank 0 writes: metrics.jsonl with TensorBoard, the batches of bad steps, trackers."""

    metrics: MetricsLog
    bad_batches: MetricsLog
    trackers: Trackers
    spikes: SpikeDetector


class Observer:
    """Called `begin` before a step's batch is drawn, then `end` after its host sync; `clock` is marked in between.

    `terms`, the columns of the objectives, are logged at every step. `at_start` holds the first validation's figures;
    empty before there is one. `records` is None on all ranks but 0.
    """

    def __init__(
        self,
        device: torch.device,
        work: StepWork,
        profiler: StepProfiler,
        loader: PackedLoader,
        reporter: Reporter,
        terms: Sequence[Term],
        records: Records | None,
        at_start: Mapping[str, float],
    ):
        self._device, self._work, self._profiler, self._loader = device, work, profiler, loader
        self._reporter, self._terms, self._records, self._at_start = reporter, terms, records, at_start
        self._collectives, self._report = CollectiveTimer(device), SpeedReport()
        self._memory = 0.0
        self._step = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the collectives of all steps inside the block."""
        with self._collectives.installed():
            yield

    def begin(self, step: int) -> None:
        """Start the clock of `step` (from 0), and the profiler if it is one of its steps."""
        self._step = step + 1
        self._profiler.begin(step + 1)
        self._collectives.seconds()  # what validation and checkpoints spent is no part of the step
        self.clock = Clock(self._device)

    def end(self, facts: StepFacts) -> str:
        """Log the step; returns the note for the progress bar."""
        seconds = self.clock.elapsed()
        phases = {**self.clock.seconds(), COMMUNICATION: self._collectives.seconds()}
        self._report_profile(self._profiler.end(facts.step + 1))
        mfu = self._work.mfu(facts.labels, seconds, lambda: self._loader.document_lengths(facts.step))
        self._memory = max(facts.memory)
        self._report.add(self._work.tokens, seconds, phases, mfu)
        if self._records is not None:
            values: dict[str, Any] = {
                "tokens": (facts.step + 1) * self._work.tokens,
                "labels": facts.labels,
                "lr": facts.lr,
                **facts.scheduled,
                **{name: facts.means[name] for name in (term.name for term in self._terms)},
                "grad_norm": facts.grad_norm,
                "tokens_per_second": self._work.tokens / seconds,
                **({} if mfu is None else {"mfu": mfu}),
                "seconds": seconds,
                **{f"seconds_{phase}": value for phase, value in phases.items()},
                "peak_memory_bytes": max(facts.memory),
                "peak_memory_rank": max(range(len(facts.memory)), key=lambda i: facts.memory[i]),
                "skipped": int(facts.skipped),
                "skipped_total": facts.skipped_total,
            }
            values |= self._bad_batch(facts, self._records)
            self._write("train", facts.step + 1, values)
        return f"loss {facts.means['loss']:.4f}" + ("" if mfu is None else f" · MFU {100 * mfu:.1f} %")

    def validated(self, step: int, means: Mapping[str, float]) -> None:
        """Log a validation (`means` of Validator.run) and report the speed of the steps since the last one."""
        if self._records is not None:
            columns = {name: value for name, value in means.items() if name != "tokens"}
            labels = int(means["tokens"])
            self._write("validation", step, {"tokens": step * self._work.tokens, "labels": labels, **columns})
        self._at_start = self._at_start or dict(means)
        if farther := farther_from_teacher(self._terms, self._at_start, means):
            self._reporter.say(
                f"step {step}: farther from the teacher than at the start, on held-out text: {', '.join(farther)} "
                "(a lower distill.optimizer.lr, less ce_weight or more tokens may help)"
            )
        if line := self._report.line(COMMUNICATION, self._memory):
            self._reporter.say(f"step {step}: {line}")

    def sync(self) -> None:
        """Make the rows so far survive a power cut."""
        if self._records is not None:
            self._records.metrics.sync()
            self._records.bad_batches.sync()

    def close(self, error: BaseException | None = None) -> None:
        """Close files and trackers; `error` is what ended the training early."""
        self._report_profile(self._profiler.close(self._step))
        if self._records is not None:
            self._records.metrics.close()
            self._records.bad_batches.close()
            self._records.trackers.close(failed=error is not None)

    def _bad_batch(self, facts: StepFacts, records: Records) -> dict[str, Any]:
        """Log the batch to bad_batches.jsonl, and report it, if the loss spiked or was not finite; extra columns."""
        spike = records.spikes.look(facts.means["loss"])
        if spike is None and not facts.skipped:
            return {}
        rows = describe_batch(self._loader, facts.step, facts.micro_sums)
        documents, step = name_documents(rows), facts.step + 1
        if spike is None:
            records.bad_batches.write("skipped", step, micro_batches=rows)
            self._reporter.say(f"step {step}: loss or gradient not finite, step skipped (documents {documents})")
            return {"documents": documents}
        fields = {"loss": spike.loss, "median": spike.median, "limit": spike.limit}
        records.bad_batches.write("spike", step, **fields, micro_batches=rows)
        self._reporter.say(
            f"step {step}: loss {spike.loss:.4f} is out of line (median {spike.median:.4f}, limit "
            f"{spike.limit:.4f}); documents {documents}; `kdscale replay RUN --step {step}` runs it again alone"
        )
        return {"spike": 1, "spike_limit": spike.limit, "documents": documents}

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        assert self._records is not None
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}  # JSON has no NaN
        self._records.metrics.write(kind, step, **finite)
        self._records.trackers.log(kind, step, finite)

    def _report_profile(self, paths: Sequence[Path]) -> None:
        if paths:
            self._reporter.say("profile: " + ", ".join(map(str, paths)))


def make_observer(
    cfg: Config,
    loader: PackedLoader,
    *,
    teacher_dir: Path,
    student_dir: Path,
    run_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
    reporter: Reporter,
) -> Observer:
    """The observer of a run that goes on after `step` steps.

    A tracker that fails to start is reported and disabled; training goes on.
    """
    settings, logs = cfg.distill, run_dir / "logs"
    peak = peak_flops(settings.peak_flops, device, dtype)
    student, folders = ModelShape.of_config(read_config(student_dir)), teacher_folders(cfg, teacher_dir)
    teachers = [
        ModelShape.of_config(read_config(student_dir if one.source.is_student else folders[name]))
        for name, one in settings.by_teacher().items()
        if one.source.in_process
    ]
    work = StepWork(
        tokens=settings.global_batch * settings.seq_len,
        teacher=ModelFlops.together([ModelFlops.of_shape(shape) for shape in teachers]),
        student=ModelFlops.of_shape(student),
        peak=None if peak is None else peak * world_size(),
        losses=LayerLosses.of(settings.objectives, student).flops(student, teachers[0]) if teachers else None,
        adapters=adapters.params if (adapters := Adapters.of(settings.lora, read_config(student_dir))) else None,
    )
    records, at_start = None, {}
    if is_main():
        metrics = MetricsLog(run_dir / METRICS.path, step, run_dir / TENSORBOARD.path, reporter.say)
        rows = list(read_metrics(run_dir / METRICS.path))
        known = [row["loss"] for row in rows if row["kind"] == "train" and "loss" in row and not row["skipped"]]
        at_start = next((row for row in rows if row["kind"] == "validation"), {})
        records = Records(
            metrics=metrics,
            bad_batches=MetricsLog(run_dir / BAD_BATCHES.path, step, say=reporter.say),
            trackers=open_trackers(cfg, logs, reporter.say),
            spikes=SpikeDetector(settings.spikes, known),
        )
    profiler = StepProfiler(settings.profile, logs / "profile", rank(), device)
    return Observer(device, work, profiler, loader, reporter, settings.columns, records, at_start)
