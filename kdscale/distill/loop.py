"""The training loop: step, count, log, validate, save; nothing in it reads the clock except to report."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdscale.config import DistillConfig
from kdscale.data.loader import Batch, LoaderState, PackedLoader
from kdscale.dist import all_reduce_sum, world_size
from kdscale.distill import state
from kdscale.distill.guard import SkipGuard, show_documents, stop_error, watch
from kdscale.distill.schedules import cosine_lr
from kdscale.distill.signals import StopRequest, watch_signals
from kdscale.distill.step import PHASES, Clock, to_device, train_step
from kdscale.distill.validate import Validator
from kdscale.errors import Interrupted
from kdscale.losses import TERMS, per_token
from kdscale.metrics import MetricsLog
from kdscale.progress import Bar, Reporter
from kdscale.teacher import Teacher

_SIGNALS = (2, 15)  # SIGINT, SIGTERM


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
    run_dir: Path
    fingerprint: dict[str, Any]
    save_engine: Callable[[Path], None]  # this rank's share of the engine's state, a collective call
    bad_gradient: Callable[[], str]  # the parameter whose gradient is not finite, or ""
    metrics: MetricsLog | None  # rank 0 only
    reporter: Reporter

    def __post_init__(self) -> None:
        self.guard = SkipGuard(self.cfg.guard.max_skipped_in_a_row)

    @property
    def step_tokens(self) -> int:
        return self.cfg.global_batch * self.cfg.seq_len

    def restore(self, path: Path) -> LoaderState:
        """This rank's own state from a checkpoint folder; the engine's was loaded before."""
        saved = state.read_rank_state(path)
        self.guard.restore(saved["guard"])
        state.restore_rng(saved["rng"])
        return LoaderState.from_json(saved["loader"])

    def train(self, start: LoaderState) -> None:
        """From optimiser step `start.step` to the end. Raises Interrupted or TrainingError."""
        done = start.step * self.step_tokens
        total = self.steps * self.step_tokens
        with watch_signals() as stop, self.reporter.bar("distil", total, "tok", done) as bar:
            if start.step == 0:
                self._validate(0)
            for step, batches, after in self._remaining(start):
                signum = self._one_step(step, batches, stop, bar)
                finished = after.step
                if finished % self.cfg.validate_every == 0 or finished == self.steps:
                    self._validate(finished)
                if finished % self.cfg.checkpoint_every == 0 or finished == self.steps or signum:
                    self._save(after)
                if signum and finished < self.steps:
                    raise Interrupted(signum, f"after training step {finished}, which is saved")

    def _remaining(self, start: LoaderState) -> Any:
        """Steps still to be done. A step's batches are made one step early, so that a served teacher can begin."""
        stream = self.loader.batches(start)
        ahead: deque[tuple[list[Batch], LoaderState]] = deque()
        for step in range(start.step, self.steps):
            self.clock = Clock(self.device)
            while len(ahead) < min(2, self.steps - step):
                ahead.append(self._announced(next(stream)))
            yield step, *ahead.popleft()

    def _announced(self, item: tuple[list[Batch], LoaderState]) -> tuple[list[Batch], LoaderState]:
        for batch in item[0]:
            micro = to_device(batch, torch.device("cpu"))
            self.teacher.expect(micro.input_ids_BS, micro.position_ids_BS, micro.rows_N)
        return item

    def _one_step(self, step: int, batches: Sequence[Batch], stop: StopRequest, bar: Bar) -> int:
        """Train, log, guard; returns the signal that some rank got (0: none)."""
        began = time.perf_counter()
        lr = cosine_lr(step, steps=self.steps, lr=self.cfg.optimizer.lr, min_lr=self.cfg.optimizer.min_lr,
                       warmup_steps=self.cfg.optimizer.warmup_steps)  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        totals = train_step(self.engine, self.teacher, batches, self.device, self.clock)
        flags = torch.tensor([float(stop.signum == signum) for signum in _SIGNALS], dtype=torch.float64)
        summed = all_reduce_sum(torch.cat([totals, flags.to(self.device)]))
        grad_norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64, device=self.device)
        *sums, sigint, sigterm, norm = torch.cat([summed, grad_norm.reshape(1)]).tolist()  # the one host sync
        skipped = bool(self.engine.optimizer.overflow)
        self.guard.record(skipped)
        means = per_token(sums[1:], max(sums[0], 1.0))
        self._log_step(step, lr, means, norm, sums[0], skipped, batches, time.perf_counter() - began)
        bar.advance(self.step_tokens, f"loss {means['loss']:.4f}")
        if skipped:
            self.reporter.say(
                f"step {step + 1}: loss or gradient not finite, step skipped (documents {show_documents(batches)})"
            )
            if self.guard.exhausted:
                raise stop_error(step + 1, self.guard, batches, self._diagnose(batches))
        return _SIGNALS[1] if sigterm else _SIGNALS[0] if sigint else 0

    def _log_step(
        self,
        step: int,
        lr: float,
        means: dict[str, float],
        grad_norm: float,
        tokens: float,
        skipped: bool,
        batches: Sequence[Batch],
        seconds: float,
    ) -> None:
        if self.metrics is None:
            return
        values: dict[str, float | int | str] = {
            "tokens": (step + 1) * self.step_tokens,
            "labels": int(tokens),
            "lr": lr,
            **{name: means[name] for name in TERMS},
            "grad_norm": grad_norm,
            "tokens_per_second": self.step_tokens / seconds,
            **{f"seconds_{phase}": value for phase, value in zip(PHASES, self._phase_seconds(), strict=True)},
            "skipped": int(skipped),
            "skipped_total": self.guard.total,
        }
        if skipped:  # JSON has no NaN
            values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
            values["documents"] = show_documents(batches)
        self.metrics.write("train", step + 1, **values)

    def _phase_seconds(self) -> list[float]:
        return list(self.clock.seconds().values())

    def _validate(self, step: int) -> None:
        found = self.validator.run(self.engine)
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        if self.metrics is not None:
            labels = int(finite.pop("tokens"))
            self.metrics.write("validation", step, tokens=step * self.step_tokens, labels=labels, **finite)
        self.reporter.say(
            f"step {step}/{self.steps}: held-out loss {found['loss']:.4f} · perplexity {found['perplexity']:.2f} · "
            f"top-1 agreement {100 * found['top1_agree']:.1f} %"
        )

    def _save(self, after: LoaderState) -> None:
        state.save(
            self.run_dir / "checkpoints",
            after.step,
            write=self.save_engine,
            state={"loader": after.to_json(), "guard": self.guard.state()},
            fingerprint=self.fingerprint,
            keep=self.cfg.keep_checkpoints,
        )

    def _diagnose(self, batches: Sequence[Batch]) -> list[str]:
        """Run the batch again with hooks on every module of teacher and student; what every rank found."""
        bad_loss = False
        with watch(self.teacher.model, "") as teacher, watch(self.engine.module.model, "") as student:
            for number, batch in enumerate(batches):
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
        return list(dict.fromkeys(everywhere))
