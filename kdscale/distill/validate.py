"""Held-out loss during training. The teacher's targets are computed once and kept: they never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kdscale.data.batches import Batch
from kdscale.data.packing import IGNORED_LABEL
from kdscale.distill.objectives.token_divergence import TERMS, per_token
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.step import to_device
from kdscale.runtime.ranks import all_reduce_sum
from kdscale.teacher.source import Teacher
from kdscale.teacher.targets import FullTargets, TopKTargets
from kdscale_launch.watchdog import enter


class Validator:
    """Every data-parallel rank takes every so-many-th batch; all run as many forwards, which ZeRO-3 needs."""

    def __init__(self, batches: Sequence[Batch], teacher: Teacher, device: torch.device, mesh: Mesh):
        rounds = -(-len(batches) // mesh.data)
        mine = list(batches)[mesh.data_rank :: mesh.data]
        mine = [batch.with_label_slice(mesh.sequence_rank, mesh.sequence) for batch in mine]
        self._mesh = mesh
        blank = replace(batches[0], labels_BS=torch.full_like(batches[0].labels_BS, IGNORED_LABEL))
        self._batches = mine + [blank] * (rounds - len(mine))
        self._teacher, self._device = teacher, device
        self._targets: list[TopKTargets | FullTargets] = []

    @torch.no_grad()
    def run(self, engine: Any) -> dict[str, float]:
        """Means per held-out token by the names of losses.TERMS, plus perplexity and tokens. A collective call."""
        totals = torch.zeros(1 + len(TERMS), dtype=torch.float64, device=self._device)
        engine.eval()
        for number, batch in enumerate(self._batches):
            enter("validation")
            micro = to_device(batch, self._device)
            if number == len(self._targets):
                self._targets.append(self._teacher.targets(micro.input_ids_BS, micro.position_ids_BS, micro.rows_N))
            _, terms = engine(micro, self._targets[number])
            totals[1:] += terms
            totals[0] += batch.token_count
        engine.train()
        tokens, *sums = (all_reduce_sum(totals) / self._mesh.tensor).tolist()  # tensor ranks have the same
        return {**per_token(sums, max(tokens, 1.0)), "tokens": tokens}
