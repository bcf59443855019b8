"""One regression for all that reads a norm: q, k and v, or gate and up.

Behind the first sublayer that was cut, the student's norm no longer puts out what the teacher's does. With x̂_T and x̂_S
what the two put out, the map that brings the student's nearest to the teacher's is

    A = argmin ‖x̂_T Aᵀ − x̂_T‖² + ‖x̂_S Aᵀ − x̂_T‖² + λ‖A − I‖²

and W A is what ridge regression gives for every W that reads the norm: the regression of W x̂_T has the same inputs and
the same λ whatever W is. So one solution of the size of the stream serves all of them.

D what the teacher's norm puts out · H what the student's does
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kdscale.families import TensorSpec
from kdscale.families.linear_maps import READS
from kdscale.prune.compensation.one_stream import compensates
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.slicing import NORM_BEFORE, Slicer

# The first token of a document stands for so many in a regression: most heads look at it when they look at nothing, so
# all others read an error in its keys and values.
_FIRST_COUNTS_AS = 32.0
RIDGE = 0.1  # of prune.ridge_lambda: what a norm puts out has one size, and fewer inputs than a writer


def readers_of(component: str, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """The roles among `specs` (by role) that read the norm before `component`, each [outputs, hidden] on disk.

    Experts are no readers: each has tokens of its own. None where the family has no such norm.
    """
    if NORM_BEFORE[component] not in specs:
        return
    for role, spec in specs.items():
        reads = spec.component == component and READS.get(role, ("", ""))[1] == "hidden"
        if reads and not spec.of_experts and spec.axes[-1] == "hidden":
            yield role


def refitted_readers(slicer: Slicer, position: int) -> dict[str, list[str]]:
    """The readers that `two_stream` refits in the student's layer `position`, by the role of the norm that they read.

    None where the hidden axis is cut, or where the plan has no projection that is compensated.
    """
    plan = slicer.plan
    if plan.methods.compensate != "two_stream" or slicer.cuts("hidden") or not compensates(plan, slicer):
        return {}
    specs = {tensor.spec.role: tensor.spec for tensor in slicer.layer(position) if not tensor.spec.of_experts}
    found = {norm: list(readers_of(component, specs)) for component, norm in NORM_BEFORE.items()}
    return {norm: roles for norm, roles in found.items() if roles}


def is_refitted_reader(slicer: Slicer, spec: TensorSpec, position: int | None) -> bool:
    """Whether `two_stream` refits a tensor of the student's layer `position` as one that reads the stream."""
    if position is None or spec.of_experts:
        return False
    return any(spec.role in roles for roles in refitted_readers(slicer, position).values())


def mapped(weight: Tensor, map_DH: Tensor) -> Tensor:
    """The weight of a reader in the student, fp32: W A."""
    out: Tensor = weight.float() @ map_DH
    return out


class ReaderMap:
    """Sums for the map A [D, H]; `start_DH` is where the ridge keeps it (the identity where the stream is not cut)."""

    def __init__(self, start_DH: Tensor):
        self._sums = TargetSums(start_DH)

    def add(self, seen: Tensor, meant: Tensor) -> None:
        """Count tokens: what the student's norm puts out [..., H] and what the teacher's does [..., D]."""
        self._sums.add(seen, meant)

    def solve(self, ridge: float, what: str) -> Tensor:
        """A [D, H], fp32, over the tokens of all ranks. Raises SelfCheckError, naming `what`, when it is not finite."""
        self._sums.reduce()
        return self._sums.solve(ridge, what)


def token_weights(positions_BS: Tensor, device: torch.device) -> Tensor:
    """[B, S, 1]: what a token's equations are multiplied by."""
    return torch.where(positions_BS == 0, _FIRST_COUNTS_AS**0.5, 1.0).to(device)[..., None]


def module_path(spec: TensorSpec, prefix: str) -> str:
    """The path, in its layer, of the module that holds a tensor; `prefix` as `Family.layer_prefix` gives it."""
    return spec.parameter.removeprefix(prefix).removesuffix(".weight")
