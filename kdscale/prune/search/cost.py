"""Parameters, bytes on disk and KV-cache bytes of many shapes at once, from the family's table of tensors. No torch.

A count is a sum over tensors of products of dimensions, so one expansion of the table gives a formula that numpy
evaluates for a hundred thousand shapes in milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdscale.families import Dims, Family
from kdscale.families.dims import NEVER_CUT
from kdscale.families.schema import axis_blocks, axis_size

Count = Literal["total", "non_embedding"]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Term:
    """`coefficient · Π axes`: the size of all tensors that grow with the same axes."""

    coefficient: float
    axes: tuple[str, ...]  # `layers` not among them: `kind` says of which layers
    kind: int | None  # which kind of layers the tensors are in; None: outside the layers
    embedding: bool
    itemsize: int
    of_experts: bool
    buffer: bool  # bytes on disk, and no parameters


@dataclass(frozen=True)
class CostModel:
    """Counts as functions of the shape.

    `layers_KL`: of how many layers of each kind a student of L layers is made, [kinds, teacher's layers + 1];
    `cached_K`: of each kind the axis of the numbers of a token that a layer keeps; None without attention.
    """

    terms: tuple[_Term, ...]
    teacher: Dims
    layers_KL: NDArray[np.float64]
    cached_K: tuple[str | None, ...]
    fixed: Mapping[str, int]  # sizes that never change
    experts_per_token: int = 0

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        family: Family,
        itemsize: Callable[[str], int] | None = None,
        kept_layers: Callable[[int], Sequence[int] | None] | None = None,
    ) -> CostModel:
        """Expand the family's table once for this config. Raises CheckpointError for a config that the family refuses.

        `itemsize` gives the bytes per value of each teacher tensor on disk, which the student's tensors keep; by
        default those of the dtype that the config names. `kept_layers` gives the layers that a student of so many has
        (None where there is no such student); without it a student has the teacher's mix of kinds.
        """
        width = config_itemsize(config)
        dims = family.dims(dict(config))
        fixed = {name: getattr(dims, name) for name in NEVER_CUT} | family.fixed_sizes
        kinds = family.layer_kinds(config)
        distinct = list(dict.fromkeys(kinds))
        sums: Counter[tuple[tuple[str, ...], int | None, bool, int, bool, bool]] = Counter()
        for name, spec in family.tensors(dict(config)).items():
            if spec.expert:
                continue  # experts are alike: the first stands for all
            of_experts = spec.of_experts
            once = ["experts"] if spec.expert is not None else []
            kind = None if spec.layer is None else distinct.index(kinds[spec.layer])
            bytes_each = itemsize(name) if itemsize else width
            for blocks in itertools.product(*(axis_blocks(axis) for axis in spec.axes)):
                factors = [factor for block in blocks for factor in block]
                coefficient = math.prod(f if isinstance(f, int) else fixed.get(f, 1) for f in factors)
                axes = [f for f in factors if isinstance(f, str) and f not in fixed]
                what = (spec.counts_as_embedding, bytes_each, of_experts, spec.buffer)
                key = (tuple(sorted(once + axes)), kind, *what)
                sums[key] += coefficient
        terms = [
            _Term(
                total if kind is None else total / kinds.count(distinct[kind]), axes, kind, outer, width, routed, stored
            )
            for (axes, kind, outer, width, routed, stored), total in sums.items()
        ]
        shares_K1 = np.array([[kinds.count(each) / dims.layers] for each in distinct])
        layers_KL: NDArray[np.float64] = shares_K1 * np.arange(dims.layers + 1, dtype=np.float64)
        if kept_layers is not None:
            for count in range(1, dims.layers + 1):
                if (layers := kept_layers(count)) is not None:
                    kept = [kinds[layer] for layer in layers]
                    layers_KL[:, count] = [kept.count(each) for each in distinct]
        attends = ["kv_heads" in family.layer_axes(config, kinds.index(each)) for each in distinct]
        cached = [family.data.cached_of(each) if has else None for each, has in zip(distinct, attends, strict=True)]
        return cls(tuple(terms), dims, layers_KL, tuple(cached), fixed, family.experts_per_token)

    def params(self, shapes: Mapping[str, Ints], count: Count) -> Ints:
        """The counted parameters of each shape; `shapes[axis]` are arrays of one length (or that broadcast)."""
        parameters = [term for term in self.terms if not term.buffer]
        counted = [term for term in parameters if not (term.embedding and count == "non_embedding")]
        return self._sum(shapes, [(term, 1) for term in counted])

    def active(self, shapes: Mapping[str, Ints]) -> Ints:
        """Parameters that one token uses: of a mixture's experts only those that it is routed to."""
        routed = {**shapes, "experts": np.minimum(shapes["experts"], self.experts_per_token)}
        parameters = [term for term in self.terms if not term.buffer]
        used = [self._sum(routed if term.of_experts else shapes, [(term, 1)]) for term in parameters]
        return np.sum(used, axis=0, dtype=np.int64)

    def bytes(self, shapes: Mapping[str, Ints]) -> Ints:
        """Bytes of all tensors on disk, without the files' headers (some kilobytes)."""
        return self._sum(shapes, [(term, term.itemsize) for term in self.terms])

    def kv_bytes(self, shapes: Mapping[str, Ints]) -> Ints:
        """Bytes of 16-bit keys and values that one token of context costs over all layers, full attention."""
        sizes: dict[str, Any] = {**self.fixed, **shapes}
        total: Ints = np.zeros_like(shapes["layers"])
        for cached in {axis: None for axis in self.cached_K if axis is not None}:
            kinds = [k for k, axis in enumerate(self.cached_K) if axis == cached]
            layers = np.rint(self.layers_KL[kinds].sum(0)).astype(np.int64)
            total = total + layers[shapes["layers"]] * 2 * np.asarray(axis_size(cached, sizes))
        return total

    def _sum(self, shapes: Mapping[str, Ints], terms: list[tuple[_Term, int]]) -> Ints:
        sizes = {**shapes, **self.teacher.followers(shapes)}
        total = np.zeros(np.broadcast_shapes(*(values.shape for values in shapes.values())))
        for term, times in terms:
            product: Any = np.float64(term.coefficient * times)
            if term.kind is not None:
                product = product * self.layers_KL[term.kind][shapes["layers"]]
            for axis in term.axes:
                product = product * sizes[axis].astype(np.float64)
            total = total + product
        return np.rint(total).astype(np.int64)


def config_itemsize(config: Mapping[str, Any]) -> int:
    """Bytes per weight in the dtype that config.json names; 2 (bf16) when it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return {"float32": 4, "float64": 8}.get(str(name).removeprefix("torch."), 2)
