"""Parameter counts of many shapes at once, from the family's tensor table. No torch.

A count is a sum over tensors of products of dimensions, so one expansion of the table gives a formula that numpy
evaluates for a hundred thousand shapes in milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdscale.families import Family
from kdscale.families.family import EMBEDDING_ROLES
from kdscale.families.schema import axis_blocks

Count = Literal["total", "non_embedding"]
Ints = NDArray[np.int64]

# What a shape is made of; `head_dim` and `vocab` never change and are folded into the coefficients.
SHAPE_AXES = ("hidden", "ffn", "heads", "kv_heads", "layers")


@dataclass(frozen=True)
class _Term:
    """`coefficient · Π axes`, once or once a layer."""

    coefficient: float
    axes: tuple[str, ...]
    embedding: bool


@dataclass(frozen=True)
class CostModel:
    """Parameter count as a function of the shape; exact where all layers have the same tensors, else a mean layer."""

    terms: tuple[_Term, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], family: Family, experts: int | None = None) -> CostModel:
        """Expand the family's table once for this config. Raises CheckpointError for a config the family refuses.

        `experts`: how many of a mixture's experts the shapes have (the config's when not given).
        """
        dims = family.dims(dict(config))
        stay = experts or dims.experts
        fixed: dict[str | int, int] = {"head_dim": dims.head_dim, "vocab": dims.vocab, "experts": stay}
        fixed |= {name: family.fixed_size(name, config) for name in family.data.sizes}
        sums: Counter[tuple[tuple[str, ...], bool]] = Counter()
        for spec in family.tensors(dict(config)).values():
            if spec.expert is not None and spec.expert >= stay:
                continue
            once = ["layers"] if spec.layer is not None else []
            for blocks in itertools.product(*(axis_blocks(axis) for axis in spec.axes)):
                factors = [factor for block in blocks for factor in block]
                coefficient = math.prod(fixed.get(f, f if isinstance(f, int) else 1) for f in factors)
                axes = [f for f in factors if isinstance(f, str) and f not in fixed]
                sums[tuple(sorted(once + axes)), spec.role in EMBEDDING_ROLES] += coefficient
        terms = [
            _Term(total / dims.layers if "layers" in axes else total, axes, embedding)
            for (axes, embedding), total in sorted(sums.items())
        ]
        return cls(tuple(terms))

    def params(self, shapes: Mapping[str, Ints], count: Count) -> Ints:
        """`shapes[axis]` are equally long arrays (or broadcastable); returns the counted parameters of each shape."""
        total = np.zeros(np.broadcast_shapes(*(values.shape for values in shapes.values())))
        for term in self.terms:
            if term.embedding and count == "non_embedding":
                continue
            product: Any = np.float64(term.coefficient)
            for axis in term.axes:
                product = product * shapes[axis].astype(np.float64)
            total = total + product
        return np.rint(total).astype(np.int64)
