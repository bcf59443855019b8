"""From a chosen shape to the plan: every index that stays, the counts, and warnings. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdscale.config.criteria import FOLLOWED
from kdscale.config.prune import PruneConfig
from kdscale.families import Dims, Family
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.candidates import ShapeCandidate
from kdscale.prune.importance.ranking import Ranking, layer_repair
from kdscale.prune.plan import (
    KeptUnits,
    Methods,
    ParamCounts,
    Plan,
    PlannedDims,
    PlanTarget,
    SearchResult,
    count_params,
)
from kdscale.prune.search.shapes import Search


def make_plan(config: Mapping[str, Any], family: Family, scores: Mapping[str, Any] | None, cfg: PruneConfig) -> Plan:
    """Choose the student's shape and the kept units by prediction alone.

    `scores`: ImportanceScores, or arrays by name in the units of the criteria table. None decides shapes only and keeps
    the first units. Raises ConfigError when the budget cannot be met, a size is not allowed or scores are missing.
    """
    search = Search(config, family, scores, cfg)
    return build_plan(search, *search.shortlist())


def build_plan(search: Search, candidates: list[ShapeCandidate], tried: int) -> Plan:
    """The plan for the first of `candidates`, which are all recorded in it; `tried`: how many shapes met the budget."""
    chosen, teacher, ranking = candidates[0], search.teacher, search.ranking
    sizes = chosen.sizes()
    student = sizes.dims(teacher)
    student_config = search.family.student_config(search.config, student, ranking.layers(student.layers))
    student_params = count_params(student_config, search.family)
    teacher_params = count_params(search.config, search.family)
    corrected = search.cfg.compensate != "none" and student.hidden < teacher.hidden
    plan = Plan(
        model_type=str(search.config["model_type"]),
        teacher=PlannedDims.of(teacher),
        student=PlannedDims.of(student),
        kept=kept_units(ranking, student),
        norm_scale=math.sqrt(teacher.hidden / student.hidden) if corrected else 1.0,
        methods=_methods(search, student, chosen),
        teacher_params=teacher_params,
        student_params=student_params,
        target=_target(search, chosen, teacher_params, student_params),
        retained=search.scoring.retained(sizes),
        candidates=candidates,
        candidates_tried=tried,
        warnings=[],
    )
    plan.warnings.extend(_warnings(search, plan))
    return plan


def kept_units(ranking: Ranking, student: Dims) -> KeptUnits:
    """The units that stay in a student of these sizes; no units of an axis in a layer that does not have it."""
    layers, has = ranking.layers(student.layers), ranking.has
    groups = [ranking.kv_heads(layer, student.kv_heads) if has(layer, "kv_heads") else [] for layer in layers]
    experts = [ranking.experts(layer, student.experts) if has(layer, "experts") else [] for layer in layers]
    mlps: list[Sequence[int | None]] = [*experts] if student.experts else [[None]] * len(layers)
    per_group = student.heads // student.kv_heads
    plain = {axis: size for axis in ("ssm_head_dim", "ssm_state", *FOLLOWED) if (size := getattr(student, axis))}
    return KeptUnits(
        layers=layers,
        hidden=ranking.hidden(student.hidden),
        ffn=[
            ranking.ffn(layer, student.ffn, expert) if has(layer, "ffn") else []
            for layer, kept_experts in zip(layers, mlps, strict=True)
            for expert in kept_experts
        ],
        kv_heads=groups,
        heads=[
            ranking.heads(layer, kept, per_group) if has(layer, "heads") else []
            for layer, kept in zip(layers, groups, strict=True)
        ],
        experts=experts if student.experts else [],
        ssm_heads=(
            [ranking.ssm_heads(layer, student.ssm_heads) if has(layer, "ssm_heads") else [] for layer in layers]
            if student.ssm_heads
            else []
        ),
        **{
            axis: [ranking.units(axis, layer, size) if has(layer, axis) else [] for layer in layers]
            for axis, size in plain.items()
        },
    )


def _target(search: Search, chosen: ShapeCandidate, teacher: ParamCounts, student: ParamCounts) -> PlanTarget:
    budget, count = search.budget, search.cfg.count
    cost = None
    if budget is not None:
        timed = getattr(chosen, f"{budget.kind}_ms", None)
        cost = search.cost(budget.kind, chosen.sizes()) if timed is None else timed
    reached = getattr(student, count)
    return PlanTarget(
        kind=budget.kind if budget else None,
        asked=budget.asked if budget else None,
        count=count,
        tolerance=search.cfg.tolerance,
        wanted=budget.wanted if budget else None,
        cost=cost,
        off_by=None if budget is None or cost is None else cost / budget.wanted - 1,
        reached=reached,
        share_of_teacher=reached / getattr(teacher, count),
    )


def _methods(search: Search, student: Dims, chosen: ShapeCandidate) -> Methods:
    cut = {axis: getattr(student, axis) < getattr(search.teacher, axis) for axis in SHAPE_AXES}
    by_axis = {axis: search.ranking.method(axis) if cut[axis] else "uncut" for axis in SHAPE_AXES}
    repair = layer_repair(search.cfg, search.teacher) if cut["layers"] else "none"
    last = _last_ranking(search, chosen)
    return Methods(**by_axis, compensate=search.cfg.compensate, layer_repair=repair, search=last)


def _last_ranking(search: Search, chosen: ShapeCandidate) -> SearchResult:
    """The last ranking that this candidate came first in."""
    if search.budget is None:
        return "sizes_given"
    if chosen.probes:
        return "probes"
    if chosen.masked:
        return "masked"
    return "retained_importance" if search.ranking.has_scores else "balanced"


def _warnings(search: Search, plan: Plan) -> list[str]:
    out = []
    if not search.ranking.has_scores and plan.cut_axes():
        out.append("no importance scores: the first units of each axis are kept; this plan is for its shape only")
    if plan.student.hidden < plan.teacher.hidden and plan.norm_scale == 1.0:
        out.append("hidden is cut without the norm correction (prune.compensate=none)")
    if few := _experts_short_of_tokens(search, plan):
        out.append(few)
    if not plan.cut_axes():
        out.append("nothing is cut: the student equals the teacher")
    return out


def _experts_short_of_tokens(search: Search, plan: Plan) -> str | None:
    """A sentence about the experts that compensation has little to fit on; None when there are none."""
    counted = (search.scores or {}).get("ffn.expert_tokens")
    if counted is None or search.cfg.compensate == "none" or "ffn" not in plan.cut_axes():
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
