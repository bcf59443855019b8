"""The sizes of one model, and its parameters counted.

Dimension names: hidden (residual stream), ffn (intermediate; of one expert in a mixture), heads (query heads), kv_heads
(key/value groups), head_dim, layers, vocab, experts (0 in dense models); of mixtures that have them dense_ffn
(intermediate size of layers without experts) and shared_ffn (of the expert that every token goes to). Of layers that
carry a state from token to token, and 0 in models without: ssm_heads (heads of Mamba 2, value heads of a gated delta
net), ssm_head_dim, ssm_groups (of B and C in Mamba 2, key heads of a delta net; as many heads read each) and ssm_state
(the width of B and C, or of a key; the latter is never cut).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdscale.config.criteria import FOLLOWED
from kdscale.config.prune import PRUNED_AXES
from kdscale.families.schema import axis_size

# What a shape is made of, and what never changes in a student.
SHAPE_AXES: tuple[str, ...] = PRUNED_AXES
LAYERS_FIRST = ("layers", *(axis for axis in SHAPE_AXES if axis != "layers"))  # as people name a shape
NEVER_CUT = ("head_dim", "vocab", "ssm_groups")


@dataclass(frozen=True)
class Dims:
    """The sizes of one model. Those of NEVER_CUT are the same in a student."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    experts: int = 0
    dense_ffn: int = 0
    shared_ffn: int = 0
    ssm_heads: int = 0
    ssm_head_dim: int = 0
    ssm_groups: int = 0
    ssm_state: int = 0

    def sizes(self) -> dict[str, int]:
        """Every size by its name, in a dict of the caller's."""
        return dict(vars(self))  # not asdict, which looks into every value: rules ask thousands of times

    def replace(self, **sizes: int) -> Dims:
        """The same with other `sizes`."""
        return replace(self, **sizes)

    def resized(self, **sizes: int) -> Dims:
        """The same with other `sizes`, and the axes that follow those (`config.criteria.FOLLOWED`) cut with them."""
        return self.replace(**{**self.followers(sizes), **sizes})

    def followers(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of the axes that follow one of `sizes`, which may be arrays, by the same share of these.

        Where the share is not a whole number, the nearest multiple of the largest power of two that divides the size,
        256 at most: a size stays as round as it is.
        """
        return {
            axis: _same_share(getattr(self, axis), getattr(self, leader), sizes[leader])
            for axis, leader in FOLLOWED.items()
            if leader in sizes and getattr(self, axis)
        }

    def axis_size(self, axis: str) -> int:
        """The size of a tensor dimension from its axis: `ffn`, a product `heads*head_dim`, a sum `ffn | ffn`."""
        return axis_size(axis, vars(self))


def _same_share(size: int, whole: int, part: Any) -> Any:
    step = min(size & -size, 256)
    near = (2 * size * part + whole * step) // (2 * whole * step) * step
    near = near + (near < step) * (step - near)  # at least one step
    exact = (size * part) % whole == 0
    return near + exact * (size * part // whole - near)


@dataclass(frozen=True)
class ParamCount:
    """`embedding` is the embeddings (learned positions too) plus the head (once when tied); `non_embedding` the rest.

    `active` is what one token uses: all of a dense model, and of a mixture only the experts that it is routed to.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int
