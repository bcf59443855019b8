"""The importance stage: score everything that the config may cut."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from kdscale.files import atomic_dir, read_json, write_json
from kdscale.models.loading import open_teacher
from kdscale.pipeline.spawn import join_calibration, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext


def axes_to_score(context: StageContext) -> Facts:
    """What importance depends on of the pruning settings: the axes that may be cut, and the expensive criteria."""
    from kdscale.prune.axes import openable_axes
    from kdscale.prune.for_family import settled
    from kdscale.prune.importance.ranking import criteria_to_measure, most_dropped

    teacher, family = open_teacher(context.model_to_prune)
    cfg = settled(context.config.prune, family, teacher.config)
    dims = family.dims(teacher.config)
    axes = openable_axes(cfg, dims)
    asked = [row for row in criteria_to_measure(cfg, axes) if row.on_request]
    facts: dict[str, Any] = {"axes": list(axes)}
    if asked:
        facts["criteria"] = [row.name for row in asked]
    if any(row.needs_gram for row in asked):
        facts["ridge_lambda"] = cfg.ridge_lambda
    if any(row.in_order for row in asked):
        facts["layers_dropped"] = most_dropped(cfg, dims)
    return facts


def measure_importance(context: StageContext) -> Facts:
    """Run the importance pass on all ranks; returns how many tokens it saw and which scores there are.

    Says where the calibration text does not stand for the text that matters.
    """
    from kdscale.pipeline.calibration_text import calibration_notices
    from kdscale.runs.importance_scores import NOTICES_FILE, SUMMARY_FILE

    notices = calibration_notices(context.config, context.run.data)
    for line in notices:
        context.reporter.say(f"  note: {line}")
    run_on_ranks("importance", importance_rank, context, ranks_of(context.config, "importance.processes"))
    summary = read_json(context.run.importance / SUMMARY_FILE)
    if notices:
        write_json(context.run.importance / NOTICES_FILE, notices)  # for the report
    return {"tokens": f"{summary['tokens']:,}", "scores": ", ".join(summary["arrays"]) or "none needed"}


def importance_rank(context: StageContext) -> None:
    """Score this rank's calibration batches; the first rank writes the sums of all."""
    from kdscale.prune.importance.collect import score_teacher
    from kdscale.runtime.ranks import is_writer

    config = context.config
    share = join_calibration(context, "importance")
    teacher, family = open_teacher(context.model_to_prune, context.reporter)
    with atomic_dir(context.run.importance) if is_writer() else nullcontext() as out:
        score_teacher(
            teacher, family, share.batches, config.importance, config.prune, out, share.device, context.reporter,
            share.scratch,
        )  # fmt: skip
