"""The plan stage: predicted scores of all shapes, masked runs of the best, short distillations of the finalists.

Each ranking costs more than the one before and sees fewer shapes. plan.json records all scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdscale.config.root import Config
from kdscale.models import loading
from kdscale.pipeline import calibration
from kdscale.pipeline.calibration import scoring_batches
from kdscale.pipeline.probes import by_probes
from kdscale.pipeline.spawn import run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.prune.search.latency import LATENCY_KINDS
from kdscale.runs.folder import RunFolder
from kdscale.units import format_count
from kdscale.weights import quantised_notice

if TYPE_CHECKING:
    from kdscale.prune.candidates import ShapeCandidate
    from kdscale.prune.plan import Plan
    from kdscale.prune.search.latency import LatencyModel
    from kdscale.prune.search.shapes import Search

# Shapes that are timed themselves before one is taken under a latency target.
_TIMED_CANDIDATES = 5

# A timing this far above a limit still keeps it, if the repeats differ by as much: no more, or noise would be rewarded.
_TIMING_NOISE = 0.05


def search_plan(context: StageContext, scores: Mapping[str, Any]) -> Plan:
    """The plan of this run. Raises ConfigError when the budget cannot be met."""
    from kdscale.prune.search.hidden_basis import hidden_bases
    from kdscale.prune.search.shapes import Search

    keep_heads = context.config.prune.keep_mtp
    teacher, family = loading.open_teacher(context.model_to_prune, keep_heads=keep_heads)
    tied = family.tied(teacher.config)
    for basis in hidden_bases(teacher.config, family, context.config.shaping):
        # a rotated teacher has a head where a tied one has none: of the embedding's dtype
        search = Search(
            basis.config, family, scores, basis.cfg, itemsize=lambda name: teacher.itemsize(tied.get(name, name))
        )
        plan = _plan_by_all_rankings(context, search)
        if basis.suits(plan):
            break
    plan.warnings.extend(basis.warnings(plan))
    plan.warnings.extend(filter(None, [quantised_notice(context.model_to_prune)]))
    return plan


def _plan_by_all_rankings(context: StageContext, search: Search) -> Plan:
    from kdscale.prune.axes import target_kind
    from kdscale.prune.search.planning import build_plan

    if target_kind(search.cfg) not in ("decode", "prefill"):
        candidates, tried = search.shortlist()
        return build_plan(search, _ranked(context, search, candidates), tried)
    model = measured_latencies(context, search)
    search = search.with_speeds(model)
    candidates, tried = search.shortlist()
    within, over = _by_measured_time(search, model, candidates, context)
    ranked = _ranked(context, search, within) if within else []
    return _timed(build_plan(search, [*ranked, *over], tried), model)


def what_matters(context: StageContext) -> Mapping[str, Any]:
    """What the choice depends on besides `prune`: with probes, how they are distilled; with tasks, their files."""
    from kdscale.pipeline.candidate_tasks import task_files

    config = context.config
    facts: dict[str, Any] = {}
    if config.prune.search.probe_tokens is not None:
        facts["distill"] = config.distill.decisive()
    if config.prune.search.tasks:
        facts |= {"task_files": task_files(config), "seed": config.seed}
    return facts


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError and DataError for tasks that candidates cannot be asked."""
    del run
    if config.prune.search.tasks:
        from kdscale.pipeline.candidate_tasks import prepared_tasks

        prepared_tasks(config)


def distils_by_itself(config: Config) -> str:
    """The field that asks for probes, where it does."""
    return "prune.search.probe_tokens" if config.prune.search.probe_tokens is not None else ""


def _ranked(context: StageContext, search: Search, candidates: list[ShapeCandidate]) -> list[ShapeCandidate]:
    """In order of the most expensive score that the config asks for."""
    settings = search.cfg.search
    if len(candidates) > 1 and settings.masked_candidates:
        candidates = by_masked_score(context, search, candidates)
    if len(candidates) > 1 and settings.probe_tokens is not None:
        candidates = by_probes(context, search.teacher, candidates)
    return candidates


