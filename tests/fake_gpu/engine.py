"""What a training asks of DeepSpeed's engine, without DeepSpeed: one process, fp32, ZeRO stage 0."""

from __future__ import annotations

from typing import Any

import torch

from kdscale.config.root import Config
from kdscale.distill.optimizer import GuardedAdamW, make_optimizer
from kdscale.distill.step import StudentModule


class PlainEngine:
    """`backward` adds up gradients; every `accumulation`-th `step` is one of the optimiser."""

    def __init__(self, module: StudentModule, optimizer: GuardedAdamW, accumulation: int):
        self.module, self.optimizer = module, optimizer
        self._accumulation, self._micro_steps = accumulation, 0

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self._micro_steps += 1
        if self._micro_steps % self._accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Any:
        return self.optimizer._global_grad_norm

    def zero_optimization_stage(self) -> int:
        return 0


def make_plain_engine(cfg: Config, student: StudentModule, *_: Any) -> PlainEngine:
    """In the place of distill.engine.make_engine."""
    settings = cfg.distill
    optimizer = make_optimizer(student, settings.optimizer, stage=0)
    assert isinstance(optimizer, GuardedAdamW)
    return PlainEngine(student, optimizer, settings.global_batch // settings.micro_batch)
