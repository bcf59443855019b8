"""What losses on hidden states and attention of layers add to a step: operations, and bytes a token.

Letters: H and G student's and teacher's hidden size, A heads · head_dim, K kv_heads · head_dim, b bytes of a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kdscale.config.distill.layer_objectives import AttentionConfig, HiddenStatesConfig
from kdscale.config.distill.objective import ObjectiveConfig
from kdscale.sizing.flops import ModelFlops
from kdscale.sizing.model_shape import ModelShape


@dataclass(frozen=True)
class LayerLosses:
    """`hidden` pairs of layers whose hidden states are compared; `attention` pairs, in each of which `compare` is."""

    hidden: int = 0
    attention: int = 0
    compare: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[ObjectiveConfig], student: ModelShape) -> LayerLosses:
        """Of all entries of distill.objectives together."""
        found: dict[type, HiddenStatesConfig | AttentionConfig] = {
            type(entry): entry for entry in entries if isinstance(entry, HiddenStatesConfig | AttentionConfig)
        }
        pairs = {kind: len(entry.layers or range(min(entry.pairs, student.layers))) for kind, entry in found.items()}
        attention = found.get(AttentionConfig)
        compare = attention.compare if isinstance(attention, AttentionConfig) else ()
        return cls(pairs.get(HiddenStatesConfig, 0), pairs.get(AttentionConfig, 0), compare)

    def flops(self, student: ModelShape, teacher: ModelShape) -> ModelFlops:
        """Forward and backward: the projection's products; scores of both models, with two gradients of the student's.

        A relation of vectors of width W has 2·W a pair of positions, W of queries (also in a map) being A and of others
        K. The teacher's are made once, the student's three times.
        """
        projected = 6.0 * student.hidden * teacher.hidden * self.hidden if student.hidden != teacher.hidden else 0.0
        widths = [(3 * _width(student, what), _width(teacher, what)) for what in self.compare]
        per_pair = 2.0 * self.attention * sum(sum(pair) for pair in widths)
        return ModelFlops(projected, 0.0, ((None, per_pair),) if per_pair else ())

    def teacher_bytes(self, teacher: ModelShape, item_bytes: int) -> float:
        """Of the targets, a token: b·G, and b·(A + 2·K) for queries, keys and values."""
        read = teacher.attention + 2 * teacher.kv_heads * teacher.head_dim
        return item_bytes * float(self.hidden * teacher.hidden + self.attention * read)

    def student_bytes(self, student: ModelShape, teacher: ModelShape, item_bytes: int) -> float:
        """Kept for the backward, a token: what is projected, b·H, and gradients, b·G and b·W of all widths W."""
        projected = student.hidden if student.hidden != teacher.hidden else 0
        widths = sum(_width(student, part) for what in self.compare for part in _parts(what))
        return item_bytes * float(self.hidden * (projected + teacher.hidden) + self.attention * widths)

    def working_bytes(self, student: ModelShape, teacher: ModelShape) -> float:
        """fp32 sums of gradients of the pair that is computed, a token; blocks of scores are small beside them."""
        width = max((sum(_width(student, part) for part in _parts(what)) for what in self.compare), default=0)
        return 4.0 * max(teacher.hidden if self.hidden else 0, width)


def _parts(what: str) -> tuple[str, ...]:
    """What has a gradient: one array in a relation, queries and keys in a map."""
    return ("query", "key") if what == "map" else (what,)


def _width(model: ModelShape, what: str) -> int:
    return model.attention if what in ("query", "map") else model.kv_heads * model.head_dim


NO_LAYERS = LayerLosses()
