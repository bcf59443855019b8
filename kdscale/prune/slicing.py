"""Which slice of a teacher tensor the student keeps, from the axis names that the family gives it. One place only.

Everything here works on the tensors as they are on disk, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdscale.families import Family, TensorSpec
from kdscale.prune.plan import Plan


class Slicer:
    """The plan, seen from one tensor: which teacher tensor it comes from and which indices of each dimension stay."""

    def __init__(self, config: dict[str, Any], family: Family, plan: Plan):
        self.family, self.plan = family, plan
        self.teacher_config = config
        self.student_config = family.student_config(config, plan.student.dims(), plan.kept.layers)

    def outer(self) -> Iterator[tuple[str, str, TensorSpec]]:
        """(teacher name, student name, teacher spec) of the tensors outside the layers."""
        for name, spec in self.family.outer_tensors(self.teacher_config).items():
            yield name, name, spec

    def layer(self, position: int) -> Iterator[tuple[str, str, TensorSpec]]:
        """The same for the student's layer `position`, which the teacher may number otherwise."""
        theirs = self.family.layer_tensors(self.teacher_config, self.plan.kept.layers[position])
        ours = self.family.layer_tensors(self.student_config, position)
        for (source, spec), target in zip(theirs.items(), ours, strict=True):
            yield source, target, spec

    def slice(self, tensor: Tensor, spec: TensorSpec, position: int | None) -> Tensor:
        """The student's part of `tensor`, in its dtype; the same tensor when nothing of it is cut.

        `position` is the student's layer, None outside the layers. Norm weights over hidden get the plan's
        `norm_scale`, multiplied in fp32.
        """
        for dimension, axis in enumerate(spec.axes):
            kept = self.kept(axis, position)
            if kept is not None:
                tensor = tensor.index_select(dimension, torch.tensor(kept, device=tensor.device))
        if self.plan.norm_scale != 1.0 and is_hidden_norm(spec):
            tensor = (tensor.float() * self.plan.norm_scale).to(tensor.dtype)
        return tensor

    def kept(self, axis: str, position: int | None) -> list[int] | None:
        """Indices that stay along `axis` (as the family names tensor dimensions); None: all of them."""
        name, times, _ = axis.partition("*")
        if name not in ("hidden", "ffn", "heads", "kv_heads"):
            return None
        if getattr(self.plan.student, name) == getattr(self.plan.teacher, name):
            return None
        if name == "hidden":
            return self.plan.kept.hidden
        assert position is not None, f"a tensor outside the layers has the axis {axis}"
        units: list[int] = getattr(self.plan.kept, name)[position]
        if not times:
            return units
        width = self.plan.teacher.head_dim
        return [unit * width + offset for unit in units for offset in range(width)]


def is_hidden_norm(spec: TensorSpec) -> bool:
    """Whether this is the weight of a norm over the residual stream (not a per-head one)."""
    return spec.role.endswith("_norm") and spec.axes == ("hidden",)
