"""Everything that watches a distillation: the step's clock, metrics, spikes, trackers, the profiler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.config.root import Config
from kdscale.data.batches import PackedLoader
from kdscale.distill.objectives.token_divergence import TERMS
from kdscale.distill.telemetry.clock import Clock
from kdscale.distill.telemetry.collectives import CollectiveTimer
from kdscale.distill.telemetry.profiling import StepProfiler
from kdscale.distill.telemetry.spikes import SpikeDetector, describe_batch, name_documents
from kdscale.distill.telemetry.throughput import SpeedReport, peak_flops
from kdscale.distill.telemetry.trackers import Trackers, open_trackers
from kdscale.runs.metrics_log import MetricsLog, read_metrics
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_main, rank, world_size
from kdscale.sizing.flops import ModelFlops, mfu, step_flops
from kdscale.weights import read_config

COMMUNICATION = "communication"


@dataclass(frozen=True)
class StepFacts:
    """One optimiser step over all ranks; `step` counts from 0, `micro_sums` are losses in the global order."""

    step: int
    lr: float
    means: Mapping[str, float]
    grad_norm: float
    labels: int
    skipped: bool
    skipped_total: int
    memory: Sequence[float]  # peak bytes, by rank
    micro_sums: Sequence[float]


@dataclass(frozen=True)
class Speed:
    """What MFU is made of; `peak` is that of all ranks together, None where it is not known."""

    tokens: int  # a step, global
    teacher: ModelFlops | None  # None: it works elsewhere
    student: ModelFlops
    peak: float | None

    def mfu(self, labels: int, seconds: float) -> float | None:
        if self.peak is None:
            return None
        return mfu(step_flops(self.teacher, self.student, self.tokens, labels), seconds, self.peak)


@dataclass(frozen=True)
class Records:
    """Where rank 0 writes: metrics.jsonl with TensorBoard, the batches of bad steps, trackers."""

    metrics: MetricsLog
    bad_batches: MetricsLog
    trackers: Trackers
    spikes: SpikeDetector


class Observer:
    """`begin` before a step's batch is drawn, `clock` in it, `end` after its host sync; `records` on rank 0 only."""

    def __init__(
        self,
        device: torch.device,
        speed: Speed,
        profiler: StepProfiler,
        loader: PackedLoader,
        reporter: Reporter,
        records: Records | None,
    ):
        self._device, self._speed, self._profiler, self._loader = device, speed, profiler, loader
        self._reporter, self._records = reporter, records
        self._collectives, self._report = CollectiveTimer(device), SpeedReport()
        self._memory = 0.0
        self._step = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around all steps: collectives are timed inside."""
        with self._collectives.installed():
            yield

    def begin(self, step: int) -> None:
        self._step = step + 1
        self._profiler.begin(step + 1)
        self._collectives.seconds()  # what validation and checkpoints spent is no part of the step
        self.clock = Clock(self._device)

    def end(self, facts: StepFacts) -> str:
        """Write the step down; returns the note for the progress bar."""
        seconds = self.clock.elapsed()
        phases = {**self.clock.seconds(), COMMUNICATION: self._collectives.seconds()}
        self._say_files(self._profiler.end(facts.step + 1))
        mfu = self._speed.mfu(facts.labels, seconds)
        self._memory = max(facts.memory)
        self._report.add(self._speed.tokens, seconds, phases, mfu)
        if self._records is not None:
            values: dict[str, Any] = {
                "tokens": (facts.step + 1) * self._speed.tokens,
                "labels": facts.labels,
                "lr": facts.lr,
                **{name: facts.means[name] for name in TERMS},
                "grad_norm": facts.grad_norm,
                "tokens_per_second": self._speed.tokens / seconds,
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
        share = "" if mfu is None else f" · MFU {100 * mfu:.1f} %"
        return f"loss {facts.means['loss']:.4f}{share}"

    def validated(self, step: int, found: Mapping[str, float]) -> None:
        """Write a validation down, and say how fast the steps since the last one were."""
        if self._records is not None:
            rest = {name: value for name, value in found.items() if name != "tokens"}
            labels = int(found["tokens"])
            self._write("validation", step, {"tokens": step * self._speed.tokens, "labels": labels, **rest})
        if line := self._report.line(COMMUNICATION, self._memory):
            self._reporter.say(f"step {step}: {line}")

    def close(self, error: BaseException | None = None) -> None:
        """Finish files and trackers; `error` is what ended the training early."""
        self._say_files(self._profiler.close(self._step))
        if self._records is not None:
            self._records.metrics.close()
            self._records.bad_batches.close()
            self._records.trackers.close(failed=error is not None)

    def _bad_batch(self, facts: StepFacts, records: Records) -> dict[str, Any]:
        """Look whether the loss spiked or was not finite; the batch goes to bad_batches.jsonl, a word to the log."""
        spike = records.spikes.look(facts.means["loss"])
        if spike is None and not facts.skipped:
            return {}
        rows = describe_batch(self._loader, facts.step, facts.micro_sums)
        documents, step = name_documents(rows), facts.step + 1
        if spike is None:
            what: dict[str, Any] = {}
            self._reporter.say(f"step {step}: loss or gradient not finite, step skipped (documents {documents})")
        else:
            what = {"spike": 1, "spike_limit": spike.limit}
            self._reporter.say(
                f"step {step}: loss {spike.loss:.4f} is out of line (median {spike.median:.4f}, limit "
                f"{spike.limit:.4f}); documents {documents}; `kdscale replay RUN --step {step}` runs it again alone"
            )
        kind = "skipped" if spike is None else "spike"
        fields = {} if spike is None else {"loss": spike.loss, "median": spike.median, "limit": spike.limit}
        records.bad_batches.write(kind, step, **fields, micro_batches=rows)
        return {**what, "documents": documents}

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        assert self._records is not None
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}  # JSON has no NaN
        self._records.metrics.write(kind, step, **finite)
        self._records.trackers.log(kind, step, finite)

    def _say_files(self, paths: Sequence[Path]) -> None:
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
    """The observer of a run that goes on after `step` steps. A tracker that cannot start is said, never raised."""
    settings, logs = cfg.distill, run_dir / "logs"
    peak = peak_flops(settings.peak_flops, device, dtype)
    speed = Speed(
        tokens=settings.global_batch * settings.seq_len,
        teacher=None
        if settings.teacher_placement == "served"
        else ModelFlops.of(read_config(teacher_dir), settings.seq_len),
        student=ModelFlops.of(read_config(student_dir), settings.seq_len),
        peak=None if peak is None else peak * world_size(),
    )
    records = None
    if is_main():
        metrics = MetricsLog(logs / "metrics.jsonl", step, logs / "tensorboard")
        rows = [row for row in read_metrics(logs / "metrics.jsonl") if row["kind"] == "train"]
        known = [row["loss"] for row in rows if "loss" in row and not row["skipped"]]
        records = Records(
            metrics=metrics,
            bad_batches=MetricsLog(logs / "bad_batches.jsonl", step),
            trackers=open_trackers(cfg, logs, reporter.say),
            spikes=SpikeDetector(settings.spikes, known),
        )
    profiler = StepProfiler(settings.profile, logs / "profile", rank(), device)
    return Observer(device, speed, profiler, loader, reporter, records)
