"""AdamW over the student's parameters: matrices decayed, norms and biases not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdscale.config_distill import OptimizerConfig
from kdscale.distill.zero3 import whole_shape


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips and skips as DeepSpeed's ZeRO optimisers do; stage 0 has neither norm nor check of its own."""

    overflow = False
    _global_grad_norm: torch.Tensor | float = 0.0

    def __init__(self, groups: Any, max_norm: float, **settings: Any):
        super().__init__(groups, **settings)
        self._max_norm = max_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        share = ((norm + 1e-6) / self._max_norm).clamp(min=1.0)
        for grad in grads:
            grad.div_(share)
        super().step(closure)


def make_optimizer(student: nn.Module, settings: OptimizerConfig, stage: int) -> torch.optim.Optimizer:
    """torch's fused AdamW: also for offloaded states, so that nothing is compiled at start."""
    named = [item for item in student.named_parameters() if item[1].requires_grad]
    groups = [
        {"params": [p for _, p in named if len(whole_shape(p)) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if len(whole_shape(p)) < 2], "weight_decay": 0.0},  # norms and biases
    ]
    adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
    if stage == 0:
        return GuardedAdamW(groups, settings.gradient_clipping, **adam)
    return torch.optim.AdamW(groups, **adam)
