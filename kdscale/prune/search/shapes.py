"""From a budget to a few shapes: take all shapes, keep those that meet the budget, rank them by prediction. numpy only.

This is the first of three rankings: masked.py runs the best shapes on calibration text, and the plan stage may distil a
few of them for a short time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family
from kdscale.families.cuttable import may_end, sources_lacking
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.axes import BudgetKind, Sizes, budget_axes, openable_axes
from kdscale.prune.candidates import ShapeCandidate
from kdscale.prune.for_family import settled
from kdscale.prune.importance.ranking import Ranking
from kdscale.prune.search.budget import Budget, Costs, Floats, Speeds
from kdscale.prune.search.cost import CostModel
from kdscale.prune.search.scoring import ShapeScoring
from kdscale.prune.search.space import ShapeSpace, columns

_RECORDED_CANDIDATES = 10


class Search:
    """Compares the shapes of students of one teacher under one config; what it computes once it keeps.

    `config` is the teacher's config.json, `itemsize` gives the bytes per value of each teacher tensor on disk (see
    CostModel), `speeds` are measured latencies, needed when the target is one. Attributes raise ConfigError when they
    are first read: `ranking` for scores that are missing, `budget` for a target that the teacher meets already.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        family: Family,
        scores: Mapping[str, Any] | None,
        cfg: PruneConfig,
        itemsize: Callable[[str], int] | None = None,
        speeds: Speeds | None = None,
    ):
        self.config, self.family, self.scores, self.cfg = dict(config), family, scores, settled(cfg, family, config)
        self.speeds, self._itemsize = speeds, itemsize
        self.teacher = family.dims(self.config)
        self.space = ShapeSpace(self.teacher, family, self.cfg)

    def with_speeds(self, speeds: Speeds) -> Search:
        """The same search when latencies have been measured."""
        return Search(self.config, self.family, self.scores, self.cfg, self._itemsize, speeds)

    @cached_property
    def costs(self) -> Costs:
        """What any shape costs."""
        several = len(self.family.layers_by_kind(self.config)) > 1
        kept_layers = self._kept_layers if several else None
        return Costs(CostModel.of(self.config, self.family, self._itemsize, kept_layers), self.cfg, self.speeds)

    def _kept_layers(self, count: int) -> list[int] | None:
        """Those of a student of so many; None where one block of layers must go and no student has those left."""
        try:
            return self.ranking.layers(count)
        except ConfigError:
            if count == self.cfg.layers:
                raise
            return None

    @cached_property
    def ranking(self) -> Ranking:
        """Which units stay at any size."""
        axes = [self.family.layer_axes(self.config, layer) for layer in range(self.teacher.layers)]
        needed, (groups, _) = openable_axes(self.cfg, self.teacher), self.family.expert_groups
        first, ends = self.family.data.first_layer_differs, may_end(self.family, self.config)
        lacks = sources_lacking(self.family, self.config)
        return Ranking(self.teacher, self.scores, self.cfg, needed, axes, groups, first, ends, lacks)

    @cached_property
    def scoring(self) -> ShapeScoring:
        """The predicted score of any shape."""
        return ShapeScoring(self.teacher, self.ranking, self.cfg)

    @cached_property
    def budget(self) -> Budget | None:
        """The target; None when only sizes are given."""
        return Budget.of(self.cfg, self.costs, columns([Sizes.of(self.teacher)]))

    def shortlist(self) -> tuple[list[ShapeCandidate], int]:
        """The best candidates, best first, and how many shapes met the budget.

        One shape for each combination of the axes besides ffn comes first: neighbours that differ by one step of ffn
        tell later rankings nothing. Raises ConfigError when a given size is not allowed or no shape meets the budget.
        """
        given, budget = self.space.given(), self.budget
        if budget is None:
            return [self._candidate(given)], 1
        explicit = any(getattr(self.cfg, axis) is not None for axis in SHAPE_AXES)
        if explicit and not self.space.unfit(given) and bool(budget.near(np.array([self.cost(budget.kind, given)]))[0]):
            return [self._candidate(given)], 1  # the sizes given meet the budget: nothing else needs to go
        shapes = self.space.all()
        depths = [count for count in set(columns(shapes)["layers"].tolist()) if self._kept_layers(count) is not None]
        shapes = shapes[np.isin(columns(shapes)["layers"], depths)]
        costs = self.costs.of(budget.kind, columns(shapes))
        near = np.flatnonzero(budget.near(costs))
        if not len(near):
            raise budget.impossible(costs, budget_axes(self.cfg))
        ranked = sorted(
            (Sizes(*shapes[i].tolist()) for i in near), key=self._preference(budget, shapes[near], costs[near])
        )
        wanted = max(_RECORDED_CANDIDATES, self.cfg.search.masked_candidates)
        return [self._candidate(sizes) for sizes in _varied(ranked, wanted)], len(ranked)

    def cost(self, kind: BudgetKind, sizes: Sizes) -> float:
        """The cost of one shape in the unit of `kind`."""
        return float(self.costs.of(kind, columns([sizes]))[0])

    def _preference(self, budget: Budget, shapes: Any, costs: Floats) -> Callable[[Sizes], tuple[float, ...]]:
        """Best score first; then nearest to the target; then the larger sizes: never the order of enumeration."""
        misses = np.abs(costs - budget.wanted)
        off = dict(zip(map(tuple, shapes.tolist()), misses.tolist(), strict=True))
        return lambda sizes: (-round(self.scoring.score(sizes), 12), off[sizes], *(-size for size in sizes))

    def _candidate(self, sizes: Sizes) -> ShapeCandidate:
        figures: dict[str, Any] = sizes._asdict()
        counts: tuple[BudgetKind, ...] = ("params", "bytes", "kv_bytes")
        times: tuple[BudgetKind, ...] = ("decode", "prefill")
        figures |= {kind: int(self.cost(kind, sizes)) for kind in counts}
        if self.family.experts_per_token:
            figures["active"] = int(self.costs.model.active(columns([sizes]))[0])
        figures |= {f"{kind}_ms": self.cost(kind, sizes) for kind in times if self.speeds is not None}
        return ShapeCandidate(**figures, score=self.scoring.score(sizes))


def _varied(ranked: list[Sizes], count: int) -> list[Sizes]:
    """The first `count` of `ranked` that differ in more than ffn, then the rest until there are as many; same order."""
    ffn = SHAPE_AXES.index("ffn")
    first: dict[tuple[int, ...], Sizes] = {}
    for sizes in ranked:
        first.setdefault(sizes[:ffn] + sizes[ffn + 1 :], sizes)
    taken = set(list(first.values())[:count])
    for sizes in ranked:
        if len(taken) >= count:
            break
        taken.add(sizes)
    return [sizes for sizes in ranked if sizes in taken]
