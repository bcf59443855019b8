"""How the ranks divide the work: over sequences of the batch, positions of a sequence, slices of the layers.

Rank (d·S + s)·T + t: the T ranks that share layers are neighbours, because they exchange most; then come the S ranks
that share a sequence, then the D groups that take sequences of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from kdscale.config.distill.settings import DistillConfig
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.runtime.ranks import rank


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes, and where `rank` stands on each."""

    data: int
    sequence: int
    tensor: int
    rank: int

    @classmethod
    def of(cls, cfg: DistillConfig) -> Mesh:
        """The mesh of a config, with this process's rank."""
        return cls(cfg.data_parallel, cfg.sequence_parallel, cfg.tensor_parallel, rank())

    @property
    def data_rank(self) -> int:
        """Which of the groups that take sequences of their own this rank is in."""
        return self.rank // (self.sequence * self.tensor)

    @property
    def sequence_rank(self) -> int:
        """Which positions of its sequences this rank takes."""
        return self.rank // self.tensor % self.sequence

    @property
    def sequence_ranks(self) -> list[list[int]]:
        """Every group of ranks that share sequences; all ranks must make all groups, in this order."""
        block = self.sequence * self.tensor
        return [
            [d * block + s * self.tensor + t for s in range(self.sequence)]
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def sequence_slice(self, timeout: timedelta | None) -> SequenceSlice:
        """This rank's positions of every sequence. A collective call: it makes groups that wait for `timeout`."""
        if self.sequence == 1:
            return SequenceSlice()
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in self.sequence_ranks]
        group = next(group for group, ranks in zip(groups, self.sequence_ranks, strict=True) if self.rank in ranks)
        return SequenceSlice(self.sequence_rank, self.sequence, group)

    @property
    def tensor_ranks(self) -> list[list[int]]:
        """Every group of ranks that share layers."""
        return [list(range(first, first + self.tensor)) for first in range(0, self.world, self.tensor)]

    def by_data(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """Sums of the micro-batches of every group that takes sequences of its own, from one row of sums per rank.

        Ranks that share a sequence each have a part of its sum; ranks that share layers all have the same sum.
        """
        block = self.sequence * self.tensor
        return [
            sum(parts)
            for first in range(0, self.world, block)
            for parts in zip(*rows[first : first + block : self.tensor], strict=True)
        ]

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.data * self.sequence * self.tensor