def by_masked_score(context: StageContext, search: Search, candidates: list[ShapeCandidate]) -> list[ShapeCandidate]:
    """Run the best predicted candidates masked and put them in order of the config's score."""
    from kdscale.models.hidden_states import Scratch
    from kdscale.pipeline.candidate_tasks import questions
    from kdscale.prune.rotation import rotated_teacher
    from kdscale.prune.search.masked import score_masked
    from kdscale.prune.search.planning import build_plan
    from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads

    config = context.config
    order = config.prune.search.candidate_score.order
    set_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    teacher, family = loading.open_teacher(context.model_to_prune, keep_heads=config.prune.keep_mtp)
    if search.cfg.hidden_method == "pca":
        teacher = rotated_teacher(teacher, family, search.scores or {})
    best = candidates[: config.prune.search.masked_candidates]
    scores = score_masked(
        teacher,
        family,
        [build_plan(search, [candidate], 1) for candidate in best],
        scoring_batches(config, context.run.data),
        calibration=calibration.calibration_batches(config, context.run.data),
        ridge=config.prune.ridge_lambda,
        dtype=resolve_dtype(config.importance.dtype, device),
        device=device,
        reporter=context.reporter,
        scratch=Scratch(context.run.work / "masked", config.runtime.activation_bytes),
        questions=questions(config, context.model_to_prune) if config.prune.search.tasks else None,
        importance=search.scores,
        acceptance=config.prune.search.candidate_score.measured,
    )
    pairs = zip(best, scores, strict=True)
    scored = [candidate.model_copy(update={"masked": masked}) for candidate, masked in pairs]
    scored.sort(key=lambda candidate: order(_masked(candidate)))
    return [*scored, *candidates[len(best) :]]


def _masked(candidate: ShapeCandidate) -> dict[str, Any]:
    assert candidate.masked is not None
    return candidate.masked.model_dump()


def measured_latencies(context: StageContext, search: Search) -> LatencyModel:
    """A latency model for the shapes the search may choose, fitted to a few that are timed here and now."""
    from kdscale.prune.search.latency import LatencyModel, TimingFile
    from kdscale.prune.search.latency_timing import machine_name, measurer
    from kdscale.prune.search.space import columns
    from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads

    config = context.config
    tokens = config.prune.search.context_tokens
    threads = set_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.importance.dtype, device)
    machine = machine_name(device, dtype, threads, tokens)
    time_shape = measurer(search.config, search.family, device=device, dtype=dtype, context_tokens=tokens)
    model = LatencyModel(time_shape, TimingFile(machine, context.run.speed))
    with context.reporter.bar("latency of shapes", total=8, unit="shape") as bar:
        model.fit(search.teacher, columns(search.space.all()), bar.advance)
    return model


def _by_measured_time(
    search: Search, model: LatencyModel, candidates: list[ShapeCandidate], context: StageContext
) -> tuple[list[ShapeCandidate], list[ShapeCandidate]]:
    """Time the best candidates. Returns those that keep the limit within their own spread, and the others, the fastest
    of the timed ones first."""
    budget = search.budget
    assert budget is not None
    assert budget.kind in ("decode", "prefill")
    kind = budget.kind
    within: list[ShapeCandidate] = []
    over: list[ShapeCandidate] = []
    for candidate in candidates[:_TIMED_CANDIDATES]:
        dims = candidate.sizes().dims(search.teacher)
        timing = model.timing(dims)
        times = {f"{phase}_ms": timing.total(phase, dims.layers) for phase in LATENCY_KINDS}
        spread = timing.spread[kind]
        timed = candidate.model_copy(update={**times, "latency_spread": spread})
        keeps = times[f"{kind}_ms"] <= budget.wanted * (1 + min(spread, _TIMING_NOISE))
        (within if keeps else over).append(timed)
        context.reporter.say(
            f"  {times[f'{kind}_ms']:.3g} ms ± {spread / 2:.0%}: hidden {dims.hidden}, ffn {dims.ffn}, "
            f"{dims.heads} heads, {dims.layers} layers"
        )
    over.sort(key=lambda candidate: getattr(candidate, f"{kind}_ms"))
    return within, [*over, *candidates[_TIMED_CANDIDATES:]]


def _timed(plan: Plan, model: LatencyModel) -> Plan:
    """Add to the plan's warnings how far its latencies can be trusted."""
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


def plan_rank(context: StageContext) -> None:
    """Write plan.json."""
    from kdscale.runs.importance_scores import load_scores

    search_plan(context, load_scores(context.run.importance)).save(context.run.plan)


def choose_plan(context: StageContext) -> Facts:
    """Search on one device; returns the parameter counts before and after."""
    from kdscale.prune.plan import Plan

    run_on_ranks("plan", plan_rank, context, 1)
    plan = Plan.load(context.run.plan)
    for warning in plan.warnings:
        context.reporter.say(f"  note: {warning}")
    before, after = plan.teacher_params.total, plan.student_params.total
    return {"parameters": f"{format_count(before, 4)} → {format_count(after, 4)}"}
