"""The predicted score of a shape, from what it keeps of the importance. numpy only.

The score is exp(−Σ over the axes that may be cut of weight · lost share of importance): the predicted ratio of the
teacher's perplexity to the student's before distilling. A lost share does not weigh the same on every axis (every
sublayer reads the hidden axis; regression gives most of a lost head back), so the weights are measured ones. Without
scores (`kdscale plan --shapes-only`) the most balanced shape is best: the smallest spread between the kept fractions.
"""

from __future__ import annotations

import math

from kdscale.config.prune import PruneConfig
from kdscale.families import Dims
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.axes import Sizes, openable_axes
from kdscale.prune.importance.ranking import Ranking

# Rise of log-perplexity for a lost share of 1, by prune.compensate and axis, on SmolLM2-135M (measured-pruning.md in
# the docs): near linear over the cuts measured. For another model the order of magnitude holds, the exact ranking is a
# guess. No mixture of experts was measured: an expert counts as ffn units that no regression gives back. No hybrid was
# either: a share of the mixers' heads, channels or state counts as one of query heads. A criterion whose lost shares
# mean something else has a weight of its own (`Criterion.damage`).
_DAMAGE: dict[str, dict[str, float]] = {
    "two_stream": {"ffn": 3.3, "heads": 0.8, "hidden": 23.0, "layers": 5.1},
    "ridge": {"ffn": 3.7, "heads": 0.8, "hidden": 23.0, "layers": 5.1},
    "none": {"ffn": 6.5, "heads": 5.7, "hidden": 27.0, "layers": 5.1},
}
_DAMAGE_IN_ALL = {"experts": 6.5}  # whatever compensates
_LIKE = dict.fromkeys(
    ("kv_heads", "ssm_heads", "ssm_head_dim", "ssm_state"), "heads"
)  # axes that count as another one does


class ShapeScoring:
    """Predicted scores of shapes; owns the retained shares that many shapes have in common."""

    def __init__(self, teacher: Dims, ranking: Ranking, cfg: PruneConfig):
        self._teacher, self._ranking, self._cfg = teacher, ranking, cfg
        self._axes = openable_axes(cfg, teacher)
        self._shares: dict[tuple[str, int, int | None, int], float | None] = {}

    def score(self, sizes: Sizes) -> float:
        """The predicted perplexity ratio, at most 1; without scores the balance of the shape, at most 0."""
        predicted = self.retained(sizes)["score"]
        return self._balance(sizes) if predicted is None else predicted

    def retained(self, sizes: Sizes) -> dict[str, float | None]:
        """Share kept on each axis that may be cut, and the predicted perplexity ratio as `score`; None if unknown."""
        out: dict[str, float | None] = {axis: self._share(axis, sizes) for axis in self._axes}
        # The kept query heads already tell what the dropped kv groups take along: counting both would count it twice.
        lost = {a: 1 - v for a, v in out.items() if v is not None and not (a == "kv_heads" and "heads" in out)}
        out["score"] = None
        if self._ranking.has_scores and lost:
            usual = _DAMAGE[self._cfg.compensate] | _DAMAGE_IN_ALL
            usual |= {axis: usual[other] for axis, other in _LIKE.items()}
            out["score"] = math.exp(-sum(self._ranking.damage(a, usual[a]) * share for a, share in lost.items()))
        return out

    def _share(self, axis: str, sizes: Sizes) -> float | None:
        size = getattr(sizes, axis)
        groups = sizes.kv_heads if axis == "heads" else None
        key = (axis, size, groups, sizes.layers)
        if key not in self._shares:
            layers = self._ranking.layers(sizes.layers)
            self._shares[key] = self._ranking.retained(axis, layers=layers, count=size, kv_heads=groups)
        return self._shares[key]

    def _balance(self, sizes: Sizes) -> float:
        """Minus the spread between the largest and the smallest kept fraction over the axes that may be cut."""
        kept = [getattr(sizes, a) / getattr(self._teacher, a) for a in SHAPE_AXES if a in self._axes]
        return -(max(kept) - min(kept)) if kept else 0.0
