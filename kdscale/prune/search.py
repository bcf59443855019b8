"""From a budget to a shape: enumerate, keep what meets the budget, take what keeps the most. numpy only.

The score of a shape is exp(−Σ over the axes that may be cut of weight · lost share of importance): the predicted ratio
of the teacher's perplexity to the student's before distilling. Shares of different axes do not weigh the same (every
sublayer reads the hidden axis; regression gives most of a lost head back), so the weights are measured ones. Without
scores (`kdscale plan` before importance) the most balanced shape is taken: the smallest spread between the axes' kept
fractions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdscale.config import PruneConfig, parse_target
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.prune import plan as plans
from kdscale.prune.cost import SHAPE_AXES, CostModel
from kdscale.prune.ranking import Ranking

_KEPT_CANDIDATES = 10
# From these teacher sizes on a step is 256, what tensor cores and tensor parallelism like; below, 32.
_REAL_HIDDEN, _REAL_FFN = 2048, 4096
_REAL_STEP, _SMALL_STEP = 256, 32

# Rise of log-perplexity for each share of an axis' importance that is lost, on SmolLM2-135M (docs/pruning.md): near
# linear over the cuts measured. For another model the order of magnitude holds, the exact ranking is a guess.
_DAMAGE: dict[str, dict[str, float]] = {
    "two_stream": {"ffn": 3.7, "heads": 0.8, "kv_heads": 0.8, "hidden": 23.0, "layers": 5.1},
    "ridge": {"ffn": 3.7, "heads": 0.8, "kv_heads": 0.8, "hidden": 23.0, "layers": 5.1},
    "none": {"ffn": 6.5, "heads": 5.7, "kv_heads": 5.7, "hidden": 27.0, "layers": 5.1},
}

# The same for scores whose lost shares mean something else.
_DAMAGE_OF_METHOD: dict[str, dict[str, float]] = {"hidden": {"pca": 31.0}}

Sizes = tuple[int, int, int, int, int]  # in the order of SHAPE_AXES


def openable_axes(cfg: PruneConfig, dims: Dims) -> tuple[str, ...]:
    """Axes that this config may cut: given a size below the teacher's, or open to the search. What importance needs."""
    given = {axis: getattr(cfg, axis) for axis in SHAPE_AXES}
    cut = {axis for axis, size in given.items() if size is not None and size < getattr(dims, axis)}
    if cfg.target_params is not None:
        cut |= {axis for axis in cfg.axes if given[axis] is None}
    return tuple(axis for axis in SHAPE_AXES if axis in cut)


def build_plan(
    config: Mapping[str, Any], family: Family, scores: Mapping[str, Any] | None, cfg: PruneConfig
) -> plans.Plan:
    """See `plan.make_plan`."""
    search = _Search(dict(config), family, scores, cfg)
    best, candidates, tried = search.choose()
    return search.plan(best, candidates, tried)


