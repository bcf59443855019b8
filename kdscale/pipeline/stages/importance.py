"""The importance stage: score everything that the config may cut."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from kdscale.files import atomic_dir, read_json
from kdscale.models.loading import open_teacher
from kdscale.pipeline.spawn import join_calibration, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext


def axes_to_score(context: StageContext) -> Facts:
    """The axes that the config may cut: all that importance depends on of the pruning settings."""
    from kdscale.prune.axes import openable_axes
    from kdscale.prune.importance.ranking import depth_methods, obs_axes

    teacher, family = open_teacher(context.model_to_prune)
    obs = obs_axes(context.config.prune)
    axes: dict[str, Any] = {"axes": list(openable_axes(context.config.prune, family.dims(teacher.config)))}
    if "layers" in axes["axes"] and (depth := depth_methods(context.config.prune)):
        axes["depth"] = depth
    return {**axes, "obs": [*obs, context.config.prune.ridge_lambda]} if obs else axes


def measure_importance(context: StageContext) -> Facts:
    """Score everything that the config may cut, on as many processes as it asks for."""
    from kdscale.prune.importance.ranking import SUMMARY_FILE

    run_on_ranks("importance", importance_rank, context, context.config.importance.processes)
    summary = read_json(context.run.importance / SUMMARY_FILE)
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
