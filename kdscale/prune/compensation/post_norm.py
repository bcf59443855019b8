"""Refitting a projection whose output goes through a norm before it is added to the residual stream (Gemma, OLMo 2).

With z = u Wᵀ and s = rms(z) over the channels, what is added is g ⊙ z / s, and no factor on W changes it: a plain
regression of W cannot make the layer add more. But for given s it is linear in M = diag(g) W, on inputs u / s:

    M = argmin Σ w²‖(u / s) Mᵀ − t‖² + λ‖M − diag(g) W‖²,  W = diag(g)⁻¹ M,  s = rms(u Wᵀ)

is solved in turns with the gain, which has a closed form of its own, channel by channel:

    g_d = Σ w² t_d ẑ_d / Σ w² ẑ_d²,  ẑ = z / s   (and λ of the mean Σ w² ẑ² toward the gain before)

So the gain says how much is added and W in which direction. On Gemma 3 270M two turns do what four do.

B batch · S sequence · N tokens · D outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kdscale.errors import SelfCheckError
from kdscale.families import Family
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.stream_cut import POST_NORM, WRITER
from kdscale.runtime.ranks import all_reduce_sum

# The role of a projection → of the norm behind it.
POST_NORMS = {WRITER[component]: norm for component, norm in POST_NORM.items()}

_TURNS = 2
_LEAST_GAIN = 0.02  # of the mean gain: W is divided by it

# The rows of the regression, batch after batch: (u [..., K], what is to be added [..., D], what the row's error counts
# times [..., 1]); asked for several times.
Rows = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]


def post_norm_path(family: Family, role: str) -> str:
    """The norm between the projection `role` and the residual stream, as a path in a layer; empty: there is none."""
    prefix = f"{family.sites.layers}.{{layer}}."
    names = (t.loads_as or t.name for t in family.data.tensors if t.role == POST_NORMS[role])
    return next((name.removeprefix(prefix).removesuffix(".weight") for name in names), "")


def norm_gain(family: Family, weight_D: Tensor) -> Tensor:
    """What a norm multiplies by, fp32, from its weight on disk."""
    return weight_D.float() + family.data.norm.added


def norm_weight(family: Family, gain_D: Tensor) -> Tensor:
    """The weight on disk of a norm with this gain."""
    return gain_D - family.data.norm.added


def norm_epsilon(norm: Any) -> float:
    """What an RMS norm adds to the mean square."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def refit_through_norm(
    rows: Rows, weight_DK: Tensor, gain_D: Tensor, epsilon: float, ridge: float, what: str
) -> tuple[Tensor, Tensor]:
    """(projection [D, K], gain [D]) in fp32 that add nearest to the targets of `rows`, from those that are there.

    With several ranks each has rows of its own, and all get the weights. Raises SelfCheckError, naming `what`, when
    they are not finite.
    """
    weight_DK = weight_DK.float()
    gain_D = _gain(rows, weight_DK, gain_D.float(), epsilon, ridge)
    for _ in range(_TURNS):
        divisor_D = _away_from_zero(gain_D)
        sums = TargetSums(divisor_D[:, None] * weight_DK)
        for u, target, weight in rows():
            u_NK, weight_N1 = u.flatten(0, -2).float(), weight.flatten(0, -2)
            share_N1 = weight_N1 / root_mean_square(u_NK @ weight_DK.T, epsilon)
            sums.add(u_NK * share_N1, target.flatten(0, -2) * weight_N1)
        sums.reduce()
        weight_DK = sums.solve(ridge, what) / divisor_D[:, None]
        gain_D = _gain(rows, weight_DK, gain_D, epsilon, ridge)
    if not torch.isfinite(gain_D).all():
        raise SelfCheckError(f"the norm behind {what} is not finite", hint="raise prune.ridge_lambda")
    return weight_DK, gain_D


def through_norm(z_ND: Tensor, gain_D: Tensor, epsilon: float) -> Tensor:
    """What an RMS norm with this gain makes of `z_ND`, which may have more dimensions in front."""
    return gain_D * z_ND / root_mean_square(z_ND, epsilon)


def _gain(rows: Rows, weight_DK: Tensor, gain_D: Tensor, epsilon: float, ridge: float) -> Tensor:
    sums_2D = torch.zeros(2, len(gain_D), dtype=torch.float64, device=weight_DK.device)
    for u, target, weight in rows():
        z_ND, weight_N1 = u.flatten(0, -2).float() @ weight_DK.T, weight.flatten(0, -2)
        normed_ND = z_ND / root_mean_square(z_ND, epsilon) * weight_N1
        sums_2D[0] += (normed_ND * (target.flatten(0, -2).float() * weight_N1)).sum(0, dtype=torch.float64)
        sums_2D[1] += normed_ND.square().sum(0, dtype=torch.float64)
    products_D, squares_D = all_reduce_sum(sums_2D)
    penalty = ridge * squares_D.mean()
    if float(penalty) == 0.0:  # nothing was read: the gain is as good as any
        return gain_D
    return ((products_D + penalty * gain_D) / (squares_D + penalty)).float()


def root_mean_square(z_ND: Tensor, epsilon: float) -> Tensor:
    """What an RMS norm divides `z_ND` by: [N, 1]."""
    return z_ND.square().mean(-1, keepdim=True).add(epsilon).sqrt()


def _away_from_zero(gain_D: Tensor) -> Tensor:
    least = _LEAST_GAIN * gain_D.abs().mean().clamp_min(torch.finfo(gain_D.dtype).tiny)
    return torch.where(gain_D.abs() < least, least * torch.where(gain_D < 0, -1.0, 1.0), gain_D)