@dataclass(frozen=True)
class _Search:
    config: dict[str, Any]
    family: Family
    scores: Mapping[str, Any] | None
    cfg: PruneConfig

    @cached_property
    def teacher(self) -> Dims:
        return self.family.dims(self.config)

    @cached_property
    def cost(self) -> CostModel:
        return CostModel.of(self.config, self.family)

    @cached_property
    def ranking(self) -> Ranking:
        return Ranking(self.teacher, self.scores, self.cfg, openable_axes(self.cfg, self.teacher))

    @cached_property
    def target(self) -> int | None:
        """Counted parameters asked for. Raises ConfigError when that is the teacher's count or more."""
        if self.cfg.target_params is None:
            return None
        kind, value = parse_target(self.cfg.target_params)
        whole = self.counted(self.sizes_of(self.teacher))
        wanted = round(value * whole) if kind == "fraction" else int(value)
        if wanted >= whole:
            raise ConfigError(
                "prune.target_params",
                expected=f"fewer than the teacher's {whole:,} {self.counted_as} parameters",
                got=f"{self.cfg.target_params} = {wanted:,}",
            )
        return max(wanted, 1)

    @property
    def counted_as(self) -> str:
        return self.cfg.count.replace("_", "-")

    @staticmethod
    def sizes_of(dims: Dims) -> Sizes:
        return (dims.hidden, dims.ffn, dims.heads, dims.kv_heads, dims.layers)

    def counted(self, sizes: Sizes) -> int:
        return int(self.cost.params({a: np.array(s) for a, s in zip(SHAPE_AXES, sizes, strict=True)}, self.cfg.count))

    def choose(self) -> tuple[Sizes, list[plans.Candidate], int]:
        """The chosen sizes, the best candidates (chosen first) and how many shapes met the budget."""
        fixed = self.fixed_sizes()
        if self.target is None:
            return fixed, [self.candidate(fixed)], 1
        explicit = any(getattr(self.cfg, axis) is not None for axis in SHAPE_AXES)
        if explicit and self.within(self.counted(fixed)):
            return fixed, [self.candidate(fixed)], 1  # the sizes given meet the budget: nothing else needs to go
        shapes = self.enumerate()
        counts = self.cost.params({a: shapes[:, i] for i, a in enumerate(SHAPE_AXES)}, self.cfg.count)
        near = np.flatnonzero(np.abs(counts - self.target) <= self.cfg.tolerance * self.target)
        if not len(near):
            raise self.impossible(counts)
        scored = [self.candidate(tuple(shapes[index].tolist())) for index in near]
        scored.sort(key=self.preference)
        best = scored[0]
        return tuple(getattr(best, a) for a in SHAPE_AXES), scored[:_KEPT_CANDIDATES], len(scored)

    def within(self, counted: int) -> bool:
        return self.target is not None and abs(counted - self.target) <= self.cfg.tolerance * self.target

    def preference(self, item: plans.Candidate) -> tuple[float, ...]:
        """Best score first; then nearest to the target; then the larger sizes: never the order of enumeration."""
        gap = abs(item.params - (self.target or item.params))
        return (-round(item.score, 12), gap, *(-getattr(item, axis) for axis in SHAPE_AXES))

    def fixed_sizes(self) -> Sizes:
        """The teacher's shape with the sizes that were given. Raises ConfigError for one that is not allowed."""
        teacher, given = self.teacher, self.cfg
        for axis in SHAPE_AXES:
            size, limit = getattr(given, axis), getattr(teacher, axis)
            if size is not None and size > limit:
                raise ConfigError(f"prune.{axis}", expected=f"at most the teacher's {limit}", got=str(size))
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
        is_open = {axis for axis in cfg.axes if getattr(cfg, axis) is None}

        def options(axis: str, step: int) -> list[int]:
            whole = getattr(teacher, axis)
            given = getattr(cfg, axis)
            if axis not in is_open:
                return [given or whole]
            return sorted({*range(step, whole, step), whole})

        hidden_step = cfg.hidden_divisor or (_REAL_STEP if teacher.hidden >= _REAL_HIDDEN else _SMALL_STEP)
        ffn_step = cfg.ffn_divisor or (_REAL_STEP if teacher.ffn >= _REAL_FFN else _SMALL_STEP)
        pairs = []
        for kv_heads in options("kv_heads", 1):
            if cfg.heads is not None:
                pairs += [(cfg.heads, kv_heads)] if cfg.heads % kv_heads == 0 and cfg.heads // kv_heads <= group else []
            else:
                pairs += [(kv_heads * n, kv_heads) for n in (range(1, group + 1) if "heads" in is_open else [group])]
        rows = [
            (hidden, ffn, heads, kv_heads, layers)
            for hidden, (heads, kv_heads) in itertools.product(options("hidden", hidden_step), pairs)
            if not self.family.violations(teacher.replace(hidden=hidden, heads=heads, kv_heads=kv_heads))
            for ffn, layers in itertools.product(options("ffn", ffn_step), options("layers", 1))
        ]
        if not rows:
            raise ConfigError("prune.axes", expected="at least one shape that the family allows", got=str(cfg.axes))
        return np.array(rows, dtype=np.int64)

    def impossible(self, counts: np.ndarray) -> ConfigError:
        assert self.target is not None
        below, above = counts[counts < self.target], counts[counts > self.target]
        nearest = [f"{int(v):,}" for v in ([below.max()] if len(below) else []) + ([above.min()] if len(above) else [])]
        return ConfigError(
            "prune.target_params",
            expected=f"within {self.cfg.tolerance:.0%} of a reachable size, {int(counts.min()):,} to "
            f"{int(counts.max()):,} {self.counted_as} parameters with axes {', '.join(self.cfg.axes) or '(none)'}",
            got=f"{self.cfg.target_params} = {self.target:,} (nearest reachable: {' and '.join(nearest)})",
            hint="change the target, open another axis in prune.axes, raise prune.tolerance or lower the divisors",
        )

    def candidate(self, sizes: Sizes) -> plans.Candidate:
        score = self.retained(sizes)["score"]
        if score is None:
            score = self.balance(sizes)
        return plans.Candidate(**dict(zip(SHAPE_AXES, sizes, strict=True)), params=self.counted(sizes), score=score)

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

    def plan(self, sizes: Sizes, candidates: list[plans.Candidate], tried: int) -> plans.Plan:
        teacher, student, ranking = self.teacher, self.student_dims(sizes), self.ranking
        layers = ranking.layers(student.layers)
        groups = [ranking.kv_heads(layer, student.kv_heads) for layer in layers]
        per_group = student.heads // student.kv_heads
        kept = plans.Kept(
            layers=layers,
            hidden=ranking.hidden(student.hidden),
            ffn=[ranking.ffn(layer, student.ffn) for layer in layers],
            kv_heads=groups,
            heads=[ranking.heads(layer, kv, per_group) for layer, kv in zip(layers, groups, strict=True)],
        )
        student_config = self.student_config(sizes)
        params = plans.count_params(student_config, self.family)
        whole = plans.count_params(self.config, self.family)
        reached, all_counted = getattr(params, self.cfg.count), getattr(whole, self.cfg.count)
        corrected = self.cfg.compensate != "none" and student.hidden < teacher.hidden
        plan = plans.Plan(
            model_type=str(self.config["model_type"]),
            teacher=plans.Shape.of(teacher),
            student=plans.Shape.of(student),
            kept=kept,
            norm_scale=math.sqrt(teacher.hidden / student.hidden) if corrected else 1.0,
            methods=self.methods(student),
            teacher_params=whole,
            student_params=params,
            target=plans.Target(
                asked=self.cfg.target_params,
                count=self.cfg.count,
                tolerance=self.cfg.tolerance,
                params=self.target,
                reached=reached,
                share_of_teacher=reached / all_counted,
                off_by=None if self.target is None else reached / self.target - 1,
            ),
            retained=self.retained(sizes),
            candidates=candidates,
            candidates_tried=tried,
            warnings=[],
        )
        plan.warnings.extend(self.warnings(plan))
        return plan

    def methods(self, student: Dims) -> plans.Methods:
        cut = {a: getattr(student, a) < getattr(self.teacher, a) for a in SHAPE_AXES}
        by_axis = {axis: self.ranking.method(axis) if cut[axis] else "uncut" for axis in SHAPE_AXES}
        search = "retained_importance" if self.ranking.has_scores else "balanced"
        chosen = "sizes_given" if self.target is None else search
        return plans.Methods(**by_axis, compensate=self.cfg.compensate, search=chosen)

    def warnings(self, plan: plans.Plan) -> list[str]:
        out = []
        if not self.ranking.has_scores and plan.cut_axes():
            out.append("no importance scores: the first units of each axis are kept; this plan is for its shape only")
        if plan.student.hidden < plan.teacher.hidden and plan.norm_scale == 1.0:
            out.append("hidden is cut without the norm correction (prune.compensate=none)")
        if not plan.cut_axes():
            out.append("nothing is cut: the student equals the teacher")
        return out
