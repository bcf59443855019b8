"""Files of a checkpoint: how one rank writes its values, and which bytes of which files hold any range of a parameter.

A rank's file is a safetensors file of one-dimensional fp32 tensors, each named `quantity:offset:parameter`: the values
from element `offset` of the flattened parameter. All master weights come first, then Adam's two moments.
Tensor-parallel ranks write ranges of slices, flattened by themselves (`quantity:offset:parameter@1:0:96`,
tensor_slices.py). The format depends neither on DeepSpeed nor on the number of ranks or the ZeRO stage; any reader of
safetensors can use it.
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
from typing import Any

import torch

from kdscale import files
from kdscale.distill.parallel.tensor_slices import TensorSlice, cover_parameter, parse_slice_name, ranges_in_slices
from kdscale.errors import CheckpointError
from kdscale.models.parameter_map import ParameterRange
from kdscale.weights import TensorInfo
from kdscale.weights.header import read_header
from kdscale.weights.writer import plan_shards
from kdscale_launch.watchdog import beat

MASTER = "master"  # the fp32 weight
QUANTITIES = (MASTER, "exp_avg", "exp_avg_sq")  # what is kept of each value
AVERAGE = "average"  # after them, where the teacher is an average of the student

_BYTES = 4  # of an fp32 value
_OPEN_FILES = 64
_BLOCK_VALUES = 1 << 24  # of one write, one hash update and one copy to a device: 64 MiB


def quantities_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What the files of a checkpoint with this manifest keep of each value."""
    return (*QUANTITIES, AVERAGE) if manifest.get(AVERAGE) is True else QUANTITIES


def cut_evenly(ranges: Iterable[ParameterRange], index: int, count: int) -> list[ParameterRange]:
    """Lay the ranges end to end and cut them into `count` near-equal stretches; what is in the `index`-th."""
    ranges = list(ranges)
    total, at, out = sum(span.length for span in ranges), 0, []
    low, high = total * index // count, total * (index + 1) // count
    for span in ranges:
        begin, end = max(low, at), min(high, at + span.length)
        if begin < end:
            out.append(ParameterRange(span.name, span.offset + begin - at, end - begin))
        at += span.length
    return out


@dataclass(frozen=True)
class WrittenFile:
    """Size and SHA-256 of a file, and of its beginning up to the last master weight."""

    bytes: int
    sha256: str
    weights_bytes: int
    weights_sha256: str


class WriteCancelled(Exception):  # noqa: N818 - not an error
    """`write_rank_file` was told to stop."""


def write_rank_file(
    path: Path, ranges: Sequence[ParameterRange], blocks: Iterable[torch.Tensor],
    cancelled: Callable[[], bool] = lambda: False, quantities: Sequence[str] = QUANTITIES,
) -> WrittenFile:  # fmt: skip
    """Write one rank's file, hash it on the way and flush it to the disk.

    `blocks` are the fp32 values on any device: every range of the first quantity, then every range of the next.
    Raises OSError, and WriteCancelled as soon as `cancelled()`; the file is then incomplete.
    """
    specs = {f"{name}:{span.offset}:{span.name}": TensorInfo((span.length,), "F32")
             for name in quantities for span in ranges}  # fmt: skip
    (layout,) = plan_shards(specs, 1 << 62)
    digest = hashlib.sha256(layout.header)
    weights_bytes, weights_sha256 = len(layout.header) + _BYTES * sum(span.length for span in ranges), ""
    with path.open("wb", buffering=0) as stream:
        _write(stream, memoryview(layout.header))
        written = len(layout.header)
        for block in blocks:
            assert block.dtype == torch.float32
            for chunk in block.detach().reshape(-1).split(_BLOCK_VALUES):
                if cancelled():
                    raise WriteCancelled(path)
                raw = chunk.cpu().contiguous().numpy().data.cast("B")
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
    beat()


@dataclass(frozen=True)
class StoredRange:
    """Values `offset` to `offset + length` of a parameter or slice; they begin at byte `begin` of `file`."""

    offset: int
    length: int
    file: Path
    begin: int


@dataclass(frozen=True)
class FileRead:
    """`length` values from byte `begin` of `file` go to element `target` of the tensor that is put together."""

    file: Path
    begin: int
    target: int
    length: int


