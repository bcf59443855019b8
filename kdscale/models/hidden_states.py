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
from kdscale.files import explain_os_errors, fsync_file

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


class _Slot(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


class HiddenStates:
    """A list of tensors, one [B, S, D] a batch, whose sizes never change; indexing and assignment as with a list.

    The first ones stay in memory (on `device`) while the budget lasts; the others are read from and written to a file.
    `save` puts all of them into a file that `load` opens again, in this process or another one.
    """

    def __init__(self, scratch: Scratch = IN_MEMORY, device: torch.device | None = None):
        self._scratch, self._device = scratch, device or torch.device("cpu")
        self._slots: list[_Slot] = []
        self._memory: dict[int, Tensor] = {}
        self._in_memory = 0
        self._file: Path | None = None  # what was saved last
        self._fresh: set[int] = set()  # spooled since then, and so in the other file
        self._spool = None if scratch.folder is None else scratch.folder / "spool.bin"

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, value: Tensor) -> None:
        end = self._slots[-1].offset + self._slots[-1].nbytes if self._slots else 0
        self._slots.append(_Slot(tuple(value.shape), value.dtype, end, value.nbytes))
        if self._spool is None or self._in_memory + value.nbytes <= self._scratch.activation_bytes:
            self._in_memory += value.nbytes
            self._memory[len(self._slots) - 1] = value
        else:
            self[len(self._slots) - 1] = value

    def __getitem__(self, index: int) -> Tensor:
        if index in self._memory:
            return self._memory[index]
        slot = self._slots[index]
        file = self._spool if index in self._fresh else self._file
        assert file is not None
        raw = torch.empty(slot.nbytes, dtype=torch.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(slot.offset)
            view, count = raw.numpy().data, 0
            while count < slot.nbytes and (more := stream.readinto(view[count:])):
                count += more
        if count != slot.nbytes:
            raise _damaged(file, slot.nbytes, count)
        return raw.view(slot.dtype).reshape(slot.shape).to(self._device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        slot = self._slots[index]
        assert (tuple(value.shape), value.dtype) == (slot.shape, slot.dtype), "the states keep their shapes"
        if index in self._memory:
            self._memory[index] = value
            return
        assert self._spool is not None
        self._put(index, value)
        self._fresh.add(index)

    def save(self, path: Path) -> list[dict[str, Any]]:
        """Put everything into the file `path`, on the disk; returns where each tensor is, for `load`."""
        assert self._spool is not None, "states without a folder cannot be saved"
        for index in range(len(self)):
            if index not in self._fresh:
                self._put(index, self[index])
        with explain_os_errors(path):
            fsync_file(self._spool)
            self._spool.replace(path)
        self._file = path
        self._fresh.clear()
        return [{"shape": list(slot.shape), "dtype": str(slot.dtype)} for slot in self._slots]

    @classmethod
    def load(
        cls, path: Path, slots: Sequence[dict[str, Any]], scratch: Scratch, device: torch.device | None = None
    ) -> HiddenStates:
        """Open what `save` wrote. Raises FileError when the file is not as long as `slots` say."""
        states = cls(scratch, device)
        states._file = path
        offset = 0
        for slot in slots:
            dtype = _DTYPES[slot["dtype"]]
            nbytes = torch.Size(slot["shape"]).numel() * dtype.itemsize
            states._slots.append(_Slot(tuple(slot["shape"]), dtype, offset, nbytes))
            offset += nbytes
        if path.stat().st_size != offset:
            raise _damaged(path, offset, path.stat().st_size)
        for index, one in enumerate(states._slots):
            if states._in_memory + one.nbytes > scratch.activation_bytes:
                break
            states._memory[index] = states[index]
            states._in_memory += one.nbytes
        return states

    def _put(self, index: int, value: Tensor) -> None:
        assert self._spool is not None
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with explain_os_errors(self._spool):
            if not self._spool.exists():
                self._spool.parent.mkdir(parents=True, exist_ok=True)
                self._spool.touch()
            with self._spool.open("r+b", buffering=0) as stream:
                stream.seek(self._slots[index].offset)
                while raw:
                    raw = raw[stream.write(raw) :]


def _damaged(file: Path, expected: int, got: int) -> FileError:
    hint = f"remove the folder {file.parent} and run the stage again: it starts over"
    return FileError(f"{file} is cut short", expected=f"{expected:,} bytes", got=f"{got:,} bytes", hint=hint)
