"""Parameters, bytes on disk and KV-cache bytes of many shapes at once, from the family's table of tensors. No torch.

A count is a sum over tensors of products of dimensions, so one expansion of the table gives a formula that numpy
evaluates for a hundred thousand shapes in milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdscale.families import Family
from kdscale.families.schema import axis_blocks
from kdscale.sizing.model_shape import kv_bytes_per_token

Count = Literal["total", "non_embedding"]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Term:
    """`coefficient · Π axes`: the size of all tensors that grow with the same axes."""

    coefficient: float
    axes: tuple[str, ...]
    embedding: bool
    itemsize: int
    of_experts: bool


@dataclass(frozen=True)
class CostModel:
    """Counts as functions of the shape; exact where all layers have the same tensors, else for a mean layer."""

    terms: tuple[_Term, ...]
    head_dim: int
    experts_per_token: int = 0

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        family: Family,
        itemsize: Callable[[str], int] | None = None,
    ) -> CostModel:
        """Expand the family's table once for this config. Raises CheckpointError for a config that the family refuses.

        `itemsize` gives the bytes per value of each teacher tensor on disk, which the student's tensors keep; by
        default those of the dtype that the config names.
        """
        width = config_itemsize(config)
        dims = family.dims(dict(config))
        fixed: dict[str | int, int] = {"head_dim": dims.head_dim, "vocab": dims.vocab}
        fixed |= {name: family.fixed_size(name, config) for name in family.data.sizes}
        sums: Counter[tuple[tuple[str, ...], bool, int, bool]] = Counter()
        for name, spec in family.tensors(dict(config)).items():
            if spec.expert:
                continue  # experts are alike: the first stands for all
            of_experts = spec.expert is not None
            once = (["layers"] if spec.layer is not None else []) + (["experts"] if of_experts else [])
            bytes_each = itemsize(name) if itemsize else width
            for blocks in itertools.product(*(axis_blocks(axis) for axis in spec.axes)):
                factors = [factor for block in blocks for factor in block]
                coefficient = math.prod(fixed.get(f, f if isinstance(f, int) else 1) for f in factors)
                axes = [f for f in factors if isinstance(f, str) and f not in fixed]
                sums[tuple(sorted(once + axes)), spec.counts_as_embedding, bytes_each, of_experts] += coefficient
        terms = [
            _Term(total / dims.layers if "layers" in axes else total, axes, embedding, bytes_each, of_experts)
            for (axes, embedding, bytes_each, of_experts), total in sorted(sums.items())
        ]
        return cls(tuple(terms), dims.head_dim, family.experts_per_token)

    def params(self, shapes: Mapping[str, Ints], count: Count) -> Ints:
        """The counted parameters of each shape; `shapes[axis]` are arrays of one length (or that broadcast)."""
        counted = [term for term in self.terms if not (term.embedding and count == "non_embedding")]
        return _sum(shapes, [(term, 1) for term in counted])

    def active(self, shapes: Mapping[str, Ints]) -> Ints:
        """Parameters that one token uses: of a mixture's experts only those that it is routed to."""
        routed = {**shapes, "experts": np.minimum(shapes["experts"], self.experts_per_token)}
        used = [_sum(routed if term.of_experts else shapes, [(term, 1)]) for term in self.terms]
        return np.sum(used, axis=0, dtype=np.int64)

    def bytes(self, shapes: Mapping[str, Ints]) -> Ints:
        """Bytes of all tensors on disk, without the files' headers (some kilobytes)."""
        return _sum(shapes, [(term, term.itemsize) for term in self.terms])

    def kv_bytes(self, shapes: Mapping[str, Ints]) -> Ints:
        """Bytes of 16-bit keys and values that one token of context costs over all layers, full attention."""
        return kv_bytes_per_token(shapes["layers"], shapes["kv_heads"], self.head_dim)


def _sum(shapes: Mapping[str, Ints], terms: list[tuple[_Term, int]]) -> Ints:
    total = np.zeros(np.broadcast_shapes(*(values.shape for values in shapes.values())))
    for term, times in terms:
        product: Any = np.float64(term.coefficient * times)
        for axis in term.axes:
            product = product * shapes[axis].astype(np.float64)
        total = total + product
    return np.rint(total).astype(np.int64)


def config_itemsize(config: Mapping[str, Any]) -> int:
    """Bytes per weight in the dtype that config.json names; 2 (bf16) when it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return {"float32": 4, "float64": 8}.get(str(name).removeprefix("torch."), 2)
