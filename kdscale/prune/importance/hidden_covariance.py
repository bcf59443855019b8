"""Covariance of the residual stream, and its principal components."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdscale.runtime.ranks import all_reduce_sum


class ResidualCovariance:
    """Σ over tokens and norms of x̂x̂ᵀ, x̂ what a norm reads divided by its root mean square; fp32 sums on the device.

    Divided, because that is what every reader sees, and because the few tokens with massive activations (10³ times the
    others on Llama-like models) would be all that a plain covariance is about.
    """

    def __init__(self, hidden: int, device: torch.device):
        self.sum_DD = torch.zeros(hidden, hidden, device=device)

    def attach(self, norms: list[nn.Module]) -> list[Any]:
        return [norm.register_forward_pre_hook(lambda _module, args: self._see(args[0])) for norm in norms]

    def _see(self, x_BSD: Tensor) -> None:
        x_ND = x_BSD.detach().flatten(0, -2).float()
        x_ND = x_ND * x_ND.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self.sum_DD.addmm_(x_ND.T, x_ND)

    def close(self) -> Tensor:
        """What was seen since the last call, by all ranks: [D, D], fp32 on the CPU."""
        total_DD = all_reduce_sum(self.sum_DD).cpu()
        self.sum_DD = torch.zeros_like(self.sum_DD)
        return total_DD


def components(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(energy [D], falling; R [D, D], fp32). The sign of a row is such that its largest entry is positive."""
    energy_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    rows_DD = vectors_DD.T.flip(0)
    largest = rows_DD.abs().argmax(1, keepdim=True)
    rows_DD = rows_DD * rows_DD.gather(1, largest).sign()
    return energy_D.flip(0).clamp_min(0), rows_DD.float().contiguous()
