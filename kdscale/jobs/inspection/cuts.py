"""Which axes of a model can be cut, and the sizes of a few typical students. Arithmetic on sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from kdscale.families import Dims, Family
from kdscale.families.cuttable import ending_well
from kdscale.families.dims import SHAPE_AXES
from kdscale.weights import Checkpoint

_TOGETHER = ("hidden", "heads", "kv_heads")  # axes that some families can only cut with each other
_STEPS = {"hidden": 32, "ffn": 32}  # widths that kernels like
_TYPICAL: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("ffn to 3/4", ("ffn",), 0.75),
    ("ffn to 1/2", ("ffn",), 0.5),
    ("query heads to 3/4", ("heads",), 0.75),
    ("kv heads to 1/2", ("kv_heads",), 0.5),
    ("hidden to 3/4", ("hidden",), 0.75),
    ("layers to 3/4", ("layers",), 0.75),
    ("layers to 1/2", ("layers",), 0.5),
    ("experts to 1/2", ("experts",), 0.5),
    ("ffn, hidden and layers to 3/4", ("ffn", "hidden", "layers"), 0.75),
)

CarriedParameters = Callable[[Dims], int]  # of the parts beside the language model, in a student of these sizes


def what_can_be_cut(
    family: Family, config: dict[str, Any], dims: Dims, checkpoint: Checkpoint | None = None
) -> dict[str, Any]:
    """The axes, and typical students; parts that go along are counted where there are weights."""
    shapes = {} if checkpoint is None else {name: checkpoint.spec(name).shape for name in checkpoint.carried}

    def carried(student: Dims) -> int:
        total = 0
        for name, shape in shapes.items():
            axes = family.carried_axes(name) or (None,) * len(shape)
            sizes = (
                n if axis is None else n * student.hidden // dims.hidden for n, axis in zip(shape, axes, strict=True)
            )
            total += math.prod(sizes)
        return total

    return {"axes": axes_of(family, dims), "cuts": typical_cuts(family, config, dims, carried)}


def axes_of(family: Family, dims: Dims) -> dict[str, dict[str, Any]]:
    """Each axis: whether it can be cut, alone or together with which others, and why not."""
    out: dict[str, dict[str, Any]] = {}
    for axis in SHAPE_AXES:
        size = getattr(dims, axis)
        found = None if size < 2 else _shrunk(family, dims, axis, 0.75)
        if found is not None:
            others = [other for other in SHAPE_AXES if other != axis and getattr(found, other) != getattr(dims, other)]
            out[axis] = {"size": size, "cuttable": True, "together_with": others}
        else:
            out[axis] = {"size": size, "cuttable": False, "why": _why_not(family, dims, axis)}
    return out


def typical_cuts(
    family: Family, config: dict[str, Any], dims: Dims, carried: CarriedParameters
) -> list[dict[str, Any]]:
    """A few students: their sizes, parameters, and bytes on disk in bf16, other parts of the model included."""
    out = [_row("as it is", family, config, dims, dims, carried)]
    for title, axes, share in _TYPICAL:
        student: Dims | None = dims
        for axis in axes:
            student = None if student is None else _shrunk(family, student, axis, share)
        if student is not None and student != dims:
            out.append(_row(title, family, config, dims, student, carried))
    return out


def _row(
    title: str, family: Family, config: dict[str, Any], teacher: Dims, dims: Dims, carried: CarriedParameters
) -> dict[str, Any]:
    kept = ending_well(family, config, range(dims.layers))
    count = family.count_params(family.student_config(config, dims, kept))
    total = count.total + carried(dims)
    changed = {axis: size for axis, size in asdict(dims).items() if size != getattr(teacher, axis)}
    return {
        "cut": title, "sizes": changed, "parameters": total, "non_embedding": count.non_embedding,
        "active": count.active + carried(dims), "bf16_bytes": 2 * total,
    }  # fmt: skip


def _shrunk(family: Family, dims: Dims, axis: str, share: float) -> Dims | None:
    """The largest shape that the family allows with this share of an axis or less; others change where they must."""
    alone = (dims.resized(**{axis: size}) for size in _sizes(axis, getattr(dims, axis), share))
    found = next((shape for shape in alone if not family.violations(shape)), None)
    if found is None and axis in _TOGETHER:
        smaller = (shape for shape in _with_heads(dims, axis, share) if getattr(shape, axis) < getattr(dims, axis))
        found = next((shape for shape in smaller if not family.violations(shape)), None)
    return found


def _sizes(axis: str, size: int, share: float) -> Iterator[int]:
    """From the share of a size downwards, in the steps of its axis where it has so many."""
    step = _STEPS.get(axis, 1)
    step = step if size % step == 0 and size > 4 * step else 1
    most = int(size * share) // step * step
    yield from range(most, max(most // 2, 0), -step)


def _with_heads(dims: Dims, axis: str, share: float) -> Iterator[Dims]:
    """Shapes whose heads and hidden size shrink together, the kv groups with them."""
    most = int(dims.heads * share) if axis != "kv_heads" else dims.heads - 1
    for heads in range(most, 0, -1):
        for kv_heads in range(min(dims.kv_heads, heads), 0, -1):
            if axis == "kv_heads" and kv_heads >= dims.kv_heads:
                continue
            shape = dims.replace(heads=heads, kv_heads=kv_heads)
            yield shape
            yield shape.replace(hidden=heads * dims.head_dim)


def _why_not(family: Family, dims: Dims, axis: str) -> str:
    size = getattr(dims, axis)
    if size == 0:
        return "a dense model has none" if axis == "experts" else "no layer has a recurrent mixer"
    if axis in family.data.uncut:
        return family.data.uncut[axis]
    if size < 2:
        return f"there is only {size}"
    return "; ".join(family.violations(dims.resized(**{axis: max(1, size // 2)}))) or "no smaller size is allowed"
