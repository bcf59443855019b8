"""The training loop: step, count, log, validate, save. Ranks agree between micro-batches (agreement.py)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from kdscale.config.distill.settings import DistillConfig
from kdscale.data.batches import Batch, LoaderState, PackedLoader
from kdscale.distill.agreement import Agreement, StopAsked
from kdscale.distill.checkpoint.saver import Saver
from kdscale.distill.lookahead import teacher_stream
from kdscale.distill.non_finite import SkipGuard, by_rank, first_non_finite, show_documents, stop_error, watch
from kdscale.distill.objectives.base import Objectives
from kdscale.distill.on_policy.given_pairs import GivenPairs
from kdscale.distill.on_policy.samples import PHASE, Samples
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.schedule import cosine_lr, seed_step
from kdscale.distill.step import to_device, train_step
from kdscale.distill.telemetry.observer import Observer, StepFacts
from kdscale.distill.validate import Validator
from kdscale.errors import Interrupted
from kdscale.runtime.device import peak_memory, put_on
from kdscale.runtime.progress import Bar, Reporter
from kdscale.runtime.ranks import HostSums, all_reduce_sum, gather, rank, world_size
from kdscale.runtime.signals import watch_signals
from kdscale.teacher.source import StudentAverage, TargetSource
from kdscale_launch.watchdog import at_step, enter


@dataclass(frozen=True)
class _StepSums:
    """One step over all ranks."""

    figures: list[float]  # [tokens, sequences, *figures of the objectives], as Objectives.means reads them
    memory: list[float]  # peak bytes, by rank
    micro_sums: list[float]  # losses of the micro-batches of all ranks, in the global order
    grad_norm: float


@dataclass
class Trainer:
    """Everything one rank needs to train. `engine` is a DeepSpeed engine around step.StudentModule."""

    cfg: DistillConfig
    engine: Any
    source: TargetSource
    objectives: Objectives
    loader: PackedLoader
    validator: Validator
    device: torch.device
    steps: int
    saver: Saver
    seed: int
    bad_gradient: Callable[[], str]  # the parameter whose gradient is not finite, or ""
    observer: Observer
    reporter: Reporter
    host_sums: HostSums
    average: StudentAverage | None = None  # a teacher that follows the student
    samples: Samples | GivenPairs | None = None  # what stands in place of text

    def __post_init__(self) -> None:
        self.guard = SkipGuard(self.cfg.guard.max_skipped_in_a_row)
        self._mesh = Mesh.of(self.cfg)
        self._teacher_stream = teacher_stream(self.cfg, self.device)
        self._validation_due = True  # the pruned student's
        self._saved_step = 0  # nothing is lost before the first step

    @property
    def step_tokens(self) -> int:
        """Positions per step, over all ranks."""
        return self.cfg.global_batch * self.cfg.seq_len

    def restore(self, saved: dict[str, Any]) -> LoaderState:
        """Take up what a checkpoint's manifest says of the training; weights and optimiser are loaded elsewhere."""
        self.guard.restore(saved["guard"])
        self._validation_due = bool(saved.get("validation_due"))
        start = LoaderState.from_json(saved["loader"])
        self._saved_step = start.step
        return start

    def train(self, start: LoaderState) -> None:
        """From optimiser step `start.step` to the end. Raises Interrupted or TrainingError.

        When a rank is asked to stop, the step that has begun is dropped, and what was finished before is saved.
        """
        done, total = start.step * self.step_tokens, self.steps * self.step_tokens
        finished = start
        with self._session("distil", total, done) as (agreement, bar):
            try:
                self._validate_if_due(finished.step, agreement)
                for step, batches, after in self._remaining(start, self.steps, agreement):
                    self._one_step(step, batches, agreement, bar)
                    finished = after
                    self._after_step(after, agreement)
                agreement.settle()
            except StopAsked as asked:
                self._leave(finished, asked.signum)

    def advance(self, start: LoaderState, until: int) -> None:
        """Train on to step `until` without validating or saving; the steps are those of `train`."""
        with self._session("train on", until * self.step_tokens, start.step * self.step_tokens) as (agreement, bar):
            try:
                for step, batches, _ in self._remaining(start, until, agreement):
                    self._one_step(step, batches, agreement, bar)
                agreement.settle()
            except StopAsked as asked:
                raise Interrupted(asked.signum) from None

    def _after_step(self, after: LoaderState, agreement: Agreement) -> None:
        """What comes between two steps. Raises StopAsked."""
        last = after.step == self.steps
        self._validation_due = last or after.step % self.cfg.validate_every == 0
        by_clock = agreement.settle()
        self._validate_if_due(after.step, agreement)
        if self.guard.checkpoint_due(by_clock or after.step % self.cfg.checkpoint_every == 0) or last:
            self._save(after, wait=last)
            agreement.saved()

    def _leave(self, finished: LoaderState, signum: int) -> NoReturn:
        """Save all finished steps, unless that is done, and raise Interrupted."""
        if finished.step == self._saved_step:
            self.saver.finish()
        else:
            self._save(finished, wait=True)
        where = f"after training step {finished.step}, which is saved" if finished.step else "before the first step"
        raise Interrupted(signum, where) from None

    @contextmanager
    def _session(self, title: str, total: int, done: int) -> Iterator[tuple[Agreement, Bar]]:
        with watch_signals() as stop, self.observer.watching(), self.reporter.bar(title, total, "tok", done) as bar:
            minutes = self.cfg.checkpoint_minutes
            yield Agreement(self.host_sums, stop, minutes, lambda: self.saver.written, self._seal), bar

    def _remaining(
        self, start: LoaderState, until: int, agreement: Agreement
    ) -> Iterator[tuple[int, list[Batch], LoaderState]]:
        """(step, batches, state after it) up to step `until`. Batches are made one step early, for the prefetch.

        Not those that the student writes with the weights of then. Raises StopAsked.
        """
        stream = self.loader.batches(start)
        ahead: deque[tuple[list[Batch], LoaderState]] = deque()
        for step in range(start.step, until):
            enter("data")
            self.observer.begin(step)
            if self.samples is not None and self.samples.prepare(step, agreement.look):
                self.observer.clock.mark(PHASE)
            early = self.samples is None or self.samples.holds(step + 1)
            while len(ahead) < min(2 if early else 1, until - step):
                ahead.append(self._prefetched(next(stream)))
            yield step, *ahead.popleft()

    def _prefetched(self, item: tuple[list[Batch], LoaderState]) -> tuple[list[Batch], LoaderState]:
        for batch in item[0]:
            self.source.prefetch(to_device(batch, torch.device("cpu")))
        return item

    def _one_step(self, step: int, batches: Sequence[Batch], agreement: Agreement, bar: Bar) -> None:
        """Train one step, log it, guard it. Raises StopAsked where a rank was asked to stop in the middle of it."""
        seed_step(self.seed, step, rank() // self._mesh.tensor)  # tensor ranks drop the same hidden units
        at_step(step + 1, lambda: f"documents {show_documents(batches)}")
        lr = cosine_lr(step, steps=self.steps, lr=self.cfg.optimizer.lr, min_lr=self.cfg.optimizer.min_lr,
                       warmup_steps=self.cfg.optimizer.warmup_steps)  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        totals = train_step(
            self.engine, self.source, batches, self.device, self.observer.clock, agreement.look, self._teacher_stream
        )
        enter("collective")
        sums = self._over_ranks(totals)
        skipped = bool(self.engine.optimizer.overflow)
        self.guard.record(skipped)
        if self.average is not None and not skipped:
            self.average.follow(self.engine.module.model)
        facts = StepFacts(
            step=step,
            lr=lr,
            means=self.objectives.means(sums.figures, step),
            scheduled=self.objectives.scheduled(step),
            grad_norm=sums.grad_norm,
            labels=int(sums.figures[0]),
            skipped=skipped,
            skipped_total=self.guard.total,
            memory=sums.memory,
            micro_sums=sums.micro_sums,
        )
        bar.advance(self.step_tokens, self.observer.end(facts))
        if skipped and self.guard.exhausted:
            raise stop_error(step + 1, self.guard, batches, self._diagnose(batches))

    def _over_ranks(self, totals: torch.Tensor) -> _StepSums:
        """Sum over ranks and bring to the host: the step's one collective on the device and its one host sync.

        Values that are not summed (peak memory, losses of micro-batches) go along as one row per rank, zero on all
        other ranks. Tensor-parallel ranks have the same batch and the same sums, which count once.
        """
        figures, world, tensor = len(self.objectives.counts) + self.objectives.width, world_size(), self._mesh.tensor
        own = torch.cat([put_on(self.device, [peak_memory(self.device)]), totals[figures:]])
        rows = own.new_zeros(world, own.numel())
        rows[rank()] = own
        summed = all_reduce_sum(torch.cat([totals[:figures] / tensor, rows.reshape(-1)]))
        found = self.engine.get_global_grad_norm()
        norm_1 = found.reshape(1) if isinstance(found, torch.Tensor) else put_on(self.device, [float(found)])
        *values, norm = torch.cat([summed, norm_1.to(summed, non_blocking=True)]).tolist()
        by_rank = [values[i : i + own.numel()] for i in range(figures, len(values), own.numel())]
        return _StepSums(
            figures=values[:figures],
            memory=[row[0] for row in by_rank],
            micro_sums=self._mesh.by_data([row[1:] for row in by_rank]),
            grad_norm=norm,
        )

    def _validate_if_due(self, step: int, agreement: Agreement) -> None:
        """Where a rank is asked to stop meanwhile, it stays due: a resumed run begins with it. Raises StopAsked."""
        if not self._validation_due:
            return
        means = self.validator.run(self.engine, agreement.look)
        self._validation_due = False
        self.observer.validated(step, means)
        self.reporter.say(f"step {step}/{self.steps}: held-out {self.objectives.headline(means)}")

    def _save(self, after: LoaderState, wait: bool) -> None:
        enter("checkpoint")
        self.observer.sync()  # a resume expects every row up to the checkpoint's step
        state = {"loader": after.to_json(), "guard": self.guard.state(), "validation_due": self._validation_due}
        self.saver.save(after.step, {"state": state}, wait)
        self._saved_step = after.step

    def _seal(self) -> None:
        """Finish the checkpoint that all ranks have written in the background."""
        enter("checkpoint")
        self.saver.finish()

    def _diagnose(self, batches: Sequence[Batch]) -> list[str]:
        """Run the batch again with hooks on every module of teacher and student; returns what every rank found."""
        finite_loss = True
        with watch(self.source.model, "") as teacher, watch(self.engine.module.model, "") as student:
            for number, batch in enumerate(batches):
                enter("diagnosis")
                micro_batch = to_device(batch, self.device)
                losses, _ = self.engine(micro_batch, self.source.targets(micro_batch))
                counts = put_on(self.device, self.objectives.counts_of([batch]))
                loss_sum = self.objectives.weighted(losses, self.objectives.tokens_per(counts), batch.step)
                finite_loss = finite_loss and math.isfinite(float(loss_sum.detach()))
                self.engine.backward(loss_sum, scale_wrt_gas=False)
                if number + 1 < len(batches):  # at the last one a step would throw the gradients away
                    self.engine.step()
            parameter = self.bad_gradient()
        return by_rank(gather(first_non_finite(teacher, student, finite_loss, parameter)))
