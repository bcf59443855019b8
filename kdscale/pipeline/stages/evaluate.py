"""The eval stage: teacher (corrected too), pruned and distilled student on the same held-out text."""

from __future__ import annotations

from contextlib import nullcontext

from kdscale.files import atomic_dir, read_json
from kdscale.pipeline.spawn import join_ranks, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.folder import EVAL_FILE
from kdscale.runs.models import models_of_run


def evaluate(context: StageContext) -> Facts:
    """Measure on as many processes as the config asks for; returns the perplexities."""
    from kdscale.eval.summary import headline

    run_on_ranks("eval", evaluate_rank, context, ranks_of(context.config, "eval.processes"))
    return headline(read_json(context.run.eval / EVAL_FILE))


def evaluate_rank(context: StageContext) -> None:
    """Measure teacher, pruned and distilled student on this rank's share; the first rank writes the figures of all."""
    from kdscale.eval import quality
    from kdscale.eval.encoders import evaluate_encoders
    from kdscale.families import head_kind
    from kdscale.runtime.ranks import is_writer
    from kdscale.weights import read_config

    run, config = context.run, context.config
    device = join_ranks(context)
    models = models_of_run(run, config, context.teacher)
    encoder = head_kind(read_config(context.teacher)) != "causal_lm"
    with atomic_dir(run.eval) if is_writer() else nullcontext() as tmp:
        out = None if tmp is None else tmp / EVAL_FILE
        if encoder:
            evaluate_encoders(models, run.data, config.eval, config.runtime, out, context.reporter, device=device)
            return
        quality.evaluate(
            models, run.data, config.eval, config.runtime, out, context.reporter,
            device=device, trust_remote_code=config.teacher.trust_remote_code,
        )  # fmt: skip
