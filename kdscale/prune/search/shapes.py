"""From a budget to a shape: enumerate, keep what meets the budget, rank by what is kept. numpy only.

The score of a shape is exp(−Σ over the axes that may be cut of weight · lost share of importance): the predicted ratio
of the teacher's perplexity to the student's before distilling. Shares of different axes do not weigh the same (every
sublayer reads the hidden axis; regression gives most of a lost head back), so the weights are measured ones. Without
scores (`kdscale plan` before importance) the most balanced shape is taken: the smallest spread between the axes' kept
fractions. This is the first of three rankings: masked.py runs the best of these shapes, runs/probe.py distils a few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.families.family import SHAPE_AXES
from kdscale.prune import plan as plans
from kdscale.prune.axes import BudgetKind, budget_axes, openable_axes
from kdscale.prune.importance.ranking import Ranking
from kdscale.prune.plan import Plan
from kdscale.prune.search.budget import Budget, Costs, Floats, Speeds
from kdscale.prune.search.cost import CostModel

KEPT_CANDIDATES = 10


# From these teacher sizes on a step is 256, what tensor cores and tensor parallelism like; below, 32.
_REAL_HIDDEN, _REAL_FFN = 2048, 4096


_REAL_STEP, _SMALL_STEP = 256, 32


# The same for experts, which expert parallelism divides.
_MANY_EXPERTS, _EXPERTS_STEP = 64, 8


# Rise of log-perplexity for each share of an axis' importance that is lost, on SmolLM2-135M
# (docs/explanation/measured-pruning.md): near linear over the cuts measured. For another model the order of magnitude
# holds, the exact ranking is a guess. No mixture of experts was measured: an expert is taken for ffn units that no
# regression gives back.
_DAMAGE: dict[str, dict[str, float]] = {
    "two_stream": {"ffn": 3.3, "heads": 0.8, "kv_heads": 0.8, "hidden": 23.0, "layers": 5.1, "experts": 6.5},
    "ridge": {"ffn": 3.7, "heads": 0.8, "kv_heads": 0.8, "hidden": 23.0, "layers": 5.1, "experts": 6.5},
    "none": {"ffn": 6.5, "heads": 5.7, "kv_heads": 5.7, "hidden": 27.0, "layers": 5.1, "experts": 6.5},
}


# The same for scores whose lost shares mean something else.
_DAMAGE_OF_METHOD: dict[str, dict[str, float]] = {"hidden": {"pca": 31.0}}


Sizes = tuple[int, int, int, int, int, int]  # in the order of SHAPE_AXES


@dataclass(frozen=True)
class Search:
    """All decisions for one teacher: `shortlist` compares shapes, `plan` turns one into every index that stays.

    `itemsize`: bytes a value of each teacher tensor on disk (see CostModel); `speeds`: measured latencies, needed when
    the target is one.
    """

    config: dict[str, Any]
    family: Family
    scores: Mapping[str, Any] | None
    cfg: PruneConfig
    itemsize: Callable[[str], int] | None = None
    speeds: Speeds | None = None

    @cached_property
    def teacher(self) -> Dims:
        return self.family.dims(self.config)

    @cached_property
    def costs(self) -> Costs:
        return Costs(CostModel.of(self.config, self.family, self.itemsize), self.cfg, self.speeds)

    @cached_property
    def ranking(self) -> Ranking:
        return Ranking(self.teacher, self.scores, self.cfg, openable_axes(self.cfg, self.teacher))

    @cached_property
    def budget(self) -> Budget | None:
        """The target, None when only sizes are given. Raises ConfigError when the teacher meets it already."""
        return Budget.of(self.cfg, self.costs, self.columns([self.sizes_of(self.teacher)]), self.counted_as)

    @property
    def counted_as(self) -> str:
        return self.cfg.count.replace("_", "-")

    @staticmethod
    def sizes_of(dims: Dims) -> Sizes:
        return (dims.hidden, dims.ffn, dims.heads, dims.kv_heads, dims.layers, dims.experts)

    @staticmethod
    def columns(shapes: Any) -> dict[str, Any]:
        """Shapes (rows in the order of SHAPE_AXES) as one array an axis."""
        rows = np.asarray(shapes, dtype=np.int64)
        return {axis: rows[:, index] for index, axis in enumerate(SHAPE_AXES)}

    def cost(self, kind: BudgetKind, sizes: Sizes) -> float:
        return float(self.costs.of(kind, self.columns([sizes]))[0])

    def shortlist(self) -> tuple[list[plans.ShapeCandidate], int]:
        """The best candidates, best first, and how many shapes met the budget.

        One shape for each combination of the axes besides ffn comes first: neighbours that differ by one step of ffn
        tell later rankings nothing. Raises ConfigError when no shape meets the budget.
        """
        fixed = self.fixed_sizes()
        budget = self.budget
        if budget is None:
            return [self.candidate(fixed)], 1
        explicit = any(getattr(self.cfg, axis) is not None for axis in SHAPE_AXES)
        if explicit and bool(budget.near(np.array([self.cost(budget.kind, fixed)]))[0]):
            return [self.candidate(fixed)], 1  # the sizes given meet the budget: nothing else needs to go
        shapes = self.enumerate()
        costs = self.costs.of(budget.kind, self.columns(shapes))
        near = np.flatnonzero(budget.near(costs))
        if not len(near):
            raise budget.impossible(costs, self.counted_as, budget_axes(self.cfg))
        ranked = sorted((tuple(shapes[i].tolist()) for i in near), key=self.preference(costs[near], shapes[near]))
        wanted = max(KEPT_CANDIDATES, self.cfg.search.masked_candidates)
        return [self.candidate(sizes) for sizes in _varied(ranked, wanted)], len(ranked)

    def preference(self, costs: Floats, shapes: Any) -> Callable[[Sizes], tuple[float, ...]]:
        """Best score first; then nearest to the target; then the larger sizes: never the order of enumeration."""
        assert self.budget is not None
        wanted = self.budget.wanted
        gaps = {tuple(shape): abs(float(cost) - wanted) for shape, cost in zip(shapes.tolist(), costs, strict=True)}
        return lambda sizes: (-round(self.score(sizes), 12), gaps[sizes], *(-size for size in sizes))

    def fixed_sizes(self) -> Sizes:
        """The teacher's shape with the sizes that were given. Raises ConfigError for one that is not allowed."""
        teacher, given = self.teacher, self.cfg
        budget_axes(given)  # refuses axes that have no influence on the target
        if "experts" in given.axes and not teacher.experts:
            raise ConfigError("prune.axes", expected="axes of a dense teacher", got=", ".join(given.axes))
        for axis in SHAPE_AXES:
            size, limit = getattr(given, axis), getattr(teacher, axis)
            if size is not None and size > limit:
                most = f"at most the teacher's {limit}" if limit else "none: the teacher is no mixture of experts"
                raise ConfigError(f"prune.{axis}", expected=most, got=str(size))
            step = getattr(given, f"{axis}_divisor", None)
            if size is not None and step is not None and size % step:
                raise ConfigError(
                    f"prune.{axis}", expected=f"a multiple of prune.{axis}_divisor ({step})", got=str(size)
                )
        group = teacher.heads // teacher.kv_heads
        kv_heads = given.kv_heads or teacher.kv_heads
        heads = given.heads or kv_heads * group
        if given.kv_heads is None and "kv_heads" not in given.axes and heads % kv_heads:
            raise self.bad_heads(heads, f"a multiple of the teacher's {kv_heads} kv heads")
        if given.kv_heads is not None and (heads % kv_heads or heads // kv_heads > group):
            raise self.bad_heads(heads, f"1 to {group} query heads for each of {kv_heads} kv heads")
        if heads % kv_heads:  # kv_heads is open: the search finds a count that divides
            kv_heads = max(k for k in range(1, kv_heads + 1) if heads % k == 0 and heads // k <= group)
        sizes = (
            given.hidden or teacher.hidden,
            given.ffn or teacher.ffn,
            heads,
            kv_heads,
            given.layers or teacher.layers,
            given.experts or teacher.experts,
        )
        self.check_allowed(sizes)
        return sizes

    @staticmethod
    def bad_heads(heads: int, expected: str) -> ConfigError:
        hint = "every kv group keeps the same number of query heads"
        return ConfigError("prune.heads", expected=expected, got=str(heads), hint=hint)

    def check_allowed(self, sizes: Sizes) -> None:
        if wrong := self.family.violations(self.student_dims(sizes)):
            given = [f"prune.{axis}" for axis in SHAPE_AXES if getattr(self.cfg, axis) is not None]
            raise ConfigError(
                ", ".join(given) or "prune", expected="sizes that the family allows", got="; ".join(wrong)
            )

    def student_dims(self, sizes: Sizes) -> Dims:
        cut = dict(zip(SHAPE_AXES, sizes, strict=True))
        return Dims(**cut, head_dim=self.teacher.head_dim, vocab=self.teacher.vocab)

    def student_config(self, sizes: Sizes) -> dict[str, Any]:
        return self.family.student_config(self.config, self.student_dims(sizes), self.ranking.layers(sizes[4]))

    def enumerate(self) -> np.ndarray:
        """Every allowed shape over the open axes, one row a shape in the order of SHAPE_AXES."""
        cfg, teacher = self.cfg, self.teacher
        group = teacher.heads // teacher.kv_heads
        is_open = {axis for axis in budget_axes(cfg) if getattr(cfg, axis) is None}

        def options(axis: str, step: int) -> list[int]:
            whole = getattr(teacher, axis)
            given = getattr(cfg, axis)
            if axis not in is_open:
                return [given or whole]
            return sorted({*range(step, whole, step), whole})

        hidden_step = cfg.hidden_divisor or (_REAL_STEP if teacher.hidden >= _REAL_HIDDEN else _SMALL_STEP)
        ffn_step = cfg.ffn_divisor or (_REAL_STEP if teacher.ffn >= _REAL_FFN else _SMALL_STEP)
        experts_step = cfg.experts_divisor or (_EXPERTS_STEP if teacher.experts >= _MANY_EXPERTS else 1)
        experts = [n for n in options("experts", experts_step) if n >= self.family.experts_per_token]
        pairs = []
        for kv_heads in options("kv_heads", 1):
            if cfg.heads is not None:
                pairs += [(cfg.heads, kv_heads)] if cfg.heads % kv_heads == 0 and cfg.heads // kv_heads <= group else []
            else:
                pairs += [(kv_heads * n, kv_heads) for n in (range(1, group + 1) if "heads" in is_open else [group])]
        rows = [
            (hidden, ffn, heads, kv_heads, layers, stay)
            for hidden, (heads, kv_heads) in itertools.product(options("hidden", hidden_step), pairs)
            if not self.family.violations(teacher.replace(hidden=hidden, heads=heads, kv_heads=kv_heads))
            for ffn, layers, stay in itertools.product(options("ffn", ffn_step), options("layers", 1), experts)
        ]
        if not rows:
            raise ConfigError("prune.axes", expected="at least one shape that the family allows", got=str(cfg.axes))
        return np.array(rows, dtype=np.int64)

    def candidate(self, sizes: Sizes) -> plans.ShapeCandidate:
        figures: dict[str, Any] = dict(zip(SHAPE_AXES, sizes, strict=True))
        counts: tuple[BudgetKind, ...] = ("params", "bytes", "kv_bytes")
        times: tuple[BudgetKind, ...] = ("decode", "prefill")
        figures |= {kind: int(self.cost(kind, sizes)) for kind in counts}
        if self.family.experts_per_token:
            figures["active"] = int(self.costs.model.active(self.columns([sizes]))[0])
        figures |= {f"{kind}_ms": self.cost(kind, sizes) for kind in times if self.speeds is not None}
        return plans.ShapeCandidate(**figures, score=self.score(sizes))

    def score(self, sizes: Sizes) -> float:
        score = self.retained(sizes)["score"]
        return self.balance(sizes) if score is None else score

    def balance(self, sizes: Sizes) -> float:
        """Minus the spread between the largest and the smallest kept fraction over the axes that may be cut."""
        axes = openable_axes(self.cfg, self.teacher)
        kept = [size / getattr(self.teacher, a) for a, size in zip(SHAPE_AXES, sizes, strict=True) if a in axes]
        return -(max(kept) - min(kept)) if kept else 0.0

    @cached_property
    def _shares(self) -> dict[tuple[Any, ...], float | None]:
        return {}

    def retained(self, sizes: Sizes) -> dict[str, float | None]:
        """Share kept on each axis that may be cut, and the predicted perplexity ratio as `score`; None if unknown."""
        shape = dict(zip(SHAPE_AXES, sizes, strict=True))
        kept_layers = self.ranking.layers(shape["layers"])
        out: dict[str, float | None] = {}
        for axis in openable_axes(self.cfg, self.teacher):
            groups = shape["kv_heads"] if axis == "heads" else None
            key = (axis, shape[axis], groups, shape["layers"])
            if key not in self._shares:
                self._shares[key] = self.ranking.retained(axis, layers=kept_layers, count=shape[axis], kv_heads=groups)
            out[axis] = self._shares[key]
        # The kept query heads already tell what the dropped kv groups take along: counting both would count it twice.
        lost = {a: 1 - v for a, v in out.items() if v is not None and not (a == "kv_heads" and "heads" in out)}
        weights = {
            axis: _DAMAGE_OF_METHOD.get(axis, {}).get(self.ranking.method(axis), weight)
            for axis, weight in _DAMAGE[self.cfg.compensate].items()
        }
        known = self.ranking.has_scores and lost
        out["score"] = math.exp(-sum(weights[axis] * share for axis, share in lost.items())) if known else None
        return out

    def chosen_by(self, candidate: plans.ShapeCandidate) -> str:
        """The last ranking that this candidate came first in."""
        if self.budget is None:
            return "sizes_given"
        if candidate.probes:
            return "probes"
        if candidate.masked:
            return "masked"
        return "retained_importance" if self.ranking.has_scores else "balanced"

    def plan(self, candidates: list[plans.ShapeCandidate], tried: int) -> plans.Plan:
        """The plan for the first of `candidates`, which are all recorded in it."""
        sizes: Sizes = candidates[0].sizes()
        teacher, student, ranking = self.teacher, self.student_dims(sizes), self.ranking
        layers = ranking.layers(student.layers)
        groups = [ranking.kv_heads(layer, student.kv_heads) for layer in layers]
        experts = [ranking.experts(layer, student.experts) for layer in layers] if student.experts else []
        mlps: list[Sequence[int | None]] = [*experts] if experts else [[None]] * len(layers)
        per_group = student.heads // student.kv_heads
        kept = plans.KeptUnits(
            layers=layers,
            hidden=ranking.hidden(student.hidden),
            ffn=[
                ranking.ffn(layer, student.ffn, expert)
                for layer, chosen in zip(layers, mlps, strict=True)
                for expert in chosen
            ],
            kv_heads=groups,
            heads=[ranking.heads(layer, kv, per_group) for layer, kv in zip(layers, groups, strict=True)],
            experts=experts,
        )
        student_config = self.student_config(sizes)
        params = plans.count_params(student_config, self.family)
        whole = plans.count_params(self.config, self.family)
        reached, all_counted = getattr(params, self.cfg.count), getattr(whole, self.cfg.count)
        budget, first = self.budget, candidates[0]
        cost = None
        if budget is not None:
            timed = getattr(first, f"{budget.kind}_ms", None)
            cost = self.cost(budget.kind, sizes) if timed is None else timed
        corrected = self.cfg.compensate != "none" and student.hidden < teacher.hidden
        plan = plans.Plan(
            model_type=str(self.config["model_type"]),
            teacher=plans.PlannedDims.of(teacher),
            student=plans.PlannedDims.of(student),
            kept=kept,
            norm_scale=math.sqrt(teacher.hidden / student.hidden) if corrected else 1.0,
            methods=self.methods(student, self.chosen_by(first)),
            teacher_params=whole,
            student_params=params,
            target=plans.PlanTarget(
                kind=budget.kind if budget else None,
                asked=budget.asked if budget else None,
                count=self.cfg.count,
                tolerance=self.cfg.tolerance,
                wanted=budget.wanted if budget else None,
                cost=cost,
                off_by=None if budget is None or cost is None else cost / budget.wanted - 1,
                reached=reached,
                share_of_teacher=reached / all_counted,
            ),
            retained=self.retained(sizes),
            candidates=candidates,
            candidates_tried=tried,
            warnings=[],
        )
        plan.warnings.extend(self.warnings(plan))
        return plan

    def methods(self, student: Dims, chosen: str) -> plans.Methods:
        cut = {axis: getattr(student, axis) < getattr(self.teacher, axis) for axis in SHAPE_AXES}
        by_axis = {axis: self.ranking.method(axis) if cut[axis] else "uncut" for axis in SHAPE_AXES}
        repair = self.cfg.layer_repair if cut["layers"] else "none"
        return plans.Methods(**by_axis, compensate=self.cfg.compensate, layer_repair=repair, search=chosen)

    def warnings(self, plan: plans.Plan) -> list[str]:
        out = []
        if not self.ranking.has_scores and plan.cut_axes():
            out.append("no importance scores: the first units of each axis are kept; this plan is for its shape only")
        if plan.student.hidden < plan.teacher.hidden and plan.norm_scale == 1.0:
            out.append("hidden is cut without the norm correction (prune.compensate=none)")
        if few := self.experts_short_of_tokens(plan):
            out.append(few)
        if not plan.cut_axes():
            out.append("nothing is cut: the student equals the teacher")
        return out

    def experts_short_of_tokens(self, plan: plans.Plan) -> str | None:
        """A sentence about the experts that compensation has little to fit on; None when there are none."""
        counted = (self.scores or {}).get("ffn.expert_tokens")
        if counted is None or self.cfg.compensate == "none" or "ffn" not in plan.cut_axes():
            return None
        kept = zip(plan.kept.layers, plan.kept.experts, strict=True)
        tokens = np.concatenate([np.asarray(counted[layer])[experts] for layer, experts in kept])
        few = int((tokens < plan.student.ffn).sum())
        if not few:
            return None
        return (
            f"{few} of {len(tokens)} experts got fewer calibration tokens than the {plan.student.ffn} ffn units that "
            f"stay (the least: {tokens.min():.0f}): where no token was, compensation leaves the sliced weight; raise "
            "importance.calibration_tokens"
        )


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


def make_plan(config: Mapping[str, Any], family: Family, scores: Mapping[str, Any] | None, cfg: PruneConfig) -> Plan:
    """Choose the student's shape and the kept units by prediction alone.

    `scores`: arrays as importance.py writes them (see `search.Scores`); None decides shapes only and keeps the first
    units. Raises ConfigError when the budget cannot be met, a size is not allowed or scores are missing.
    """

    search = Search(dict(config), family, scores, cfg)
    return search.plan(*search.shortlist())
