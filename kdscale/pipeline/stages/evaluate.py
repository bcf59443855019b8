"""The eval stage: teacher, pruned and distilled student on the same held-out text."""

from __future__ import annotations

from kdscale.files import atomic_dir
from kdscale.pipeline.stage import Facts, StageContext


def evaluate(context: StageContext) -> Facts:
    """Measure teacher, pruned and distilled student."""
    from kdscale.eval import quality

    run, config = context.run, context.config
    models = {"teacher": context.teacher, "pruned": run.pruned, "distilled": run.student}
    with atomic_dir(run.eval) as tmp:
        found = quality.evaluate(
            models,
            run.data,
            config.eval,
            config.runtime,
            tmp / "eval.json",
            context.reporter,
            trust_remote_code=config.teacher.trust_remote_code,
        )
    return quality.headline(found)
