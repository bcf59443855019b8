"""Which slice of a teacher tensor the student keeps, from the axis names that the family gives it. One place only.

Everything here works on the tensors as they are on disk, one at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.families import Family, TensorSpec
from kdscale.families.dims import NEVER_CUT
from kdscale.families.schema import axis_blocks, axis_groups, axis_size, block_size
from kdscale.families.writers import Writer, layer_writers
from kdscale.prune.plan import Plan

NORM_BEFORE = {"attention": "attn_norm", "ffn": "ffn_norm"}  # role of the norm, by the component that reads it


class SlicedTensor(NamedTuple):
    """A tensor of the student, `target` on disk, and the teacher's it is cut from: `source`, which `spec` describes.

    `position` is the student's layer, None outside the layers.
    """

    source: str
    target: str
    spec: TensorSpec
    position: int | None


class Slicer:
    """The plan, seen from one tensor: which teacher tensor it comes from and which indices of each dimension stay."""

    def __init__(self, config: dict[str, Any], family: Family, plan: Plan):
        self.family, self.plan = family, plan
        self.teacher_config = config
        self.student_config = family.student_config(config, plan.student.dims(), plan.kept.layers)
        self._sizes = plan.teacher.dims().sizes() | family.fixed_sizes
        # A model that multiplies embeddings by √hidden takes the smaller √ of the student: its file makes up for it.
        scaled = family.data.embed_multiplier == "sqrt_hidden"
        self.embed_factor = math.sqrt(plan.teacher.hidden / plan.student.hidden) if scaled else 1.0
        # A tied head has its embedding's factor, which the final norm takes out again.
        self.final_factor = plan.norm_scale / self.embed_factor if family.tied(config) else plan.norm_scale

    def tensors(self) -> Iterator[SlicedTensor]:
        """All tensors of the student: those outside the layers, then layer by layer."""
        yield from self.outer()
        for position in range(self.plan.student.layers):
            yield from self.layer(position)

    def outer(self) -> Iterator[SlicedTensor]:
        """The tensors outside the layers."""
        for name, spec in self.family.outer_tensors(self.teacher_config).items():
            yield SlicedTensor(name, name, spec, None)

    def layer(self, position: int) -> Iterator[SlicedTensor]:
        """The tensors of the student's layer `position`, which the teacher may number otherwise; kept experts only."""
        teacher = self.family.layer_tensors(self.teacher_config, self.plan.kept.layers[position])
        student = self.family.layer_tensors(self.student_config, position)
        experts = self.kept("experts", position) if self.cuts("experts") else None
        stay = {
            name: spec
            for name, spec in teacher.items()
            if spec.expert is None or experts is None or spec.expert in experts
        }
        for (source, spec), target in zip(stay.items(), student, strict=True):
            yield SlicedTensor(source, target, spec, position)

    def carried_indices(self, name: str) -> list[list[int] | None]:
        """The indices that stay along each dimension of a tensor that goes along with the language model."""
        return [None if axis is None else self.kept(axis, None) for axis in self.family.carried_axes(name)]

    def slice(self, tensor: Tensor, spec: TensorSpec, position: int | None) -> Tensor:
        """The student's part of `tensor`, in its dtype; the same tensor when nothing of it is cut or rescaled.

        `position` is the student's layer, None outside the layers.
        """
        if spec.stacked:
            return torch.stack([self.slice_expert(tensor[e], spec, position, e) for e in self.kept_experts(position)])
        for dimension, indices in enumerate(self.kept_indices(spec, position)):
            if indices is not None:
                tensor = tensor.index_select(dimension, torch.tensor(indices, device=tensor.device))
        return self.rescale(tensor, spec)

    def kept_experts(self, position: int | None) -> list[int]:
        """The teacher's experts that the student's layer `position` keeps."""
        assert position is not None, "there are no experts outside the layers"
        return self.plan.kept.experts[position]

    def slice_expert(self, tensor: Tensor, spec: TensorSpec, position: int | None, expert: int) -> Tensor:
        """The student's part of what a tensor that holds those of all experts has of `expert`."""
        for dimension, axis in enumerate(spec.axes[1:]):
            if (indices := self.kept(axis, position, expert)) is not None:
                tensor = tensor.index_select(dimension, torch.tensor(indices, device=tensor.device))
        return tensor

    def rescale(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        """What the student's values are multiplied by, in fp32: the same tensor where that is 1.

        Gains of norms over hidden get the plan's `norm_scale`, and embeddings what their multiplier lost.
        """
        if is_hidden_norm(spec):
            factor = self.final_factor if spec.role == "final_norm" else self.plan.norm_scale
            added = self.family.data.norm.added
            if factor != 1.0:
                tensor = ((tensor.float() + added) * factor - added).to(tensor.dtype)
        if spec.role == "embed" and self.embed_factor != 1.0:
            tensor = (tensor.float() * self.embed_factor).to(tensor.dtype)
        return tensor

    def kept_indices(self, spec: TensorSpec, position: int | None) -> list[list[int] | None]:
        """The indices that stay along each dimension of a teacher tensor; None: all of them."""
        return [self.kept(axis, position, spec.expert) for axis in spec.axes]

    def cuts(self, axis: str) -> bool:
        """Whether the student has fewer indices along `axis` than the teacher."""
        return any(self._is_cut(factor) for block in axis_blocks(axis) for factor in block)

    def size(self, axis: str) -> int:
        """The teacher's size of `axis`."""
        return axis_size(axis, self._sizes)

    def writers(self, position: int) -> dict[str, Writer]:
        """The projections of the student's layer `position` that write to the residual stream, by role."""
        return layer_writers(self.family, self.student_config, position)

    def indices(self, axis: str, position: int | None, device: torch.device) -> Tensor:
        """The teacher's indices that stay along `axis` in the student's layer `position`; all where it is uncut."""
        kept = self.kept(axis, position)
        return torch.tensor(range(self.size(axis)) if kept is None else kept, device=device)

    def kept(self, axis: str, position: int | None, expert: int | None = None) -> list[int] | None:
        """Indices that stay along `axis` (as the family names tensor dimensions); None: all of them.

        `position` is the student's layer, `expert` the teacher's expert for a tensor that each expert has.
        """
        if not self.cuts(axis):
            return None
        out: list[int] = []
        start = 0
        for block in axis_blocks(axis):
            sizes = [factor if isinstance(factor, int) else self._sizes[factor] for factor in block]
            units = [self._units(factor, size, position, expert) for factor, size in zip(block, sizes, strict=True)]
            strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
            out += [start + sum(map(int.__mul__, choice, strides)) for choice in itertools.product(*units)]
            start += math.prod(sizes)
        return out if (groups := axis_groups(axis)) is None else self._by_group(axis, out, self._sizes[groups])

    def _by_group(self, axis: str, indices: list[int], groups: int) -> list[int]:
        """Indices along the blocks of an axis one after the other → their places where each group's stand together."""
        places: list[int] = []
        before, whole = 0, axis_size(axis, self._sizes) // groups
        for block in axis_blocks(axis):
            width = block_size(block, self._sizes) // groups
            places += [group * whole + before + i for group in range(groups) for i in range(width)]
            before += width
        return sorted(places[index] for index in indices)

    def _is_cut(self, factor: str | int) -> bool:
        if isinstance(factor, int) or factor in NEVER_CUT or factor in self.family.data.sizes:
            return False
        return bool(getattr(self.plan.student, factor) < getattr(self.plan.teacher, factor))

    def _units(self, factor: str | int, size: int, position: int | None, expert: int | None) -> list[int]:
        """Kept indices of one factor of an axis."""
        if not self._is_cut(factor):
            return list(range(size))
        if factor == "hidden":
            return self.plan.kept.hidden
        if factor == "layers":  # a table of all layers
            return self.plan.kept.layers
        assert position is not None, f"a tensor outside the layers has the axis {factor}"
        return self.plan.kept.units(str(factor), position, expert)


class SlicedStudent:
    """The student's tensors by their names on disk, each sliced when it is asked for, without any regression.

    `read` gives a tensor of the teacher by its name on disk (`Checkpoint.tensor`).
    """

    def __init__(self, slicer: Slicer, read: Callable[[str], Tensor]):
        self.slicer, self._read = slicer, read
        self.origins = {tensor.target: tensor for tensor in slicer.tensors()}

    def tensor(self, name: str) -> Tensor:
        """One tensor of the student; a TensorSource for a LayerStream."""
        origin = self.origins[name]
        return self.slicer.slice(self._read(origin.source), origin.spec, origin.position)


def is_hidden_norm(spec: TensorSpec) -> bool:
    """Whether this is the gain of a norm over the residual stream (not a per-head one)."""
    return spec.role.endswith("_norm") and spec.axes == ("hidden",)
