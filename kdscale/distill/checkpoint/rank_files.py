"""The tensors of a checkpoint: pieces of flattened parameters, and which bytes of which files hold any other piece.

A rank's file is a safetensors file of one-dimensional fp32 tensors, each named `kind:offset:parameter`: elements offset
onwards of the flattened parameter, all fp32 master weights first, then Adam's two moments. Tensor-parallel ranks write
pieces of their parts of parameters, flattened by themselves (`kind:offset:parameter@1:0:96`, parts.py). Nothing in it
depends on DeepSpeed, the number of ranks or the ZeRO stage; any reader of safetensors can use it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import torch

from kdscale import files
from kdscale.distill.parallel.tensor_slices import TensorSlice, locate, parse_slice_name, tiles
from kdscale.errors import CheckpointError
from kdscale.models.parameter_map import ParameterRange
from kdscale.weights import TensorInfo
from kdscale.weights.header import read_header
from kdscale.weights.writer import plan_shards

QUANTITIES = ("master", "exp_avg", "exp_avg_sq")


_BYTES = 4  # of an fp32 value


_OPEN_FILES = 64


_BLOCK_BYTES = 1 << 26  # of one write, one hash update and one copy to a device


def cut_evenly(pieces: Iterable[ParameterRange], index: int, count: int) -> list[ParameterRange]:
    """The `index`-th of `count` near-equal parts of `pieces`, laid end to end and cut where a part ends."""
    pieces = list(pieces)
    total, at, out = sum(piece.length for piece in pieces), 0, []
    low, high = total * index // count, total * (index + 1) // count
    for piece in pieces:
        begin, end = max(low, at), min(high, at + piece.length)
        if begin < end:
            out.append(ParameterRange(piece.name, piece.offset + begin - at, end - begin))
        at += piece.length
    return out


@dataclass(frozen=True)
class WrittenFile:
    """Size and SHA-256 of a file, and of the part of it that ends with the last master weight."""

    bytes: int
    sha256: str
    weights_bytes: int
    weights_sha256: str


class WriteCancelled(Exception):  # noqa: N818 - not an error
    """`write_rank_file` was told to stop."""


def write_rank_file(
    path: Path,
    pieces: Sequence[ParameterRange],
    blocks: Iterable[torch.Tensor],
    cancelled: Callable[[], bool] = lambda: False,
) -> WrittenFile:
    """Write one rank's file, hashed on the way and flushed to the disk. `blocks` are the fp32 values: every piece of
    the first kind, then every piece of the next, on any device.

    Raises OSError, and WriteCancelled as soon as `cancelled()`; the file is then incomplete.
    """
    specs = {
        f"{kind}:{piece.offset}:{piece.name}": TensorInfo((piece.length,), "F32")
        for kind in QUANTITIES
        for piece in pieces
    }
    (layout,) = plan_shards(specs, 1 << 62)
    digest = hashlib.sha256(layout.header)
    weights_bytes, weights_sha256 = len(layout.header) + _BYTES * sum(piece.length for piece in pieces), ""
    with path.open("wb", buffering=0) as stream:
        _write(stream, memoryview(layout.header))
        written = len(layout.header)
        for block in blocks:
            assert block.dtype == torch.float32
            for part in block.detach().reshape(-1).split(_BLOCK_BYTES // _BYTES):
                if cancelled():
                    raise WriteCancelled(path)
                raw = part.cpu().contiguous().numpy().data.cast("B")
                digest.update(raw)
                _write(stream, raw)
                written += len(raw)
            if written == weights_bytes:
                weights_sha256 = digest.hexdigest()
        assert written == layout.size
        files.fsync_file(path)
    return WrittenFile(written, digest.hexdigest(), weights_bytes, weights_sha256)


def _write(stream: RawIOBase, left: memoryview) -> None:
    while left:
        left = left[stream.write(left) :]


@dataclass(frozen=True)
class StoredRange:
    """A piece in a file: its values begin at byte `begin`."""

    offset: int
    length: int
    file: Path
    begin: int


@dataclass(frozen=True)
class Read:
    """`length` values from byte `begin` of `file` go to element `at` of what is being put together."""

    file: Path
    begin: int
    at: int
    length: int


class RankFileIndex:
    """Where everything is in the files of one checkpoint, from their headers alone.

    `shapes` are the parameters that the checkpoint says it holds. Raises CheckpointError unless the files hold every
    element of each of them exactly once, in all three kinds, and nothing else.
    """

    def __init__(self, paths: Sequence[Path], shapes: Mapping[str, Sequence[int]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._parts: dict[str, dict[str, TensorSlice]] = {
            name: {} for name in self.shapes
        }  # of each parameter, by their names
        self._stored: dict[tuple[str, str], list[StoredRange]] = {}
        for path in paths:
            for key, entry in read_header(path).items():
                kind, _, rest = key.partition(":")
                offset, _, name = rest.partition(":")
                whole, part = parse_slice_name(name)
                if kind not in QUANTITIES or whole not in self.shapes or not offset.isdecimal():
                    raise CheckpointError(f"{path}", expected="pieces of the student's parameters", got=f"tensor {key}")
                length = (entry.end - entry.begin) // _BYTES
                if entry.dtype != "F32" or entry.shape != (length,):
                    raise CheckpointError(f"{path}: {key}", expected="flat F32", got=f"{entry.dtype}{entry.shape}")
                self._stored.setdefault((kind, name), []).append(StoredRange(int(offset), length, path, entry.begin))
                self._parts[whole][name] = part or _all_of(self.shapes[whole])
        for whole in self.shapes:
            self._check(whole, str(paths[0].parent) if paths else "checkpoint")

    def _check(self, whole: str, where: str) -> None:
        shape, parts = self.shapes[whole], self._parts[whole] or {whole: _all_of(self.shapes[whole])}
        if list(parts) != [whole] and not tiles(list(parts.values()), shape):
            got = ", ".join(sorted(parts))[:200]
            raise CheckpointError(f"{where}: {whole}", expected=f"parts that are all of {list(shape)}", got=got)
        for (name, part), kind in itertools.product(parts.items(), QUANTITIES):
            stored = self._stored.setdefault((kind, name), [])
            stored.sort(key=lambda item: item.offset)
            ends = [0, *(item.offset + item.length for item in stored)]
            values = math.prod(shape if name == whole else part.shape(shape))
            starts = [*(item.offset for item in stored), values]
            if ends != starts:
                raise CheckpointError(
                    f"{where}: {kind} of {name}",
                    expected=f"{values} values, each once",
                    got=f"pieces {[(item.offset, item.length) for item in stored]}"[:200],
                )

    def plan(self, kind: str, piece: ParameterRange) -> list[Read]:
        """The reads that make up `piece`, in order. Raises CheckpointError when it is not part of the checkpoint."""
        whole, part = parse_slice_name(piece.name)
        if kind not in QUANTITIES or whole not in self.shapes:
            raise CheckpointError(f"the checkpoint has no parameter {piece.name}")
        shape, end = self.shapes[whole], piece.offset + piece.length
        if end > math.prod(part.shape(shape) if part else shape):
            raise CheckpointError(
                f"parameter {piece.name} in the checkpoint",
                expected=f"at least {end:,} values",
                got=str(list(shape)),
            )
        if piece.name in self._parts[whole]:
            return self._reads(kind, piece)
        by_part, reads = {part: name for name, part in self._parts[whole].items()}, []
        for run in (part or _all_of(shape)).runs(shape, piece.offset, piece.length):
            for there, (begin, at, length) in locate(list(by_part), shape, run.begin, run.length):
                for read in self._reads(kind, ParameterRange(by_part[there], begin, length)):
                    reads.append(replace(read, at=run.at + at + read.at))
        return reads

    def _reads(self, kind: str, piece: ParameterRange) -> list[Read]:
        """The reads that make up a piece of a part that is in the checkpoint."""
        stored, end = self._stored[kind, piece.name], piece.offset + piece.length
        first = bisect.bisect_right(stored, piece.offset, key=lambda item: item.offset) - 1
        reads = []
        for item in itertools.takewhile(lambda item: item.offset < end, stored[max(first, 0) :]):
            begin, stop = max(item.offset, piece.offset), min(item.offset + item.length, end)
            if begin < stop:
                at = item.begin + _BYTES * (begin - item.offset)
                reads.append(Read(item.file, at, begin - piece.offset, stop - begin))
        return reads


def _all_of(shape: Sequence[int]) -> TensorSlice:
    return TensorSlice(0, 0, shape[0] if shape else 1)


class RankFileReader:
    """Reads pieces straight into tensors; a context manager. The last files stay open: parts take turns row by row."""

    def __init__(self, index: RankFileIndex):
        self._index = index
        self._open: dict[Path, RawIOBase] = {}

    def fill(self, kind: str, piece: ParameterRange, out: torch.Tensor) -> None:
        """Fill the flat tensor `out`, on any device and of any float dtype, with a piece of its length.

        Raises CheckpointError when a file has shrunk or gone since its header was read.
        """
        if out.device.type == "cpu" and out.dtype == torch.float32:
            for read in self._index.plan(kind, piece):
                self._read(read.file, read.begin, out.narrow(0, read.at, read.length))
            return
        for at in range(0, piece.length, _BLOCK_BYTES // _BYTES):
            block = torch.empty(min(_BLOCK_BYTES // _BYTES, piece.length - at))
            self.fill(kind, ParameterRange(piece.name, piece.offset + at, block.numel()), block)
            out.narrow(0, at, block.numel()).copy_(block)

    def _read(self, path: Path, begin: int, out: torch.Tensor) -> None:
        stream = self._stream(path)
        stream.seek(begin)
        left = out.detach().numpy().data.cast("B")
        while left:
            count = stream.readinto(left)
            if not count:
                raise CheckpointError(f"{path} was changed while it was read", got=f"{len(left):,} bytes too few")
            left = left[count:]

    def _stream(self, path: Path) -> RawIOBase:
        if path not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[path] = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is gone", hint="it was removed by rotation; try a newer one") from None
        return self._open[path]

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def __enter__(self) -> RankFileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
