"""The calibration hidden states between two layers: in memory up to a budget, in a file beyond it. And what some models
carry beside the stream.

B batch · S sequence · D hidden · E what a state holds of a token, the stream and what is beside it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.errors import FileError
from kdscale.families import Family
from kdscale.families.schema import axis_blocks
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


Keys = dict[str, tuple[Tensor, Tensor]]  # keys and values [B, kv heads, S, head dim], by the kind of layers


@dataclass(frozen=True)
class BesideStream:
    """What a token's state holds behind its `hidden` numbers of the stream; nothing in most models.

    First the inputs that each of `layers` layers has of its own, `width` numbers each; then, by the name that
    transformers has for a kind of layers, the keys and values that later layers of the kind read: `keys` has their
    heads and head dimension. So a state is all that the rest of the model depends on, whatever layers it goes through.
    """

    hidden: int
    layers: int = 0
    width: int = 0
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, family: Family, config: Mapping[str, Any]) -> BesideStream:
        """What the layers of this model read beside the stream."""
        data, dims, kinds = family.data, family.dims(config), family.layer_kinds(config)
        width = 0 if data.layer_inputs is None else family.fixed_size(data.layer_inputs, config)
        keys: dict[str, tuple[int, int]] = {}
        if data.shared_keys_in is not None and any(data.shared_keys_in in each for each in kinds):
            (field_name,) = (rule.field for rule in data.layer_kinds if rule.field is not None)
            entry = next(entry for entry in data.layer_lists if entry.field == field_name)
            sizes = dims.sizes() | family.fixed_sizes
            for name, each in zip(family.layer_list(entry, config, dims.layers) or (), kinds, strict=True):
                if (cached := data.cached_of(each)) is not None:
                    ((_, heads, dim),) = axis_blocks(cached)
                    keys[name] = (sizes[str(heads)], sizes[str(dim)])
        return cls(dims.hidden, dims.layers, width, keys)

    @property
    def reads_more(self) -> bool:
        """Whether any layer reads more than the stream."""
        return self.size > self.hidden

    @property
    def size(self) -> int:
        """E."""
        return self.hidden + self.layers * self.width + sum(2 * heads * dim for heads, dim in self.keys.values())

    def stream(self, state: Tensor) -> Tensor:
        """[..., D] of [..., E]: the stream alone."""
        return state if state.shape[-1] == self.hidden else state[..., : self.hidden]

    def entering(self, hidden_BSD: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The state [B, S, E] before the first layer, from the stream and each layer's own input."""
        out = hidden_BSD.new_zeros(*hidden_BSD.shape[:-1], self.size)
        both = torch.cat([hidden_BSD, *(each.to(hidden_BSD.dtype) for each in inputs)], dim=-1)
        out[..., : both.shape[-1]] = both
        return out

    def with_stream(self, state: Tensor, hidden_BSD: Tensor) -> Tensor:
        """The state with another stream."""
        return torch.cat([hidden_BSD, state[..., self.hidden :]], dim=-1) if self.reads_more else hidden_BSD

    def input_of(self, state: Tensor, layer: int) -> Tensor | None:
        """What layer `layer` has of its own; None where layers have nothing."""
        begin = self.hidden + layer * self.width
        return state[..., begin : begin + self.width] if self.width else None

    def shared(self, state: Tensor) -> Keys:
        """The keys and values of the last layer of each kind that had some."""
        out, begin = Keys(), self.hidden + self.layers * self.width
        for kind, (heads, dim) in self.keys.items():
            both = state[..., begin : begin + 2 * heads * dim].unflatten(-1, (2, heads, dim)).transpose(1, 3)
            out[kind] = (both[:, :, 0], both[:, :, 1])
            begin += 2 * heads * dim
        return out

    def leaving(self, state: Tensor, hidden_BSD: Tensor, keys: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        """The state behind a layer, from the one before it."""
        inputs = state[..., self.hidden : self.hidden + self.layers * self.width]
        flat = [torch.stack(keys[kind], dim=2).transpose(1, 3).flatten(-3) for kind in self.keys]
        return torch.cat([hidden_BSD, inputs, *(each.to(hidden_BSD.dtype) for each in flat)], dim=-1)


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
