"""Writes a checkpoint's tensors one at a time, straight to their place in their file.

Names, shapes and dtypes are known before the first tensor, so every header and every offset is too: nothing is
buffered but the tensor (or the block of one) at hand, tensors may come in any order, and equal tensors give equal
bytes. Files carry a temporary name until all of them are complete; the index is renamed last.

With a journal a killed writer's work can be resumed: `commit` puts what was written so far on the disk and its names
into the journal, and a new writer of the same shards in the same folder starts from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kdscale.errors import RunFolderError, SelfCheckError
from kdscale.files import explain_os_errors, fsync_dir, fsync_file, read_own_json, write_json
from kdscale.weights.header import DTYPE_BYTES, LENGTH_BYTES, MAX_HEADER_BYTES, QUANTIZED_BYTES
from kdscale.weights.reader import TensorInfo
from kdscale.weights.tensor_bytes import torch_dtype
from kdscale.weights.unreadable import INDEX_FILE, SINGLE_FILE
from kdscale_launch.watchdog import beat

if TYPE_CHECKING:
    import torch

_ALIGN = 8  # the header is padded so that the first tensor starts on a multiple of the widest dtype
_WRITE_BYTES = 1 << 26
_BYTES = DTYPE_BYTES | QUANTIZED_BYTES


@dataclass(frozen=True)
class ShardPlan:
    """One file that will be written: its name, its header (length and padding included) and where each tensor goes."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(
    specs: Mapping[str, TensorInfo], max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> list[ShardPlan]:
    """Divide tensors into shards in the order of `specs`; one larger than `max_shard_bytes` has a shard of its own.

    Raises ValueError for an unknown dtype, no tensors or a non-positive limit.
    """
    if max_shard_bytes < 1 or not specs:
        raise ValueError(f"need tensors and a positive max_shard_bytes, got {len(specs)} and {max_shard_bytes}")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _nbytes(name, spec)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    files = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [_shard(file, names, specs, metadata or {}) for file, names in zip(files, groups, strict=True)]


def _nbytes(name: str, spec: TensorInfo) -> int:
    if spec.dtype not in _BYTES:
        raise ValueError(f"{name}: dtype {spec.dtype!r} is none of {', '.join(_BYTES)}")
    return math.prod(spec.shape) * _BYTES[spec.dtype]


