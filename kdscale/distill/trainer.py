"""The training loop: step, count, log, validate, save; nothing in it reads the clock except to report."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kdscale.config.distill import DistillConfig
from kdscale.data.batches import Batch, LoaderState, PackedLoader
from kdscale.distill.checkpoint.saver import Saver
from kdscale.distill.non_finite import SkipGuard, by_rank, show_documents, stop_error, watch
from kdscale.distill.objectives.token_divergence import TERMS, per_token
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.schedule import cosine_lr, seed_step
from kdscale.distill.step import to_device, train_step
from kdscale.distill.telemetry.observer import Observer, StepFacts
from kdscale.distill.validate import Validator
from kdscale.errors import Interrupted
from kdscale.runtime.device import peak_memory
from kdscale.runtime.progress import Bar, Reporter
from kdscale.runtime.ranks import all_reduce_sum, rank, world_size
from kdscale.runtime.signals import StopRequest, watch_signals
from kdscale.teacher.source import Teacher
from kdscale_launch.watchdog import at_step, enter

_SIGNALS = (2, 15)  # SIGINT, SIGTERM


@dataclass(frozen=True)
class _StepSums:
    """A step's figures over all ranks; `memory` has a value a rank, `micro_sums` one a micro-batch of any rank."""

    tokens: float
    terms: list[float]
    flags: list[float]
    memory: list[float]
    micro_sums: list[float]
    grad_norm: float


