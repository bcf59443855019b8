"""Distance of hidden states: each of some layers of the student beside a layer of the teacher.

N rows (valid positions), C rows of a block, H and G student's and teacher's hidden size.

Sources: DistilBERT (arXiv 1910.01108: cosine), TinyBERT (arXiv 1909.10351: squared error through a learned projection),
Minitron (arXiv 2407.14679: hidden states help where depth is cut hard).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdscale.config.distill.layer_objectives import HiddenStatesConfig
from kdscale.config.distill.objective import ModelPair
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.blockwise import Block, block_values, sum_blocks, wide
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets

_SEED = 0  # of a projection that starts from nothing better


class HiddenStates(nn.Module):
    """The objective `hidden_states`: a mean over the matched layers.

    `mse` is the squared error divided by the square of the teacher's hidden state, row by row: it has no unit, and the
    few positions with huge states count like others. The residual stream has one basis in all layers, so one projection
    serves all of them. It starts as the directions that pruning kept, where these are known.
    """

    def __init__(self, settings: HiddenStatesConfig, models: ModelPair):
        super().__init__()
        self._settings = settings
        self.projection = projection_of(models)

    def forward(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(summed loss, sums of hidden_error and hidden_cosine); also without any row."""
        layers = self._settings.layers
        assert layers is not None
        projected = self._projected([student.layers_NH[layer] for layer in layers])
        if batch.rows == 0:
            return torch.stack([own_NG.sum() for own_NG in projected]).sum().float(), projected[0].new_zeros(2).float()
        of_pairs = [
            sum_blocks([own_NG], self._blocks(targets.hidden_NG[layer]))
            for own_NG, layer in zip(projected, layers.values(), strict=True)
        ]
        loss, sums = (torch.stack(part).mean(0) for part in zip(*of_pairs, strict=True))
        return loss, sums[1:].float()

    def _projected(self, layers_NH: list[Tensor]) -> list[Tensor]:
        """In the teacher's width, by one call, which at ZeRO stage 3 gathers the weight once on every rank."""
        if self.projection is None:
            return layers_NH
        return list(self.projection(torch.cat(layers_NH)).chunk(len(layers_NH)))

    def _blocks(self, teacher_NG: Tensor) -> Iterator[Block]:
        rows = max(1, block_values(teacher_NG.device) // teacher_NG.shape[1])
        for first in range(0, len(teacher_NG), rows):
            chosen = slice(first, first + rows)
            yield Block([(0, chosen)], self._sums_beside(teacher_NG[chosen]))

    def _sums_beside(self, teacher_CG: Tensor) -> Any:
        def sums(own_CG: Tensor) -> Tensor:
            other_CG = wide(teacher_CG)
            square_C = other_CG.square().sum(1).clamp_min(torch.finfo(other_CG.dtype).tiny)
            error = ((own_CG - other_CG).square().sum(1) / square_C).sum()
            cosine = F.cosine_similarity(own_CG, other_CG, 1).sum()
            return torch.stack([error if self._settings.distance == "mse" else len(own_CG) - cosine, error, cosine])

        return sums


def projection_of(models: ModelPair) -> nn.Linear | None:
    """From the student's hidden size to the teacher's, trained with it; None where the two are equal."""
    if models.student_hidden == models.teacher_hidden:
        return None
    projection = nn.Linear(models.student_hidden, models.teacher_hidden, bias=False)
    projection.weight.data = _first_projection(models)
    return projection


def _first_projection(models: ModelPair) -> Tensor:
    """[G, H], with orthonormal columns or rows."""
    if models.basis_HG is not None:
        return torch.from_numpy(models.basis_HG).T.contiguous()
    generator = torch.Generator().manual_seed(_SEED)
    empty_GH = torch.empty(models.teacher_hidden, models.student_hidden)
    return nn.init.orthogonal_(empty_GH, generator=generator)
