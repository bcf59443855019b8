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
from kdscale.models.layer_pass import add_product
from kdscale.runtime.ranks import all_reduce_sum, in_group

_REMOVED_BLOCK = 1024  # rows of G_RK that are in fp64 at a time


class RidgeSums:
    """What the regression of one linear layer needs to know of its input.

    G_KK and G_RK, summed in fp32 in place; or, while there are no more tokens than kept inputs, the tokens themselves,
    which are fewer numbers and make the solution cheaper.
    """

    def __init__(self, kept: Sequence[int], inputs: int, device: torch.device):
        removed = sorted(set(range(inputs)) - set(kept))
        self.kept = torch.tensor(list(kept), device=device)
        self.removed = torch.tensor(removed, device=device, dtype=torch.long)
        self._rows: list[Tensor] = []
        self._gram_KK: Tensor | None = None
        self._gram_RK: Tensor | None = None

    @classmethod
    def of_gram(cls, kept: Sequence[int], gram_UU: Tensor) -> RidgeSums:
        """The sums from Σ xᵀx over all inputs, for several choices of `kept` on one pass."""
        sums = cls(kept, len(gram_UU), gram_UU.device)
        sums._gram_KK = gram_UU[sums.kept][:, sums.kept]
        sums._gram_RK = gram_UU[sums.removed][:, sums.kept]
        return sums

    def add(self, x: Tensor) -> None:
        """Count a batch of what the layer reads, `x`: [..., U]."""
        self._rows.append(x.detach().flatten(0, -2))
        if self._gram_KK is not None or sum(map(len, self._rows)) > len(self.kept):
            self._fold()

    def reduce(self) -> None:
        """Sum over all ranks; each then has what one process would have from all their tokens."""
        if in_group():
            gram_KK, gram_RK = self._fold()
            all_reduce_sum(gram_KK)
            all_reduce_sum(gram_RK)

    def solve(self, weight_DU: Tensor, ridge: float, what: str) -> Tensor:
        """The compensated weight [D, K] in fp32; the sums are used up. Raises SelfCheckError, naming `what`.

        At its peak, from Gram matrices: G_KK in fp64 and the [D, K] right-hand side in fp64, beside G_RK and what was
        passed in.
        """
        moved_DK = (
            self._moved_from_grams(weight_DU, ridge) if self._gram_KK is not None else self._moved(weight_DU, ridge)
        )
        if moved_DK is None:  # a layer that never fired leaves nothing to regress on: the sliced weight is the answer
            return weight_DU[:, self.kept].float()
        return _checked(moved_DK.add_(weight_DU[:, self.kept]).float(), what)

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Turn rows into sums: G_KK, G_RK."""
        if self._gram_KK is None or self._gram_RK is None:
            kept, removed = len(self.kept), len(self.removed)
            self._gram_KK = torch.zeros(kept, kept, device=self.kept.device)
            self._gram_RK = torch.zeros(removed, kept, device=self.kept.device)
        for x_NU in self._rows:
            x_NK = x_NU[:, self.kept]
            add_product(self._gram_KK, x_NK, x_NK)
            add_product(self._gram_RK, x_NU[:, self.removed], x_NK)
        self._rows.clear()
        return self._gram_KK, self._gram_RK

    def _moved_from_grams(self, weight_DU: Tensor, ridge: float) -> Tensor | None:
        """W_R G_RK (G_KK + λI)⁻¹ in fp64; None when G_KK is zero."""
        assert self._gram_KK is not None and self._gram_RK is not None
        gram_KK, gram_RK = self._gram_KK.double(), self._gram_RK
        self._gram_KK = None
        penalty = ridge * gram_KK.diagonal().mean()
        if float(penalty) == 0.0:
            return None
        gram_KK.diagonal().add_(penalty)
        moved_DK = gram_KK.new_zeros(len(weight_DU), len(self.kept))
        for begin in range(0, len(self.removed), _REMOVED_BLOCK):
            block = slice(begin, begin + _REMOVED_BLOCK)
            moved_DK.addmm_(weight_DU[:, self.removed[block]].double(), gram_RK[block].double())
        self._gram_RK = None
        return solve_in_place(gram_KK, moved_DK)

    def _moved(self, weight_DU: Tensor, ridge: float) -> Tensor | None:
        """The same from the tokens: X_Rᵀ X_K (X_Kᵀ X_K + λI)⁻¹ = X_Rᵀ (X_K X_Kᵀ + λI)⁻¹ X_K, N × N instead of K × K."""
        x_NU = torch.cat(self._rows)
        self._rows.clear()
        x_NK = x_NU[:, self.kept].double()
        gram_NN = x_NK @ x_NK.T
        penalty = ridge * gram_NN.trace() / len(self.kept)
        if float(penalty) == 0.0:
            return None
        gram_NN.diagonal().add_(penalty)
        dropped_DN = weight_DU[:, self.removed].double() @ x_NU[:, self.removed].double().T
        return solve_in_place(gram_NN, dropped_DN) @ x_NK


def solve_in_place(gram_KK: Tensor, right_DK: Tensor) -> Tensor:
    """right · gram⁻¹ for a symmetric positive definite `gram`; both are overwritten and the second is returned.

    LAPACK works on columns: the transposed views of row-major matrices are what it can factor and solve where they are.
    On CUDA the factorisation keeps a copy of its own. Not positive definite gives NaN.
    """
    factor_KK, info = gram_KK.mT, torch.zeros((), dtype=torch.int32, device=gram_KK.device)
    torch.linalg.cholesky_ex(factor_KK, out=(factor_KK, info))
    if int(info):
        return right_DK.fill_(torch.nan)
    solution_KD = right_DK.mT
    torch.linalg.solve_triangular(factor_KK, solution_KD, upper=False, out=solution_KD)
    torch.linalg.solve_triangular(factor_KK.mT, solution_KD, upper=True, out=solution_KD)
    return right_DK


class TargetSums:
    """A regression of any target T on inputs X: XᵀX and XᵀT in fp32, summed in place.

    The weight minimises ‖x Wᵀ − t‖² + λ‖W − W_0‖², with λ a fraction of the mean diagonal of XᵀX. In the residual
    E = T − X W_0ᵀ it is W = W_0 + EᵀX(XᵀX + λI)⁻¹. While there are no more rows than inputs they are kept as they are,
    and W = W_0 + Eᵀ(XXᵀ + λI)⁻¹X.
    """

    def __init__(self, prior_DK: Tensor):
        """Start with no rows; `prior_DK` is W_0."""
        self._prior_DK = prior_DK.float()
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._count = 0
        self._gram_KK: Tensor | None = None
        self._cross_DK: Tensor | None = None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Count a batch of inputs `x` [..., K] and of what the layer is to put out for them, `target` [..., D]."""
        x_NK, target_ND = x.detach().flatten(0, -2), target.detach().flatten(0, -2)
        self._rows.append((x_NK, target_ND.float() - x_NK.float() @ self._prior_DK.T))
        self._count += len(x_NK)
        if self._count > self._prior_DK.shape[1]:
            self._fold()

    def reduce(self) -> None:
        """Sum over all ranks."""
        if in_group():
            gram_KK, cross_DK = self._fold()
            all_reduce_sum(gram_KK)
            all_reduce_sum(cross_DK)

    def solve(self, ridge: float, what: str) -> Tensor:
        """W [D, K] in fp32; the sums are used up. Raises SelfCheckError, naming `what`, when it is not finite."""
        if self._gram_KK is None and self._rows:
            x_NK = torch.cat([x for x, _ in self._rows]).double()
            left_DN = torch.cat([error for _, error in self._rows]).double().T.contiguous()
            moved_DK = self._solved(x_NK @ x_NK.T, left_DN, ridge, x_NK)
        else:
            gram_KK, cross_DK = self._fold()
            self._gram_KK = self._cross_DK = None
            moved_DK = self._solved(gram_KK.double(), cross_DK.double(), ridge, None)
        return _checked((self._prior_DK + moved_DK).float(), what)

    def _solved(self, gram: Tensor, left: Tensor, ridge: float, x_NK: Tensor | None) -> Tensor:
        penalty = ridge * gram.trace() / self._prior_DK.shape[1]
        if float(penalty) == 0.0:  # nothing to regress on: the prior is the answer
            return torch.zeros_like(self._prior_DK)
        gram.diagonal().add_(penalty)
        moved = solve_in_place(gram, left)
        return moved if x_NK is None else moved @ x_NK

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Turn rows into sums: XᵀX, EᵀX."""
        outputs, inputs = self._prior_DK.shape
        if self._gram_KK is None or self._cross_DK is None:
            self._gram_KK = self._prior_DK.new_zeros(inputs, inputs)
            self._cross_DK = self._prior_DK.new_zeros(outputs, inputs)
        for x_NK, error_ND in self._rows:
            add_product(self._gram_KK, x_NK, x_NK)
            add_product(self._cross_DK, error_ND, x_NK)
        self._rows.clear()
        return self._gram_KK, self._cross_DK


def _checked(weight_DK: Tensor, what: str) -> Tensor:
    """`weight_DK`, or SelfCheckError when it has NaN or infinite values."""
    if not torch.isfinite(weight_DK).all():
        raise SelfCheckError(
            f"compensation of {what} is not finite", hint="raise prune.ridge_lambda or set prune.compensate=none"
        )
    return weight_DK
