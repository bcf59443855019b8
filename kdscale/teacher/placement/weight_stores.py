"""Where a placed teacher's weights live between uses: in shards over all ranks, or in the memory of the host.

A store starts to bring a layer or the head and returns what waits for it. Layers take turns in two buffers: one is
computed with while the next one comes in.

N tokens looked up, R ranks, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from kdscale.models.parameter_map import ParameterReader
from kdscale.runtime.ranks import rank, world_size
from kdscale.teacher.placement.host_memory import HostMemory
from kdscale.teacher.placement.movable_weights import MovableTable, MovableWeights

Pending = Callable[[], torch.Tensor]


_BUFFERS = 2


_PIECE_BYTES = 16 << 20


class WeightStore(Protocol):
    def start_layer(self, layer: int) -> Pending:
        """Begin to bring a layer; the result waits and gives its values. At most two layers are under way or in use."""
        ...

    def start_table(self, table: MovableTable) -> Pending:
        """Begin to bring a whole table; the result waits and gives it, [V,H]."""
        ...

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        """The rows of these ids, [N,H]."""
        ...


class PartitionedStore:
    """Every rank holds 1/R of each layer and of each table, read from the files byte by byte as it needs.

    `start`, `start_table` and `rows` are collective: all ranks make the same calls in the same order. N may differ.
    """

    def __init__(self, movable: MovableWeights, weights: ParameterReader, dtype: torch.dtype, device: torch.device):
        self._ranks, self._rank = world_size(), rank()
        # Layers come in beside whatever else the ranks say to each other: not in one line with it.
        self._group = dist.new_group() if self._ranks > 1 else None
        self._shards = []
        for unit in movable.layers:
            shard = torch.zeros(-(-unit.numel // self._ranks), dtype=dtype, device=device)
            unit.fill(weights, self._rank * shard.numel(), shard)
            self._shards.append(shard)
        self._tables = {}
        for table in movable.tables:
            rows = -(-table.vocab // self._ranks)
            self._tables[table] = torch.zeros(rows, table.width, dtype=dtype, device=device)
            table.fill(weights, self._rank * rows, self._tables[table])
        widest = max(shard.numel() for shard in self._shards) * self._ranks
        self._buffers = [
            torch.empty(widest if self._ranks > 1 else 0, dtype=dtype, device=device) for _ in range(_BUFFERS)
        ]

    def start_layer(self, layer: int) -> Pending:
        shard = self._shards[layer]
        return self._gather(shard, self._buffers[layer % _BUFFERS][: shard.numel() * self._ranks])

    def start_table(self, table: MovableTable) -> Pending:
        shard_RH = self._tables[table]
        size = shard_RH.numel() * self._ranks if self._ranks > 1 else 0
        wait = self._gather(shard_RH.view(-1), shard_RH.new_empty(size))
        return lambda: wait().view(-1, table.width)[: table.vocab]

    def _gather(self, shard: torch.Tensor, out: torch.Tensor) -> Pending:
        if self._ranks == 1:
            return lambda: shard
        # as bytes: the values pass unread, and no backend has to know their dtype
        out_bytes, shard_bytes = out.view(torch.uint8), shard.view(torch.uint8)
        if dist.get_backend() == "gloo":  # it gathers into memory of its own first: by pieces, not to need that twice
            outs_R, size = out_bytes.chunk(self._ranks), max(1, _PIECE_BYTES // self._ranks)
            works = []
            for at in range(0, shard_bytes.numel(), size):
                pieces_R = [part[at : at + size] for part in outs_R]
                works.append(dist.all_gather(pieces_R, shard_bytes[at : at + size], group=self._group, async_op=True))
        else:
            works = [dist.all_gather_into_tensor(out_bytes, shard_bytes, group=self._group, async_op=True)]

        def wait() -> torch.Tensor:
            for work in works:
                work.wait()
            return out

        return wait

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        """Ids go to all ranks, rows come back from their owners: N·H values travel instead of V·H."""
        shard_RH = self._tables[table]
        if self._ranks == 1:
            return shard_RH[ids_N]
        count = torch.tensor([ids_N.numel()], device=ids_N.device)
        counts_R = count.new_empty(self._ranks)
        dist.all_gather_into_tensor(counts_R, count)
        asked_RN = ids_N.new_full((self._ranks, int(counts_R.max())), -1)
        mine_N = asked_RN[self._rank].clone()
        mine_N[: ids_N.numel()] = ids_N
        dist.all_gather_into_tensor(asked_RN.view(-1), mine_N)
        owner_RN = asked_RN.div(shard_RH.shape[0], rounding_mode="floor")  # -1 where nothing was asked
        here_RN = owner_RN == self._rank
        sent = shard_RH[asked_RN[here_RN] - self._rank * shard_RH.shape[0]]
        owner_N = owner_RN[self._rank, : ids_N.numel()]
        came = sent.new_empty(ids_N.numel(), table.width)
        dist.all_to_all_single(
            came.view(torch.uint8),
            sent.view(torch.uint8),
            output_split_sizes=owner_N.bincount(minlength=self._ranks).tolist(),
            input_split_sizes=here_RN.sum(1).tolist(),
        )
        rows_NH = torch.empty_like(came)
        rows_NH[owner_N.argsort(stable=True)] = came  # owners answer in the order of the ranks, each in that of the ids
        return rows_NH


class OffloadedStore:
    """The whole teacher in the host's memory, one copy for the ranks of a host; on a CPU it is used where it lies.

    To a GPU layers are copied on a stream of their own.
    """

    def __init__(self, movable: MovableWeights, weights: ParameterReader, dtype: torch.dtype, device: torch.device):
        self._device = device
        sizes = [unit.numel for unit in movable.layers] + [table.vocab * table.width for table in movable.tables]
        sizes = [-(-size // 64) * 64 for size in sizes]
        self._memory = HostMemory(sum(sizes) * dtype.itemsize, device)
        parts = self._memory.bytes.view(dtype).split(sizes)
        self._layers = parts[: len(movable.layers)]
        self._tables = {
            table: part[: table.vocab * table.width].view(table.vocab, table.width)
            for table, part in zip(movable.tables, parts[len(movable.layers) :], strict=True)
        }
        for index in self._memory.indices_to_fill(len(parts)):
            if index < len(movable.layers):
                movable.layers[index].fill(weights, 0, self._layers[index])
            else:
                table = movable.tables[index - len(movable.layers)]
                table.fill(weights, 0, self._tables[table])
        self._memory.wait_until_filled()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            widest = max(part.numel() for part in self._layers)
            self._buffers = [torch.empty(widest, dtype=dtype, device=device) for _ in range(_BUFFERS)]

    def start_layer(self, layer: int) -> Pending:
        source = self._layers[layer]
        if self._device.type == "cpu":
            return lambda: source
        return self._copy(source, self._buffers[layer % _BUFFERS][: source.numel()])

    def start_table(self, table: MovableTable) -> Pending:
        source_VH = self._tables[table]
        if self._device.type == "cpu":
            return lambda: source_VH
        return self._copy(source_VH, torch.empty_like(source_VH, device=self._device))

    def _copy(self, source: torch.Tensor, out: torch.Tensor) -> Pending:
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)  # what was computed with this buffer before is done then
        with torch.cuda.stream(self._stream):
            out.copy_(source, non_blocking=True)
            done = self._stream.record_event()

        def wait() -> torch.Tensor:
            torch.cuda.current_stream(self._device).wait_event(done)
            return out

        return wait

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        return self._tables[table][ids_N.cpu()].to(self._device)
