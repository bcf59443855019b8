"""Which tensors on disk make up which parameter of the transformers model; no other place knows.

A parameter is one tensor on disk or several back to back: those that a family joins along the first dimension, and
those of the experts of a mixture, which the model stacks. Either way the values of the tensors, in the family's order,
are the values of the parameter in storage order. All names come from the family file (TensorSpec).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kdscale.errors import CheckpointError
from kdscale.families import Family, TensorSpec, load_family
from kdscale.families.linear_maps import is_linear_map
from kdscale.weights import Checkpoint
from kdscale.weights.tensor_bytes import torch_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class ParameterRange:
    """Elements `offset` to `offset + length` of the flattened parameter `name`, or of one slice of it."""

    name: str
    offset: int
    length: int


def parameter_ranges(specs: Mapping[str, TensorSpec]) -> dict[str, ParameterRange]:
    """Tensor on disk → the range of the parameter that its values are; `specs` is `Family.tensors` or a part of it."""
    ends: Counter[str] = Counter()
    ranges: dict[str, ParameterRange] = {}
    for name, spec in specs.items():
        length = math.prod(spec.shape)
        ranges[name] = ParameterRange(spec.parameter, ends[spec.parameter], length)
        ends[spec.parameter] += length
    return ranges


def assemble(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Parameter → tensor, joined and stacked from the tensors on disk that `specs` describes and `read` gives."""
    names_of: dict[str, dict[int | None, list[str]]] = {}  # parameter → expert (None outside experts) → on disk
    for name, spec in specs.items():
        names_of.setdefault(spec.parameter, {}).setdefault(spec.expert, []).append(name)
    out: dict[str, Tensor] = {}
    for parameter, by_expert in names_of.items():
        joined = [
            read(names[0]) if len(names) == 1 else torch.cat([read(n) for n in names]) for names in by_expert.values()
        ]
        out[parameter] = joined[0] if None in by_expert else torch.stack(joined)
    return out


def parameter_shapes(specs: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    """Parameter → its shape in the model: `assemble` without reading."""
    meta = assemble(specs, lambda name: torch.empty(specs[name].shape, device="meta"))
    return {parameter: tuple(tensor.shape) for parameter, tensor in meta.items()}


def trained_tensors(
    source: Checkpoint, shapes: Mapping[str, Shape], tied: Mapping[str, str]
) -> dict[str, ParameterRange]:
    """The range that each tensor of `source` is of a trained parameter; other tensors (buffers) are left out.

    `shapes`: the trained parameters; `tied`: other names of a parameter. Raises CheckpointError when a trained
    parameter is not complete among the tensors of `source`, or has another shape: its training would be lost silently.
    """
    family = load_family(source.config, str(source.path / "config.json"))
    specs, copies = family.tensors(source.config), family.tied(source.config)
    ranges, on_disk = parameter_ranges(specs), parameter_shapes(specs)
    trained: dict[str, ParameterRange] = {}
    for tensor, original in copies.items():
        if tensor in shapes:  # the model's first name of what is tied is the other one (XLM-R's head)
            ranges[tensor] = replace(ranges[original], name=tensor)
            specs[tensor], on_disk[tensor] = specs[original], on_disk[original]
            copies = {**copies, original: tensor}
    for name in source.names:
        full_name = family.full_name(name)
        original = copies.get(full_name, tied.get(full_name, full_name))
        if original in ranges and ranges[original].name in shapes:
            got, expected = source.spec(name).shape, specs[original].shape
            if got != expected:
                raise CheckpointError(f"{source.path}: tensor {name}", expected=str(list(expected)), got=str(list(got)))
            trained[name] = ranges[original]
    values: Counter[str] = Counter()
    for span in set(trained.values()):
        values[span.name] += span.length
    if lost := [name for name, shape in shapes.items() if values[name] != math.prod(shape)]:
        raise CheckpointError(
            f"{source.path}: parameters that are trained but not (wholly) on disk",
            expected="the names of the model's parameters",
            got=", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else ""),
            hint="distillation supports the families that docs/reference/families.md lists",
        )
    for name, shape in shapes.items():
        if on_disk[name] != tuple(shape):
            raise CheckpointError(
                f"{source.path}: parameter {name}", expected=str(list(shape)), got=f"{list(on_disk[name])} on disk"
            )
    return trained


class ParameterReader:
    """A checkpoint by the names of the model's parameters; make one with `ParameterReader.open`."""

    def __init__(self, checkpoint: Checkpoint, family: Family):
        self.checkpoint, self.family = checkpoint, family
        self._tensors: dict[str, dict[str, ParameterRange]] = {}
        every = family.tensors(checkpoint.config)
        self._buffers = {name: spec.parameter for name, spec in every.items() if spec.buffer}
        specs = {name: spec for name, spec in every.items() if not spec.buffer}
        for name, span in parameter_ranges(specs).items():
            self._tensors.setdefault(span.name, {})[name] = span
        tied = family.tied(checkpoint.config)
        self._originals = {family.parameter(name): specs[original].parameter for name, original in tied.items()}

    @classmethod
    def open(cls, path: Path) -> ParameterReader:
        """Read the headers of a checkpoint folder.

        Raises CheckpointError for an unknown family, for quantised weights, and when config.json and the weights
        disagree.
        """
        checkpoint = Checkpoint.open(path)
        family = load_family(checkpoint.config, str(path / "config.json"))
        checkpoint.verify_against(family)
        return cls(checkpoint, family)

    def names(self) -> set[str]:
        """The parameters that are on disk."""
        return set(self._tensors)

    def buffers(self) -> dict[str, Tensor]:
        """Those that are stored, by their names in the model: read now, for they are small."""
        return {buffer: self.checkpoint.tensor(name) for name, buffer in self._buffers.items()}

    def linear_maps(self) -> dict[str, torch.dtype]:
        """The weights of the linear maps within layers, and the dtype of each on disk."""
        specs = self.family.tensors(self.checkpoint.config)
        return {
            spec.parameter: torch_dtype(self.checkpoint.spec(name).dtype)
            for name, spec in specs.items()
            if is_linear_map(spec)
        }

    def numel(self, parameter: str) -> int:
        """How many values a parameter has on disk; 0 when it is not there."""
        return sum(span.length for span in self._of(parameter).values())

    def fill(self, parameter: str, begin: int, out: torch.Tensor) -> None:
        """Values `begin` to `begin + len(out)` of a parameter, in storage order, into the flat `out` in its dtype."""
        end = begin + out.numel()
        for name, span in self._of(parameter).items():
            low, high = max(begin, span.offset), min(end, span.offset + span.length)
            if low < high:
                self.checkpoint.fill(name, low - span.offset, out[low - begin : high - begin])

    def _of(self, parameter: str) -> dict[str, ParameterRange]:
        """The tensors of a parameter, by any name of one that is tied."""
        return self._tensors.get(self._originals.get(parameter, parameter), {})
