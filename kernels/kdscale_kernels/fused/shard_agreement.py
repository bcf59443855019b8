"""What the ranks of a vocabulary-split head agree on before the first collective, so that no rank waits forever.

Legend: R ranks of the group, Vs vocabulary rows of one rank's shard, M valid rows, K teacher entries.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class AgreedShard:
    """This rank's part of the head: entries first_id to first_id + used of the vocabulary; later rows are padding."""

    first_id: int
    used: int
    vocab: int
    rank: int
    ranks: int
    group: Any
    widest: int  # the most entries a rank holds: chunks of rows are cut by it, so that all ranks cut alike

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(index into the shard, clamped into it; True where the id really lies there)."""
        index = ids - self.first_id
        return index.clamp(0, max(self.used, 1) - 1), (index >= 0) & (index < self.used)


@dataclass(frozen=True)
class ShardClaim:
    """What one rank tells the others about its call. Everything but the first two must be equal on all ranks."""

    first_id: int
    rows: int  # of the shard, padding included
    vocab: int
    valid: int = 0  # rows that count
    entries: int = 0
    grad_hidden: bool = False
    settings: object = None  # compared by a checksum of its repr

    @property
    def used(self) -> int:
        """Entries of the shard that lie in the vocabulary."""
        return min(self.rows, max(0, self.vocab - self.first_id))


_SAME = ("vocab_size", "valid rows", "entries a row", "a gradient of hidden", "options, dtypes or chunk_bytes")


def agree(claim: ShardClaim | Exception, device: torch.device, group: Any) -> AgreedShard:
    """This rank's shard, after one small all-gather. Waits for the device once.

    Raises the same ValueError on every rank unless the shards cover 0..vocab once and the calls match. A rank whose own
    arguments are wrong hands in its exception: it is raised there, and the others, which would otherwise wait in the
    first collective, raise ValueError.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("vocab-parallel ops need torch.distributed.init_process_group first")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: this process is not a member of the group it passed")
    if isinstance(claim, Exception):
        row = [0] * (3 + len(_SAME))
    else:
        checksum = zlib.crc32(repr(claim.settings).encode())
        row = [1, claim.first_id, claim.used, claim.vocab, claim.valid, claim.entries, claim.grad_hidden, checksum]
    table = torch.empty(ranks, len(row), dtype=torch.int64, device=device)
    dist.all_gather(list(table), torch.tensor(row, dtype=torch.int64, device=device), group=group)
    columns = list(zip(*table.tolist(), strict=True))
    if isinstance(claim, Exception):
        raise claim
    if 0 in columns[0]:
        raise ValueError(f"rank {columns[0].index(0)} of the group refused its arguments; its own error says why")
    for name, values in zip(_SAME, columns[3:], strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same on all ranks of the group, got {list(values)} in rank order")
    _check_cover(columns[1], columns[2], claim.vocab)
    return AgreedShard(claim.first_id, claim.used, claim.vocab, rank, ranks, group, max(columns[2]))


def _check_cover(first: tuple[int, ...], used: tuple[int, ...], vocab: int) -> None:
    at = 0
    for start, count in sorted((f, u) for f, u in zip(first, used, strict=True) if u):
        if start != at:
            break
        at += count
    if at != vocab:
        spans = [f"{f}..{f + u}" for f, u in zip(first, used, strict=True)]
        raise ValueError(f"first_id: expected shards that cover 0..{vocab} once, got {', '.join(spans)} in rank order")
