"""The calibration hidden states between two layers: in memory up to a budget, in a file beyond it.

B batch · S sequence · D hidden
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.errors import FileError
from kdscale.files import explain_os_errors, fsync_file, safe_join

ACTIVATION_BYTES = 1 << 30
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Scratch:
    """What a pass may use: bytes of memory for hidden states, and a folder for the rest and for resuming.

    Without a folder everything stays in memory and nothing can be resumed.
    """

    folder: Path | None = None
    activation_bytes: int = ACTIVATION_BYTES

    def subfolder(self, name: str) -> Scratch:
        """A folder of its own inside this one, for one of several passes or ranks."""
        return self if self.folder is None else replace(self, folder=self.folder / name)


IN_MEMORY = Scratch()


class _Extent(NamedTuple):
    """A tensor, and where its bytes are in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


class HiddenStates:
    """A list of tensors [B, S, D], one per batch, whose shapes never change; it is indexed and assigned like a list.

    The first ones stay in memory (on `device`) while the budget of `scratch` lasts; the others are read from and
    written to a file. `save` puts what changed since the last time into a file of its own; `load` opens those files
    again, in this process or another one.
    """

    def __init__(self, scratch: Scratch = IN_MEMORY, device: torch.device | None = None):
        self._scratch, self._device = scratch, device or torch.device("cpu")
        self._extents: list[_Extent] = []
        self._memory: dict[int, Tensor] = {}
        self._in_memory = 0
        self._saved: dict[int, Path] = {}  # the file that `save` last put each one into, at its offset
        self._changed: set[int] = set()  # since then; where they are not in memory, they are in the spool file
        self._spool = None if scratch.folder is None else scratch.folder / "spool.bin"

    def __len__(self) -> int:
        return len(self._extents)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, value: Tensor) -> None:
        """Add the tensor of one more batch."""
        end = self._extents[-1].offset + self._extents[-1].nbytes if self._extents else 0
        self._extents.append(_Extent(tuple(value.shape), value.dtype, end, value.nbytes))
        index = len(self._extents) - 1
        if self._spool is None or self._in_memory + value.nbytes <= self._scratch.activation_bytes:
            self._in_memory += value.nbytes
            self._memory[index] = value
        self[index] = value

    def __getitem__(self, index: int) -> Tensor:
        if index in self._memory:
            return self._memory[index]
        extent = self._extents[index]
        file = self._spool if index in self._changed else self._saved[index]
        assert file is not None
        raw = torch.empty(extent.nbytes, dtype=torch.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(extent.offset)
            view, count = raw.numpy().data, 0
            while count < extent.nbytes and (more := stream.readinto(view[count:])):
                count += more
        if count != extent.nbytes:
            raise _damaged(file, extent.nbytes, count)
        return raw.view(extent.dtype).reshape(extent.shape).to(self._device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        extent = self._extents[index]
        assert (tuple(value.shape), value.dtype) == (extent.shape, extent.dtype), "hidden states keep their shapes"
        if index in self._memory:
            self._memory[index] = value
        else:
            self._put(index, value)
        self._changed.add(index)

    @property
    def changed_bytes(self) -> int:
        """How much `save` would write now."""
        return sum(self._extents[index].nbytes for index in self._changed)

    def save(self, path: Path) -> list[dict[str, Any]]:
        """Write what changed to the file `path` and flush it to the disk; returns what `load` needs to know.

        That names the files with the rest, beside `path`: those of earlier calls, which must stay as long.
        """
        assert self._spool is not None, "hidden states without a folder cannot be saved"
        for index in self._changed & self._memory.keys():
            self._put(index, self._memory[index])
        if self._changed:
            with explain_os_errors(path):
                fsync_file(self._spool)
                self._spool.replace(path)
        self._saved |= dict.fromkeys(self._changed, path)
        self._changed.clear()
        return [
            {"shape": list(extent.shape), "dtype": str(extent.dtype), "file": self._saved[index].name}
            for index, extent in enumerate(self._extents)
        ]

    @classmethod
    def load(
        cls, folder: Path, tensors: Sequence[dict[str, Any]], scratch: Scratch, device: torch.device | None = None
    ) -> HiddenStates:
        """Open what `save` wrote into `folder`. Raises FileError when a file is shorter than `tensors` (what it
        returned) say, or missing."""
        states = cls(scratch, device)
        offset = 0
        for index, tensor in enumerate(tensors):
            dtype = _DTYPES[tensor["dtype"]]
            nbytes = torch.Size(tensor["shape"]).numel() * dtype.itemsize
            states._extents.append(_Extent(tuple(tensor["shape"]), dtype, offset, nbytes))
            states._saved[index] = safe_join(folder, tensor["file"])
            offset += nbytes
        ends = {states._saved[index]: extent.offset + extent.nbytes for index, extent in enumerate(states._extents)}
        for file, end in ends.items():
            if (size := file.stat().st_size if file.exists() else 0) < end:
                raise _damaged(file, end, size)
        for index, extent in enumerate(states._extents):
            if states._in_memory + extent.nbytes > scratch.activation_bytes:
                break
            states._memory[index] = states[index]
            states._in_memory += extent.nbytes
        return states

    def _put(self, index: int, value: Tensor) -> None:
        assert self._spool is not None
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with explain_os_errors(self._spool):
            if not self._spool.exists():
                self._spool.parent.mkdir(parents=True, exist_ok=True)
                self._spool.touch()
            with self._spool.open("r+b", buffering=0) as stream:
                stream.seek(self._extents[index].offset)
                while raw:
                    raw = raw[stream.write(raw) :]


def _damaged(file: Path, expected: int, got: int) -> FileError:
    hint = f"remove the folder {file.parent} and run the stage again: it starts over"
    return FileError(f"{file} is cut short", expected=f"at least {expected:,} bytes", got=f"{got:,} bytes", hint=hint)
