"""The plan stage: predicted scores of all shapes, masked runs of the best, short distillations of the finalists.

Each ranking is dearer than the one before and sees fewer shapes. What every shape was given is in plan.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdscale.config.prune import PruneConfig
from kdscale.models import loading
from kdscale.pipeline import calibration
from kdscale.pipeline.calibration import scoring_batches
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.pipeline.stages.probes import by_probes
from kdscale.prune.search.latency import LATENCY_KINDS

if TYPE_CHECKING:
    from kdscale.families import Family
    from kdscale.prune.plan import Plan, ShapeCandidate
    from kdscale.prune.search.latency import LatencyModel
    from kdscale.prune.search.shapes import Search


# Shapes that are timed themselves before one is taken under a latency target.
_TIMED_CANDIDATES = 5


# A timing this far above a limit still keeps it, if the repeats differ by as much: no more, or noise would be rewarded.
_TIMING_NOISE = 0.05


def search_plan(context: StageContext, scores: Mapping[str, Any]) -> Plan:
    """The plan of this run. Raises ConfigError when the budget cannot be met."""
    from kdscale.prune.search.hidden_basis import choose
    from kdscale.prune.search.shapes import Search

    teacher, family = loading.open_teacher(context.model_to_prune)
    tied = family.tied(teacher.config)

    def make(config: Mapping[str, Any], family: Family, scores: Mapping[str, Any] | None, cfg: PruneConfig) -> Plan:
        # a rotated teacher has a head where a tied one has none: of the embedding's dtype
        search = Search(dict(config), family, scores, cfg, lambda name: teacher.itemsize(tied.get(name, name)))
        return _searched(context, search)

    return choose(teacher, family, scores, context.config.prune, make)


def _searched(context: StageContext, search: Search) -> Plan:
    from kdscale.prune.axes import target_kind

    if target_kind(search.cfg) not in ("decode", "prefill"):
        candidates, tried = search.shortlist()
        return search.plan(_ranked(context, search, candidates), tried)
    model = measured_latencies(context, search)
    search = replace(search, speeds=model)
    candidates, tried = search.shortlist()
    within, others = _by_measured_time(search, model, candidates, context)
    chosen = _ranked(context, search, within) if within else []
    return _timed(search.plan([*chosen, *others], tried), model)


def what_matters(context: StageContext) -> Mapping[str, Any]:
    """What of the config the choice depends on besides `prune`: with probes, how they are distilled."""
    config = context.config
    return {"distill": config.distill.decisive()} if config.prune.search.probe_tokens is not None else {}


def _ranked(context: StageContext, search: Search, candidates: list[ShapeCandidate]) -> list[ShapeCandidate]:
    """In order of the dearest score that the config asks for."""
    settings = context.config.prune.search
    if len(candidates) > 1 and settings.masked_candidates:
        candidates = by_masked_score(context, search, candidates)
    if len(candidates) > 1 and settings.probe_tokens is not None:
        candidates = by_probes(context, search.teacher, candidates)
    return candidates


def by_masked_score(context: StageContext, search: Search, candidates: list[ShapeCandidate]) -> list[ShapeCandidate]:
    """Run the best predicted candidates masked and put them in order of their divergence from the teacher."""
    from kdscale.models.hidden_states import Scratch
    from kdscale.prune.rotation import rotated_teacher
    from kdscale.prune.search.masked import score_masked
    from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads

    config = context.config
    set_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    teacher, family = loading.open_teacher(context.model_to_prune)
    if search.cfg.hidden_method == "pca":
        teacher = rotated_teacher(teacher, family, search.scores or {})
    chosen = candidates[: config.prune.search.masked_candidates]
    found = score_masked(
        teacher,
        family,
        [search.plan([candidate], 1) for candidate in chosen],
        scoring_batches(config, context.run.data),
        calibration=calibration.calibration_batches(config, context.run.data),
        ridge=config.prune.ridge_lambda,
        dtype=resolve_dtype(config.importance.dtype, device),
        device=device,
        reporter=context.reporter,
        scratch=Scratch(context.run.work / "masked", config.runtime.activation_bytes),
    )
    pairs = zip(chosen, found, strict=True)
    scored = [candidate.model_copy(update={"masked": masked}) for candidate, masked in pairs]
    scored.sort(key=_divergence)
    return [*scored, *candidates[len(chosen) :]]


def _divergence(candidate: ShapeCandidate) -> float:
    assert candidate.masked is not None
    return candidate.masked.kl


def measured_latencies(context: StageContext, search: Search) -> LatencyModel:
    """A latency model for the shapes the search may choose, fitted to a few that are timed here and now."""
    from kdscale.prune.search.latency import LatencyModel
    from kdscale.prune.search.latency_timing import machine_name, measurer
    from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads

    config = context.config
    tokens = config.prune.search.context_tokens
    threads = set_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.importance.dtype, device)
    machine = machine_name(device, dtype, threads, tokens)
    time_shape = measurer(search.config, search.family, device=device, dtype=dtype, context_tokens=tokens)
    model = LatencyModel(time_shape, machine, context.run.speed)
    with context.reporter.bar("latency of shapes", total=8, unit="shape") as bar:
        model.fit(search.teacher, search.columns(search.enumerate()), bar.advance)
    return model


def _by_measured_time(
    search: Search, model: LatencyModel, candidates: list[ShapeCandidate], context: StageContext
) -> tuple[list[ShapeCandidate], list[ShapeCandidate]]:
    """Time the best candidates: those that keep the limit within their own spread; the others, fastest first."""
    budget = search.budget
    assert budget is not None
    assert budget.kind in ("decode", "prefill")
    kind = budget.kind
    within: list[ShapeCandidate] = []
    over: list[ShapeCandidate] = []
    for candidate in candidates[:_TIMED_CANDIDATES]:
        dims = search.student_dims(candidate.sizes())
        timing = model.timing(dims)
        times = {f"{each}_ms": timing.total(each, dims.layers) for each in LATENCY_KINDS}
        spread = timing.spread[kind]
        found = candidate.model_copy(update={**times, "latency_spread": spread})
        keeps = times[f"{kind}_ms"] <= budget.wanted * (1 + min(spread, _TIMING_NOISE))
        (within if keeps else over).append(found)
        context.reporter.say(
            f"  {times[f'{kind}_ms']:.3g} ms ± {spread / 2:.0%}: hidden {dims.hidden}, ffn {dims.ffn}, "
            f"{dims.heads} heads, {dims.layers} layers"
        )
    over.sort(key=lambda one: getattr(one, f"{kind}_ms"))
    return within, [*over, *candidates[_TIMED_CANDIDATES:]]


def _timed(plan: Plan, model: LatencyModel) -> Plan:
    """Say in the plan how far its latencies can be trusted."""
    kind = plan.target.kind
    assert kind in ("decode", "prefill")
    first = plan.candidates[0]
    if plan.target.off_by is not None and plan.target.off_by > (first.latency_spread or 0.0):
        plan.warnings.append(
            f"no candidate kept the {kind} limit of {plan.target.asked} when timed itself; the best takes "
            f"{plan.target.cost:.3g} ms"
        )
    plan.warnings.append(
        f"{kind} latency is of random weights on this machine, predictions are good to about "
        f"{model.error[kind]:.0%}, repeated timings of the chosen shape spread by {first.latency_spread or 0.0:.0%}"
    )
    return plan


def choose_plan(context: StageContext) -> Facts:
    from kdscale.prune.importance.scores_file import load_scores

    plan = search_plan(context, load_scores(context.run.importance))
    plan.save(context.run.plan)
    for warning in plan.warnings:
        context.reporter.say(f"  note: {warning}")
    before, after = plan.teacher_params.total, plan.student_params.total
    return {"parameters": f"{before / 1e6:,.1f} M → {after / 1e6:,.1f} M"}
