"""AdamW over the student's parameters: matrices decayed, norms and biases not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdscale.config.distill.optimizer import OptimizerConfig
from kdscale.distill.parallel.zero3_loading import full_shape


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips and skips as DeepSpeed's ZeRO optimisers do; stage 0 has neither norm nor check of its own.

    `group`: the tensor-parallel ranks, which hold slices of the parameters marked `tensor_model_parallel` and copies of
    the others.
    """

    overflow = False  # whether the last step was skipped
    _global_grad_norm: torch.Tensor | float = 0.0

    def __init__(self, groups: Any, max_norm: float, group: Any = None, **settings: Any):
        super().__init__(groups, **settings)
        self._max_norm, self._group = max_norm, group

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip and update; without a finite gradient norm nothing changes. `closure` is not called.

        What no loss depends on has a gradient of zero, as in the ZeRO optimisers: Adam counts its steps too.
        """
        trained = [p for group in self.param_groups for p in group["params"]]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in trained]
        norm = self._norm(trained)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        divisor = ((norm + 1e-6) / self._max_norm).clamp(min=1.0)
        for grad in grads:
            grad.div_(divisor)
        super().step(closure)

    def _norm(self, trained: list[Any]) -> torch.Tensor:
        if self._group is None:
            return torch.nn.utils.get_total_norm([p.grad for p in trained])
        sliced, copied = ([p.grad for p in trained if p.tensor_model_parallel == mark] for mark in (True, False))
        square = torch.nn.utils.get_total_norm(sliced).square()
        torch.distributed.all_reduce(square, group=self._group)
        return (square + torch.nn.utils.get_total_norm(copied).square()).sqrt()


def make_optimizer(
    student: nn.Module, settings: OptimizerConfig, stage: int, group: Any = None
) -> torch.optim.Optimizer:
    """AdamW over the student's parameters; at ZeRO stage 0 one that clips and skips by itself.

    torch's fused AdamW serves offloaded states too, so that nothing is compiled at start. `group`: the tensor-parallel
    ranks, if any.
    """
    named = [item for item in student.named_parameters() if item[1].requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if len(full_shape(p)) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if len(full_shape(p)) < 2], "weight_decay": 0.0},  # norms and biases
    ]
    groups = [group for group in groups if group["params"]]  # adapters have no biases, and ZeRO wants no empty group
    adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
    if stage == 0:
        return GuardedAdamW(groups, settings.gradient_clipping, group, **adam)
    return torch.optim.AdamW(groups, **adam)