def _shard(file: str, names: Sequence[str], specs: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> ShardPlan:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at, begins = 0, {}
    # wide dtypes first: every tensor then starts on a multiple of its own width, which readers that map files need
    for name in sorted(names, key=lambda item: -_BYTES[specs[item].dtype]):
        begins[name], end = at, at + _nbytes(name, specs[name])
        header[name] = {"dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGN)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: a header of {len(text):,} bytes; lower max_shard_bytes")
    start = LENGTH_BYTES + len(text)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return ShardPlan(file, raw, {name: start + begin for name, begin in begins.items()}, start + at)


class ShardWriter:
    """Writes the tensors of `specs` into `folder` in the standard layout; a context manager that closes on success.

    One file `model.safetensors`, or `model-00001-of-0000N.safetensors` ... and their index. An exception inside the
    `with` block leaves none of them. With a `journal` (a file outside `folder`) it leaves what was committed; then
    `written` are the names that an earlier writer committed, and they cannot be added again. One process at a time may
    write. Raises RunFolderError at once when the disk has no room for all tensors.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorInfo],
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        journal: Path | None = None,
    ):
        self.folder, self._specs = folder, dict(specs)
        self.shards = plan_shards(self._specs, max_shard_bytes, metadata)
        self._position = {name: (i, at) for i, shard in enumerate(self.shards) for name, at in shard.offsets.items()}
        self._closed = False
        self._journal = journal
        self._dirty: set[int] = set()
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.written = self._committed_before()
            self._left = set(self._specs) - self.written
            if not self.written:
                self._create_files()

    def _create_files(self) -> None:
        """Create every file at its full size, with its header and holes for the tensors."""
        for i in range(len(self.shards)):
            self._temporary(i).unlink(missing_ok=True)
        need, free = sum(shard.size for shard in self.shards), shutil.disk_usage(self.folder).free
        if need > free:
            raise RunFolderError(
                f"{self.folder}: no room for the weights",
                expected=f"{need:,} bytes",
                got=f"{free:,} bytes free",
                hint="free some space or choose another folder",
            )
        for i, shard in enumerate(self.shards):
            with self._temporary(i).open("wb") as stream:
                stream.write(shard.header)
                stream.truncate(shard.size)
        self._dirty.update(range(len(self.shards)))

    def _committed_before(self) -> set[str]:
        """What an earlier writer of these very shards committed here; nothing when a header or a file differs."""
        journal = read_own_json(self._journal, _is_journal) if self._journal is not None else None
        if journal is None:
            return set()
        for i, shard in enumerate(self.shards):
            # a writer that was killed between renaming and forgetting its journal left files with their final names
            if self.files[i].exists() and not self._temporary(i).exists():
                self.files[i].replace(self._temporary(i))
            if not self._temporary(i).exists() or self._temporary(i).stat().st_size != shard.size:
                return set()
        return set(journal["written"]) if journal["layout"] == self._headers_hash() else set()

    def _headers_hash(self) -> str:
        return hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()

    @property
    def files(self) -> list[Path]:
        """The final names of the weight files."""
        return [self.folder / shard.file for shard in self.shards]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor must have to be written under `name`."""
        return torch_dtype(self._specs[name].dtype)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Raises SelfCheckError unless it was announced with this shape and dtype, once."""
        self.add_blocks(name, [tensor])

    def add_blocks(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write one tensor that comes as blocks of its rows, in order; only one block has to be in memory.

        Raises SelfCheckError unless the rows together are what was announced.
        """
        if name not in self._left:
            got = "the second tensor of this name" if name in self._specs else "a name that was not announced"
            raise SelfCheckError(f"{self.folder}: cannot write {name}", got=got)
        spec = self._specs[name]
        index, at = self._position[name]
        end, rows, got_so_far = at + _nbytes(name, spec), 0, TensorInfo((), "nothing")
        with (
            explain_os_errors(self.folder / self.shards[index].file),
            self._temporary(index).open("r+b", buffering=0) as stream,
        ):
            stream.seek(at)
            for block in blocks:
                rows += block.shape[0] if block.ndim else 0
                got_so_far = TensorInfo((rows, *block.shape[1:]) if block.ndim else (), _dtype_name(block.dtype))
                wrong = (got_so_far.shape[1:], got_so_far.dtype) != (spec.shape[1:], spec.dtype)
                if wrong or at + block.nbytes > end:
                    break
                _write_all(stream, block)
                at += block.nbytes
        if got_so_far != spec:
            raise SelfCheckError(f"{self.folder}: cannot write {name}", expected=str(spec), got=str(got_so_far))
        self._left.remove(name)
        self._dirty.add(index)

    def commit(self) -> None:
        """Make what was written so far survive a kill, when there is a journal."""
        if self._journal is None:
            return
        with explain_os_errors(self.folder):
            for index in sorted(self._dirty):
                fsync_file(self._temporary(index))
            self._dirty.clear()
        write_json(self._journal, {"layout": self._headers_hash(), "written": sorted(set(self._specs) - self._left)})

    def close(self) -> None:
        """Flush and rename the files, then write the index. Raises SelfCheckError when a tensor was not written."""
        if self._closed:
            return
        if self._left:
            lost = sorted(self._left)
            raise SelfCheckError(
                f"{self.folder}: not all tensors were written",
                expected=f"{len(self._specs)} tensors",
                got=f"{len(self._specs) - len(lost)}; the first that is missing is {lost[0]}",
            )
        with explain_os_errors(self.folder):
            for i in range(len(self.shards)):
                fsync_file(self._temporary(i))
            # What an earlier run with another shard size left must not be taken for part of this checkpoint.
            for old in (
                self.folder / INDEX_FILE,
                self.folder / SINGLE_FILE,
                *self.folder.glob("model-*-of-*.safetensors"),
            ):
                old.unlink(missing_ok=True)
            for i, final in enumerate(self.files):
                self._temporary(i).replace(final)
            fsync_dir(self.folder)
        self._closed = True
        if len(self.shards) > 1:
            total = sum(_nbytes(name, spec) for name, spec in self._specs.items())
            where = {name: self.shards[self._position[name][0]].file for name in self._specs}
            write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})

    def discard(self) -> None:
        """Remove what was written so far; does nothing after `close`, or with a journal."""
        if not self._closed and self._journal is None:
            for i in range(len(self.shards)):
                self._temporary(i).unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error_type is None:
                self.close()
        finally:
            self.discard()

    def _temporary(self, index: int) -> Path:
        # what a journal names is for the next process to resume, and must not look like a dead one's leftovers
        mark = ".unfinished" if self._journal else f".partial-{os.getpid()}"
        return self.folder / f"{mark}-{self.shards[index].file}"


def _write_all(stream: RawIOBase, block: torch.Tensor) -> None:
    """Write every byte of `block`, some at a time: some systems refuse a single write of more than 2 GiB."""
    import torch

    remaining = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while remaining:
        remaining = remaining[stream.write(remaining[:_WRITE_BYTES]) :]
        beat()


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name in _BYTES if torch_dtype(name) == dtype), str(dtype))


def _is_journal(value: object) -> bool:
    """Whether a JSON value is what a writer's journal holds: the tensors written so far, and of which layout."""
    if not isinstance(value, dict) or "layout" not in value or not isinstance(value.get("written"), list):
        return False
    return all(isinstance(name, str) for name in value["written"])
