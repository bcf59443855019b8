"""Where the movable weights of a teacher are kept: in shards over all ranks, or in the memory of the host.

A store starts to fetch a layer or the head and returns a function that waits for it. Layers take turns in two buffers:
one is computed with while the next one comes in.

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
from kdscale.teacher.placement.movable_weights import MovableTable, MovableWeights, aligned

Pending = Callable[[], torch.Tensor]

_BUFFERS = 2
_GATHER_BYTES = 16 << 20  # of one gather over gloo, over all ranks


class WeightStore(Protocol):
    """Keeps the layers and tables of a teacher and fetches them for its forward."""

    def start_layer(self, layer: int) -> Pending:
        """Start to fetch a layer; the result waits and returns its values. At most two are on their way or in use."""
        ...

    def start_table(self, table: MovableTable) -> Pending:
        """Start to fetch a whole table; the result waits and returns it, [V,H]."""
        ...

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        """The rows of these ids, [N,H]."""
        ...


class PartitionedStore:
    """Every rank keeps 1/R of each layer and of each table, and reads only that from the files.

    `start_layer`, `start_table` and `rows` are collective: all ranks make the same calls in the same order; N may
    differ.
    """

    def __init__(self, movable: MovableWeights, weights: ParameterReader, dtype: torch.dtype, device: torch.device):
        self._ranks, self._rank = world_size(), rank()
        # A group of its own, so that layers do not queue behind the other collectives.
        self._group = dist.new_group() if self._ranks > 1 else None
        self._shards = []
        for layer in movable.layers:
            shard = torch.zeros(-(-layer.numel // self._ranks), dtype=dtype, device=device)
            layer.fill(weights, self._rank * shard.numel(), shard)
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
        """Start to gather a layer from all ranks."""
        shard = self._shards[layer]
        return self._gather(shard, self._buffers[layer % _BUFFERS][: shard.numel() * self._ranks])

    def start_table(self, table: MovableTable) -> Pending:
        """Start to gather a table from all ranks."""
        shard_RH = self._tables[table]
        size = shard_RH.numel() * self._ranks if self._ranks > 1 else 0
        wait = self._gather(shard_RH.view(-1), shard_RH.new_empty(size))
        return lambda: wait().view(-1, table.width)[: table.vocab]

    def _gather(self, shard: torch.Tensor, out: torch.Tensor) -> Pending:
        if self._ranks == 1:
            return lambda: shard
        # as bytes, so that no backend has to know the dtype
        out_bytes, shard_bytes = out.view(torch.uint8), shard.view(torch.uint8)
        if dist.get_backend() == "gloo":  # gathers into memory of its own first: do it a little at a time
            outs_R, size = out_bytes.chunk(self._ranks), max(1, _GATHER_BYTES // self._ranks)
            works = []
            for at in range(0, shard_bytes.numel(), size):
                windows_R = [rank_bytes[at : at + size] for rank_bytes in outs_R]
                works.append(dist.all_gather(windows_R, shard_bytes[at : at + size], group=self._group, async_op=True))
        else:
            works = [dist.all_gather_into_tensor(out_bytes, shard_bytes, group=self._group, async_op=True)]

        def wait() -> torch.Tensor:
            for work in works:
                work.wait()
            return out

        return wait

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        """Send the ids to all ranks and get the rows from their owners: N·H values travel instead of V·H."""
        shard_RH = self._tables[table]
        if self._ranks == 1:
            return shard_RH[ids_N]
        count = torch.tensor([ids_N.numel()], device=ids_N.device)
        counts_R = count.new_empty(self._ranks)
        dist.all_gather_into_tensor(counts_R, count)
        asked_RN = ids_N.new_full((self._ranks, int(counts_R.max())), -1)
        padded_N = asked_RN[self._rank].clone()
        padded_N[: ids_N.numel()] = ids_N
        dist.all_gather_into_tensor(asked_RN.view(-1), padded_N)
        owner_RN = asked_RN.div(shard_RH.shape[0], rounding_mode="floor")  # -1 where nothing was asked
        own_RN = owner_RN == self._rank
        sent = shard_RH[asked_RN[own_RN] - self._rank * shard_RH.shape[0]]
        owner_N = owner_RN[self._rank, : ids_N.numel()]
        received = sent.new_empty(ids_N.numel(), table.width)
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            output_split_sizes=owner_N.bincount(minlength=self._ranks).tolist(),
            input_split_sizes=own_RN.sum(1).tolist(),
        )
        rows_NH = torch.empty_like(received)
        rows_NH[owner_N.argsort(stable=True)] = received  # rows come by rank, then in the order of the ids
        return rows_NH


class OffloadedStore:
    """The whole teacher in the host's memory, one copy for all ranks of a host; on a CPU it is used where it lies.

    Layers are copied to a GPU on a stream of their own.
    """

    def __init__(self, movable: MovableWeights, weights: ParameterReader, dtype: torch.dtype, device: torch.device):
        self._device = device
        sizes = [layer.numel for layer in movable.layers] + [table.vocab * table.width for table in movable.tables]
        sizes = [aligned(size) for size in sizes]
        self._memory = HostMemory(sum(sizes) * dtype.itemsize, device)
        regions = self._memory.bytes.view(dtype).split(sizes)
        self._layers = regions[: len(movable.layers)]
        self._tables = {
            table: region[: table.vocab * table.width].view(table.vocab, table.width)
            for table, region in zip(movable.tables, regions[len(movable.layers) :], strict=True)
        }
        for index in self._memory.indices_to_fill(len(regions)):
            if index < len(movable.layers):
                movable.layers[index].fill(weights, 0, self._layers[index])
            else:
                table = movable.tables[index - len(movable.layers)]
                table.fill(weights, 0, self._tables[table])
        self._memory.wait_until_filled()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            widest = max(layer.numel() for layer in self._layers)
            self._buffers = [torch.empty(widest, dtype=dtype, device=device) for _ in range(_BUFFERS)]

    def start_layer(self, layer: int) -> Pending:
        """Start to copy a layer to the GPU."""
        source = self._layers[layer]
        if self._device.type == "cpu":
            return lambda: source
        return self._copy(source, self._buffers[layer % _BUFFERS][: source.numel()])

    def start_table(self, table: MovableTable) -> Pending:
        """Start to copy a table to the GPU."""
        source_VH = self._tables[table]
        if self._device.type == "cpu":
            return lambda: source_VH
        return self._copy(source_VH, torch.empty_like(source_VH, device=self._device))

    def _copy(self, source: torch.Tensor, out: torch.Tensor) -> Pending:
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)  # until the last computation with this buffer is done
        with torch.cuda.stream(self._stream):
            out.copy_(source, non_blocking=True)
            done = self._stream.record_event()

        def wait() -> torch.Tensor:
            torch.cuda.current_stream(self._device).wait_event(done)
            return out

        return wait

    def rows(self, table: MovableTable, ids_N: torch.Tensor) -> torch.Tensor:
        """Look the rows up on the CPU and copy only them."""
        return self._tables[table][ids_N.cpu()].to(self._device)
