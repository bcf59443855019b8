"""Closed-form repair of what slicing removes: ridge regression of a sublayer's output on the units that stay.

A sliced down_proj (or o_proj) sees only the kept inputs. The new weight W' minimises, over the calibration tokens,

    ‖x W' ᵀ(kept) − x Wᵀ‖² + λ‖W' − W_kept‖²

so the kept units take over what the dropped ones did as far as they are correlated, and stay where they were as far as
they are not. With G = Σ xᵀx and K, R the kept and the removed units:  W' = W_K + W_R G_RK (G_KK + λI)⁻¹, with λ a
fraction (`ridge_lambda`) of G_KK's mean diagonal. Linear reconstruction after pruning: He et al., arXiv 1707.06168.
Here the inputs are the teacher's (`RidgeSums`); with `TargetSums` they are the student's own and the target is given.

N tokens · D outputs · U inputs · K kept inputs · R removed inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale.errors import SelfCheckError


class RidgeSums:
    """G_KK and G_RK of one linear layer's input, in fp32 (rows of a batch) summed in place."""

    def __init__(self, kept: Sequence[int], inputs: int, device: torch.device):
        removed = sorted(set(range(inputs)) - set(kept))
        self.kept = torch.tensor(list(kept), device=device)
        self.removed = torch.tensor(removed, device=device, dtype=torch.long)
        self.gram_KK = torch.zeros(len(kept), len(kept), device=device)
        self.gram_RK = torch.zeros(len(removed), len(kept), device=device)

    def add(self, x: Tensor) -> None:
        """`x`: [..., U], what the layer reads."""
        x_NU = x.detach().flatten(0, -2).float()
        x_NK, x_NR = x_NU[:, self.kept], x_NU[:, self.removed]
        self.gram_KK.addmm_(x_NK.T, x_NK)
        self.gram_RK.addmm_(x_NR.T, x_NK)

    def solve(self, weight_DU: Tensor, ridge: float, what: str) -> Tensor:
        """The compensated weight [D, K] in fp32. Raises SelfCheckError, naming `what`, when it is not finite."""
        gram = self.gram_KK.double()
        penalty = ridge * gram.diagonal().mean()
        # A layer that never fired leaves nothing to regress on: the sliced weight is the answer.
        if float(penalty) == 0.0:
            return weight_DU[:, self.kept].float()
        gram.diagonal().add_(penalty)
        moved_DK = weight_DU[:, self.removed].double() @ self.gram_RK.double()
        solved_DK = torch.cholesky_solve(moved_DK.T, torch.linalg.cholesky(gram)).T
        weight_DK = (weight_DU[:, self.kept].double() + solved_DK).float()
        if not torch.isfinite(weight_DK).all():
            raise SelfCheckError(
                f"compensation of {what} is not finite", hint="raise prune.ridge_lambda or set prune.compensate=none"
            )
        return weight_DK


class TargetSums:
    """XᵀX and XᵀT of a regression of any target T on inputs X, in fp32, summed in place.

    The weight minimises ‖x Wᵀ − t‖² + λ‖W − W_0‖², with λ a fraction of the mean diagonal of XᵀX:
    W = W_0 + (TᵀX − W_0 XᵀX)(XᵀX + λI)⁻¹.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.gram_KK = torch.zeros(inputs, inputs, device=device)
        self.cross_KD = torch.zeros(inputs, outputs, device=device)

    def add(self, x: Tensor, target: Tensor) -> None:
        """`x`: [..., K]; `target`: [..., D]."""
        x_NK = x.detach().flatten(0, -2).float()
        self.gram_KK.addmm_(x_NK.T, x_NK)
        self.cross_KD.addmm_(x_NK.T, target.detach().flatten(0, -2).float())

    def solve(self, prior_DK: Tensor, ridge: float, what: str) -> Tensor:
        """The weight [D, K] in fp32, W_0 being `prior_DK`. Raises SelfCheckError, naming `what`, when not finite."""
        gram_KK, prior = self.gram_KK.double(), prior_DK.double()
        left_KD = self.cross_KD.double() - gram_KK @ prior.T
        penalty = ridge * gram_KK.diagonal().mean()
        if float(penalty) == 0.0:
            return prior_DK.float()
        gram_KK.diagonal().add_(penalty)
        weight_DK = (prior + torch.cholesky_solve(left_KD, torch.linalg.cholesky(gram_KK)).T).float()
        if not torch.isfinite(weight_DK).all():
            raise SelfCheckError(
                f"compensation of {what} is not finite", hint="raise prune.ridge_lambda or set prune.compensate=none"
            )
        return weight_DK
