"""The tensors of a checkpoint: pieces of flattened parameters, and which bytes of which files hold any other piece.

A rank's file is a safetensors file of one-dimensional fp32 tensors, each named `kind:offset:parameter`: elements offset
onwards of the flattened parameter, all fp32 master weights first, then Adam's two moments. Nothing in it depends on
DeepSpeed, the number of ranks or the ZeRO stage; any reader of safetensors can use it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import torch

from kdscale import files
from kdscale.errors import CheckpointError
from kdscale.weights import TensorInfo
from kdscale.weights.header import read_header
from kdscale.weights.writer import plan_shards

KINDS = ("master", "exp_avg", "exp_avg_sq")
_BYTES = 4  # of an fp32 value
_BLOCK_BYTES = 1 << 26  # of one write, one hash update and one copy to a device


@dataclass(frozen=True, order=True)
class Piece:
    """Elements `offset` … `offset + length` of the flattened parameter `name`."""

    name: str
    offset: int
    length: int


def share(pieces: Iterable[Piece], index: int, count: int) -> list[Piece]:
    """The `index`-th of `count` near-equal parts of `pieces`, laid end to end and cut where a part ends."""
    pieces = list(pieces)
    total, at, out = sum(piece.length for piece in pieces), 0, []
    low, high = total * index // count, total * (index + 1) // count
    for piece in pieces:
        begin, end = max(low, at), min(high, at + piece.length)
        if begin < end:
            out.append(Piece(piece.name, piece.offset + begin - at, end - begin))
        at += piece.length
    return out


@dataclass(frozen=True)
class FileFacts:
    """Size and SHA-256 of a file, and of the part of it that ends with the last master weight."""

    bytes: int
    sha256: str
    weights_bytes: int
    weights_sha256: str


class WriteCancelled(Exception):  # noqa: N818 - not an error
    """`write_pieces` was told to stop."""


def write_pieces(
    path: Path,
    pieces: Sequence[Piece],
    blocks: Iterable[torch.Tensor],
    cancelled: Callable[[], bool] = lambda: False,
) -> FileFacts:
    """Write one rank's file, hashed on the way and flushed to the disk. `blocks` are the fp32 values: every piece of
    the first kind, then every piece of the next, on any device.

    Raises OSError, and WriteCancelled as soon as `cancelled()`; the file is then incomplete.
    """
    specs = {
        f"{kind}:{piece.offset}:{piece.name}": TensorInfo((piece.length,), "F32") for kind in KINDS for piece in pieces
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
    return FileFacts(written, digest.hexdigest(), weights_bytes, weights_sha256)


def _write(stream: RawIOBase, left: memoryview) -> None:
    while left:
        left = left[stream.write(left) :]


@dataclass(frozen=True)
class Stored:
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


class PieceIndex:
    """Where everything is in the files of one checkpoint, from their headers alone.

    `shapes` are the parameters that the checkpoint says it holds. Raises CheckpointError unless the files hold every
    element of each of them exactly once, in all three kinds, and nothing else.
    """

    def __init__(self, paths: Sequence[Path], shapes: Mapping[str, Sequence[int]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._stored: dict[tuple[str, str], list[Stored]] = {(kind, name): [] for kind in KINDS for name in self.shapes}
        for path in paths:
            for key, entry in read_header(path).items():
                kind, _, rest = key.partition(":")
                offset, _, name = rest.partition(":")
                if (kind, name) not in self._stored or not offset.isdecimal():
                    raise CheckpointError(f"{path}", expected="pieces of the student's parameters", got=f"tensor {key}")
                length = (entry.end - entry.begin) // _BYTES
                if entry.dtype != "F32" or entry.shape != (length,):
                    raise CheckpointError(f"{path}: {key}", expected="flat F32", got=f"{entry.dtype}{entry.shape}")
                self._stored[kind, name].append(Stored(int(offset), length, path, entry.begin))
        for (kind, name), stored in self._stored.items():
            stored.sort(key=lambda item: item.offset)
            ends = [0, *(item.offset + item.length for item in stored)]
            starts = [*(item.offset for item in stored), math.prod(self.shapes[name])]
            if ends != starts:
                raise CheckpointError(
                    f"{paths[0].parent if paths else 'checkpoint'}: {kind} of {name}",
                    expected=f"{starts[-1]} values, each once",
                    got=f"pieces {[(item.offset, item.length) for item in stored]}"[:200],
                )

    def plan(self, kind: str, piece: Piece) -> list[Read]:
        """The reads that make up `piece`, in order. Raises CheckpointError when it is not part of the checkpoint."""
        if (kind, piece.name) not in self._stored:
            raise CheckpointError(f"the checkpoint has no parameter {piece.name}")
        stored, end = self._stored[kind, piece.name], piece.offset + piece.length
        if end > math.prod(self.shapes[piece.name]):
            raise CheckpointError(
                f"parameter {piece.name} in the checkpoint",
                expected=f"at least {end:,} values",
                got=str(list(self.shapes[piece.name])),
            )
        first = bisect.bisect_right(stored, piece.offset, key=lambda item: item.offset) - 1
        reads = []
        for item in itertools.takewhile(lambda item: item.offset < end, stored[max(first, 0) :]):
            begin, stop = max(item.offset, piece.offset), min(item.offset + item.length, end)
            if begin < stop:
                at = item.begin + _BYTES * (begin - item.offset)
                reads.append(Read(item.file, at, begin - piece.offset, stop - begin))
        return reads


class PieceReader:
    """Reads pieces straight into tensors; a context manager. The file that was read last stays open."""

    def __init__(self, index: PieceIndex):
        self._index = index
        self._open: tuple[Path, RawIOBase] | None = None

    def fill(self, kind: str, piece: Piece, out: torch.Tensor) -> None:
        """Fill the flat tensor `out`, on any device and of any float dtype, with a piece of its length.

        Raises CheckpointError when a file has shrunk or gone since its header was read.
        """
        for read in self._index.plan(kind, piece):
            target = out.narrow(0, read.at, read.length)
            if target.device.type == "cpu" and target.dtype == torch.float32:
                self._read(read.file, read.begin, target)
                continue
            step = _BLOCK_BYTES // _BYTES
            for at in range(0, read.length, step):
                block = torch.empty(min(step, read.length - at))
                self._read(read.file, read.begin + _BYTES * at, block)
                target.narrow(0, at, block.numel()).copy_(block)

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
        if self._open is None or self._open[0] != path:
            self.close()
            try:
                self._open = (path, path.open("rb", buffering=0))
            except FileNotFoundError:
                raise CheckpointError(f"{path} is gone", hint="it was removed by rotation; try a newer one") from None
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