@dataclass
class Trainer:
    """Everything one rank needs. `engine` is a DeepSpeed engine around step.StudentModule."""

    cfg: DistillConfig
    engine: Any
    teacher: Teacher
    loader: PackedLoader
    validator: Validator
    device: torch.device
    steps: int
    saver: Saver
    seed: int
    bad_gradient: Callable[[], str]  # the parameter whose gradient is not finite, or ""
    observer: Observer
    reporter: Reporter

    def __post_init__(self) -> None:
        self.guard = SkipGuard(self.cfg.guard.max_skipped_in_a_row)
        self._mesh = Mesh.of(self.cfg)

    @property
    def step_tokens(self) -> int:
        return self.cfg.global_batch * self.cfg.seq_len

    def restore(self, saved: dict[str, Any]) -> LoaderState:
        """What a checkpoint's manifest says of the training; weights and optimiser were loaded before."""
        self.guard.restore(saved["guard"])
        return LoaderState.from_json(saved["loader"])

    def train(self, start: LoaderState) -> None:
        """From optimiser step `start.step` to the end. Raises Interrupted or TrainingError."""
        done = start.step * self.step_tokens
        total = self.steps * self.step_tokens
        with self._session("distil", total, done) as (stop, bar):
            if start.step == 0:
                self._validate(0)
            for step, batches, after in self._remaining(start, self.steps):
                signum = self._one_step(step, batches, stop, bar)
                self.saver.poll()
                finished = after.step
                if finished % self.cfg.validate_every == 0 or finished == self.steps:
                    self._validate(finished)
                due = self.guard.checkpoint_due(finished % self.cfg.checkpoint_every == 0)
                if due or finished == self.steps or signum:
                    self._save(after, wait=finished == self.steps or bool(signum))
                if signum and finished < self.steps:
                    raise Interrupted(signum, f"after training step {finished}, which is saved")

    def advance(self, start: LoaderState, until: int) -> None:
        """Train on to step `until` without validating or saving; the steps are those of `train`."""
        with self._session("train on", until * self.step_tokens, start.step * self.step_tokens) as (stop, bar):
            for step, batches, _ in self._remaining(start, until):
                if signum := self._one_step(step, batches, stop, bar):
                    raise Interrupted(signum)

    @contextmanager
    def _session(self, title: str, total: int, done: int) -> Iterator[tuple[StopRequest, Bar]]:
        with watch_signals() as stop, self.observer.watching(), self.reporter.bar(title, total, "tok", done) as bar:
            yield stop, bar

    def _remaining(self, start: LoaderState, until: int) -> Any:
        """Steps still to be done. A step's batches are made one step early, so that a served teacher can begin."""
        stream = self.loader.batches(start)
        ahead: deque[tuple[list[Batch], LoaderState]] = deque()
        for step in range(start.step, until):
            enter("data")
            self.observer.begin(step)
            while len(ahead) < min(2, until - step):
                ahead.append(self._announced(next(stream)))
            yield step, *ahead.popleft()

    def _announced(self, item: tuple[list[Batch], LoaderState]) -> tuple[list[Batch], LoaderState]:
        for batch in item[0]:
            micro = to_device(batch, torch.device("cpu"))
            self.teacher.expect(micro.input_ids_BS, micro.position_ids_BS, micro.rows_N)
        return item

    def _one_step(self, step: int, batches: Sequence[Batch], stop: StopRequest, bar: Bar) -> int:
        """Train, log, guard; returns the signal that some rank got (0: none)."""
        seed_step(self.seed, step, rank() // self._mesh.tensor)  # tensor ranks drop the same hidden units
        at_step(step + 1, lambda: f"documents {show_documents(batches)}")
        lr = cosine_lr(step, steps=self.steps, lr=self.cfg.optimizer.lr, min_lr=self.cfg.optimizer.min_lr,
                       warmup_steps=self.cfg.optimizer.warmup_steps)  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        totals = train_step(self.engine, self.teacher, batches, self.device, self.observer.clock)
        enter("collective")
        flags = [float(stop.signum == signum) for signum in _SIGNALS]
        sums = self._over_ranks(totals, flags)
        skipped = bool(self.engine.optimizer.overflow)
        self.guard.record(skipped)
        facts = StepFacts(
            step=step,
            lr=lr,
            means=per_token(sums.terms, max(sums.tokens, 1.0)),
            grad_norm=sums.grad_norm,
            labels=int(sums.tokens),
            skipped=skipped,
            skipped_total=self.guard.total,
            memory=sums.memory,
            micro_sums=sums.micro_sums,
        )
        bar.advance(self.step_tokens, self.observer.end(facts))
        if skipped and self.guard.exhausted:
            raise stop_error(step + 1, self.guard, batches, self._diagnose(batches))
        sigint, sigterm = sums.flags
        return _SIGNALS[1] if sigterm else _SIGNALS[0] if sigint else 0

    def _over_ranks(self, totals: torch.Tensor, flags: Sequence[float]) -> _StepSums:
        """Sum over ranks and bring to the host: the step's one collective of its own and its one host sync.

        What is each rank's own goes along as a row a rank, all others zero: its peak memory and its micro-batches.
        Tensor-parallel ranks have the same batch and the same sums, which count once.
        """
        terms, world, tensor = 1 + len(TERMS), world_size(), self._mesh.tensor
        own = torch.cat([totals.new_tensor([peak_memory(self.device)]), totals[terms:]])
        rows = own.new_zeros(world, own.numel())
        rows[rank()] = own
        summed = all_reduce_sum(torch.cat([totals[:terms] / tensor, totals.new_tensor(flags), rows.reshape(-1)]))
        grad_norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64, device=self.device)
        *values, norm = torch.cat([summed, grad_norm.reshape(1)]).tolist()
        head = terms + len(flags)
        each = [values[i : i + own.numel()] for i in range(head, len(values), own.numel())]
        return _StepSums(
            tokens=values[0],
            terms=values[1:terms],
            flags=values[terms:head],
            memory=[row[0] for row in each],
            micro_sums=self._mesh.by_data([row[1:] for row in each]),
            grad_norm=norm,
        )

    def _validate(self, step: int) -> None:
        found = self.validator.run(self.engine)
        self.observer.validated(step, found)
        self.reporter.say(
            f"step {step}/{self.steps}: held-out loss {found['loss']:.4f} · perplexity {found['perplexity']:.2f} · "
            f"top-1 agreement {100 * found['top1_agree']:.1f} %"
        )

    def _save(self, after: LoaderState, wait: bool) -> None:
        enter("checkpoint")
        self.saver.save(after.step, {"state": {"loader": after.to_json(), "guard": self.guard.state()}}, wait)

    def _diagnose(self, batches: Sequence[Batch]) -> list[str]:
        """Run the batch again with hooks on every module of teacher and student; what every rank found."""
        bad_loss = False
        with watch(self.teacher.model, "") as teacher, watch(self.engine.module.model, "") as student:
            for number, batch in enumerate(batches):
                enter("diagnosis")
                micro = to_device(batch, self.device)
                targets = self.teacher.targets(micro.input_ids_BS, micro.position_ids_BS, micro.rows_N)
                loss_sum, _ = self.engine(micro, targets)
                bad_loss = bad_loss or not math.isfinite(float(loss_sum.detach()))
                self.engine.backward(loss_sum, scale_wrt_gas=False)
                if number + 1 < len(batches):  # at the last one a step would throw the gradients away
                    self.engine.step()
            parameter = self.bad_gradient()
        found = ""
        if teacher.forward:
            found = f"first non-finite value: output of the teacher's {teacher.forward}"
        elif student.forward:
            found = f"first non-finite value: output of the student's {student.forward}"
        elif bad_loss:
            found = "every layer's output is finite, the loss is not"
        elif student.backward:
            found = f"forward is finite; first non-finite gradient: output of the student's {student.backward}"
        elif parameter:
            found = f"forward is finite; first non-finite gradient: parameter {parameter}"
        everywhere: list[Any] = [None] * world_size()
        dist.all_gather_object(everywhere, found)
        return by_rank(everywhere)
