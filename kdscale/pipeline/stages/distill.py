"""The distill stage: one rank in this process, or several started by the launcher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kdscale.config.distill.settings import EIGHT_BITS, DistillConfig
from kdscale.config.root import Config
from kdscale.files import read_own_json
from kdscale.pipeline.spawn import run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.pipeline.stages.prune import carried_bytes
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import KERNELS, WEIGHTS, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.packages import require_packages
from kdscale.runtime.versions import check_deepspeed

# Bytes a parameter: the finished student, a checkpoint's fp32 master weight and two Adam moments, and its average.
_STUDENT_BYTES, _CHECKPOINT_BYTES, _AVERAGE_BYTES = 4, 12, 4
_WRITTEN_BYTES = 32  # a token that the student wrote: id, log-probability and text, as JSON
# Below so many steps the size of the batch matters more than the loss does (docs/explanation/measured-distillation.md).
_FEW_STEPS = 50


def what_distillation_depends_on(context: StageContext) -> Facts:
    """The settings that the student's values depend on, and the weights of teachers beside the run's."""
    from kdscale.teacher.folders import teacher_folders

    own = context.model_to_learn_from
    others = {name: folder for name, folder in teacher_folders(context.config, own).items() if folder != own}
    teachers = {"teachers": {name: digest_tree(folder, WEIGHTS) for name, folder in others.items()}} if others else {}
    return {"distill": context.config.decisive_for_student(), **teachers, **_prompts(context.config)}


def _prompts(config: Config) -> Facts:
    """The files of prompts that the student goes on from, or of pairs of answers."""
    from kdscale.responses.pairs import Pairs
    from kdscale.responses.prompts import Prompts

    own, pairs = config.distill.own_text, config.distill.preferences
    if pairs is not None and pairs.pairs:
        return {"pairs": Pairs(pairs).digests()}
    return {"prompts": Prompts(own).digests()} if own is not None and own.prompts else {}


def disk_bytes(context: StageContext, student_params: int) -> int:
    """The student, `keep_every`'s checkpoints and keep_checkpoints + 1: a new one is sealed before an old one goes."""
    settings = context.config.distill
    steps = settings.tokens // (settings.global_batch * settings.seq_len)
    checkpoints = settings.keep_checkpoints + 1 + (steps // settings.keep_every if settings.keep_every else 0)
    average, own = _AVERAGE_BYTES if settings.followers else 0, settings.own_text
    share = 0.0 if own is None else (own.share if isinstance(own.share, float) else 1.0) * (1.0 - own.start)
    written = round(settings.tokens * share * _WRITTEN_BYTES)
    trained = _trained_params(context, student_params)
    student = student_params * _STUDENT_BYTES + carried_bytes(context)
    return student + trained * checkpoints * (_CHECKPOINT_BYTES + average) + written


def _trained_params(context: StageContext, student_params: int) -> int:
    """What a checkpoint holds: all of the student; or adapters, before it is cut as many as the larger model's."""
    from kdscale.sizing.job import Adapters
    from kdscale.teacher.folders import student_folder
    from kdscale.weights import read_config

    config = context.config
    if config.distill.lora is None:
        return student_params
    model = context.model_to_prune if config.student is None else student_folder(config, config_only=True)
    if (context.run.pruned / "config.json").exists():
        model = context.run.pruned
    adapters = Adapters.of(config.distill.lora, read_config(model), str(model))
    assert adapters is not None
    return adapters.params


def check_services(config: Config, run: RunFolder) -> None:
    """Raises ConfigError when targets come from a service and there is no client, token or key to ask it with."""
    for settings in config.distill.by_teacher().values():
        if settings.source.name in ("endpoint", "served"):
            require_packages(f"distill.teacher_placement: {settings.source.name}", ("httpx",), "serve")
        if settings.source.name == "endpoint":
            settings.endpoint.key("distill.endpoint")
        if settings.source.name == "served":
            from kdscale.teacher.remote import read_token

            read_token(settings.served.token_path(run.path))


def _check_writing(config: Config) -> None:
    """Raises DataError for what is no prompt, ConfigError when the client library or key of a server is missing."""
    from kdscale.responses.client import check_library
    from kdscale.responses.pairs import Pairs
    from kdscale.responses.prompts import Prompts

    own, pairs = config.distill.own_text, config.distill.preferences
    if own is None:
        return
    for _ in Pairs(pairs) if pairs is not None and pairs.pairs else Prompts(own, f"distill.{own.section}.prompts"):
        pass  # every line is read
    if own.writer == "vllm":
        section = f"distill.{own.section}.vllm.endpoint"
        check_library(section)
        require_packages(section, ("httpx",), "serve")
        own.vllm.endpoint.key(section)


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError, DataError or MachineError for what the ranks would find out when they start."""
    check_deepspeed()
    check_services(config, run)
    _check_writing(config)
    if config.distill.lora is not None:
        from kdscale.models.lora.adapters import check_peft

        check_peft()
    if config.distill.teacher_dtype in EIGHT_BITS:
        from kdscale.runtime.device import resolve_device
        from kdscale.teacher.placement.eight_bits import check_eight_bits

        check_eight_bits(config.distill.teacher_dtype, resolve_device(config.runtime.device))


def copied_from_and_to(context: StageContext) -> tuple[Path, Path]:
    """Tokenizer, licence and the like come from the pruned student."""
    return context.run.pruned, context.run.student


def distill(context: StageContext) -> Facts:
    """Distil to the end or raise; returns the first and last validation's perplexity, and why torch ran the kernels."""
    if note := few_steps(context.config.distill):
        context.reporter.say(f"  note: {note}")
    run_on_ranks("distill", distill_rank, context, context.config.distill.processes, across_job=True)
    facts = held_out(context.run)
    if kernels := read_own_json(context.run.at(KERNELS), _is_kernel_note):
        facts["kernels"] = f"torch, as {kernels['obstacle']}"
    return facts


def few_steps(settings: DistillConfig) -> str:
    """What to do about a run that has few steps because each of them has many sequences; "" for every other run."""
    steps = -(-settings.tokens // (settings.global_batch * settings.seq_len))
    if steps >= _FEW_STEPS or settings.global_batch == settings.data_parallel:
        return ""
    return (
        f"{settings.tokens:,} tokens are {steps} steps of {settings.global_batch} sequences: a smaller "
        "distill.global_batch takes more steps on the same text, and the student learns more of it"
    )


def held_out(run: RunFolder) -> dict[str, str]:
    """The perplexity (or the loss, where no token is told) of the first and of the last validation; nothing where there
    was none."""
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation"]
    name = "perplexity" if any("perplexity" in row or "loss" not in row for row in rows) else "loss"
    return {f"held-out {name}": f"{_figure(rows[0], name)} → {_figure(rows[-1], name)}"} if rows else {}


def _is_kernel_note(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("obstacle"), str)


def _figure(row: dict[str, Any], name: str) -> str:
    """JSON has no NaN: a figure that is not finite is missing from the log."""
    value = row.get(name, math.nan)
    return f"{value:.{4 if name == 'loss' else 2}f}" if math.isfinite(value) else "not finite"


def distill_rank(context: StageContext) -> None:
    """Train as one rank, under a watchdog of its own."""
    from kdscale.distill import engine
    from kdscale.distill.parallel.process_group import leave_group
    from kdscale.runtime.ranks import in_group, rank
    from kdscale.runtime.timeouts import watchdog_seconds
    from kdscale_launch.watchdog import watching

    run = context.run
    with watching(watchdog_seconds(context.config), rank()):
        engine.run(
            context.config,
            teacher_dir=context.model_to_learn_from,
            student_dir=run.pruned,
            data_dir=run.data,
            run_dir=run.path,
            reporter=context.reporter,
        )
    if in_group():  # only after success: a rank that failed alone would wait here for others that wait for it
        leave_group()