class RankFileIndex:
    """Where everything is in the files of one checkpoint, from their headers alone.

    `shapes` are the parameters that the checkpoint says it holds. Raises CheckpointError unless the files hold every
    value of each of them exactly once, in all `quantities`, and nothing else.
    """

    def __init__(
        self, paths: Sequence[Path], shapes: Mapping[str, Sequence[int]], quantities: Sequence[str] = QUANTITIES
    ):
        self._quantities = tuple(quantities)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._slices: dict[str, dict[str, TensorSlice]] = {name: {} for name in self.shapes}  # parameter → slice name →
        self._stored: dict[tuple[str, str], list[StoredRange]] = {}  # by (quantity, slice name)
        for path in paths:
            self._add_file(path)
        for parameter in self.shapes:
            self._check_complete(parameter, str(paths[0].parent) if paths else "checkpoint")

    def _add_file(self, path: Path) -> None:
        for key, entry in read_header(path).items():
            quantity, _, rest = key.partition(":")
            offset, _, name = rest.partition(":")
            parameter, tensor_slice = parse_slice_name(name)
            if quantity not in self._quantities or parameter not in self.shapes or not offset.isdecimal():
                raise CheckpointError(f"{path}", expected="ranges of the student's parameters", got=f"tensor {key}")
            length = (entry.end - entry.begin) // _BYTES
            if entry.dtype != "F32" or entry.shape != (length,):
                raise CheckpointError(f"{path}: {key}", expected="flat F32", got=f"{entry.dtype}{entry.shape}")
            stored = self._stored.setdefault((quantity, name), [])
            stored.append(StoredRange(int(offset), length, path, entry.begin))
            self._slices[parameter][name] = tensor_slice or TensorSlice.all_rows(self.shapes[parameter])

    def _check_complete(self, parameter: str, where: str) -> None:
        shape = self.shapes[parameter]
        slices = self._slices[parameter] or {parameter: TensorSlice.all_rows(shape)}
        if list(slices) != [parameter] and not cover_parameter(list(slices.values()), shape):
            got = ", ".join(sorted(slices))[:200]
            raise CheckpointError(
                f"{where}: {parameter}", expected=f"slices that make up all of {list(shape)}", got=got
            )
        for (name, tensor_slice), quantity in itertools.product(slices.items(), self._quantities):
            stored = self._stored.setdefault((quantity, name), [])
            stored.sort(key=lambda entry: entry.offset)
            values = math.prod(shape if name == parameter else tensor_slice.shape(shape))
            ends = [0, *(entry.offset + entry.length for entry in stored)]
            if ends != [*(entry.offset for entry in stored), values]:
                raise CheckpointError(
                    f"{where}: {quantity} of {name}",
                    expected=f"{values} values, each once",
                    got=f"ranges {[(entry.offset, entry.length) for entry in stored]}"[:200],
                )

    def plan(self, quantity: str, span: ParameterRange) -> list[FileRead]:
        """The reads that make up a range of a parameter or of any slice of it, in order.

        Raises CheckpointError when it is not in the checkpoint.
        """
        parameter, tensor_slice = parse_slice_name(span.name)
        if quantity not in self._quantities or parameter not in self.shapes:
            raise CheckpointError(f"the checkpoint has no parameter {span.name}")
        shape, end = self.shapes[parameter], span.offset + span.length
        if end > math.prod(tensor_slice.shape(shape) if tensor_slice else shape):
            raise CheckpointError(
                f"parameter {span.name} in the checkpoint", expected=f"at least {end:,} values", got=str(list(shape))
            )
        if span.name in self._slices[parameter]:
            return self._reads(quantity, span)
        names, reads = {stored: name for name, stored in self._slices[parameter].items()}, []
        for needed in (tensor_slice or TensorSlice.all_rows(shape)).ranges(shape, span.offset, span.length):
            for holder, copied in ranges_in_slices(list(names), shape, needed.source, needed.length):
                for read in self._reads(quantity, ParameterRange(names[holder], copied.source, copied.length)):
                    reads.append(replace(read, target=needed.target + copied.target + read.target))
        return reads

    def _reads(self, quantity: str, span: ParameterRange) -> list[FileRead]:
        """The reads that make up a range of a parameter or slice that was stored under this very name."""
        stored, end = self._stored[quantity, span.name], span.offset + span.length
        first = bisect.bisect_right(stored, span.offset, key=lambda entry: entry.offset) - 1
        reads = []
        for entry in itertools.takewhile(lambda entry: entry.offset < end, stored[max(first, 0) :]):
            begin, stop = max(entry.offset, span.offset), min(entry.offset + entry.length, end)
            if begin < stop:
                byte = entry.begin + _BYTES * (begin - entry.offset)
                reads.append(FileRead(entry.file, byte, begin - span.offset, stop - begin))
        return reads


class RankFileReader:
    """Reads ranges of parameters straight into tensors; a context manager.

    The files used last stay open, because neighbouring slices take turns row by row.
    """

    def __init__(self, index: RankFileIndex):
        self._index = index
        self._open: dict[Path, RawIOBase] = {}

    def fill(self, quantity: str, span: ParameterRange, out: torch.Tensor) -> None:
        """Fill the flat tensor `out`, on any device and of any float dtype, with a range of its length.

        Raises CheckpointError when a file has shrunk or gone since its header was read.
        """
        if out.device.type == "cpu" and out.dtype == torch.float32:
            for read in self._index.plan(quantity, span):
                self._read(read.file, read.begin, out.narrow(0, read.target, read.length))
            return
        for at in range(0, span.length, _BLOCK_VALUES):
            block = torch.empty(min(_BLOCK_VALUES, span.length - at))
            self.fill(quantity, ParameterRange(span.name, span.offset + at, block.numel()), block)
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
        beat()

    def _stream(self, path: Path) -> RawIOBase:
        if path not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[path] = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is gone", hint="a newer checkpoint has replaced it: use that") from None
        return self._open[path]

    def close(self) -> None:
        """Close the files that are still open."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def __enter__(self) -> RankFileReader:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
