"""What each stage does: opens the files it reads, calls the piece that does the work, returns facts worth showing.

Heavy imports live inside the functions: a run that finds everything done never loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config import Config
from kdscale.errors import DataError, SelfCheckError
from kdscale.files import atomic_dir, read_json, remove_tree, replace_dir, write_json
from kdscale.runs.stage import Context

if TYPE_CHECKING:
    from torch import Tensor

    from kdscale.data.loader import Batch
    from kdscale.families import Family
    from kdscale.progress import Reporter
    from kdscale.weights import Checkpoint

Facts = Mapping[str, Any]

_CHECK_ROWS, _CHECK_TOKENS = 2, 96
SELF_CHECK_FILE = "self_check.json"


def tokenize(context: Context) -> Facts:
    from kdscale.data.store import TokenStore
    from kdscale.data.tokens import document_end_id
    from kdscale.families import load_family
    from kdscale.models import load_tokenizer
    from kdscale.weights import read_config

    data = context.config.data
    tokenizer = load_tokenizer(context.teacher, context.config.teacher.trust_remote_code)
    teacher_config = read_config(context.teacher)
    store = TokenStore.build(
        context.run.data,
        data.sources,
        tokenizer,
        eos_id=document_end_id(tokenizer),
        reporter=context.reporter,
        heldout_fraction=data.heldout_fraction,
        heldout_sources=data.heldout_sources,
        vocab_size=load_family(teacher_config, str(context.teacher)).dims(teacher_config).vocab,
        max_document_tokens=data.max_document_tokens,
    )
    return {f"{name} tokens": f"{store.split(name).tokens:,}" for name in ("train", "heldout")}


def axes_to_score(context: Context) -> Facts:
    """The axes that the config may cut: all that importance depends on of the pruning settings."""
    from kdscale.prune.ranking import obs_axes
    from kdscale.prune.search import openable_axes

    teacher, family = open_teacher(context.source)
    obs = obs_axes(context.config.prune)
    axes = {"axes": list(openable_axes(context.config.prune, family.dims(teacher.config)))}
    return {**axes, "obs": [*obs, context.config.prune.ridge_lambda]} if obs else axes


def measure_importance(context: Context) -> Facts:
    from kdscale.prune.ranking import SUMMARY_FILE

    _on_ranks("importance", context)
    summary = read_json(context.run.importance / SUMMARY_FILE)
    return {"tokens": f"{summary['tokens']:,}", "scores": ", ".join(summary["arrays"]) or "none needed"}


def _importance_rank(context: Context) -> None:
    from kdscale.dist import is_writer
    from kdscale.prune.importance import run

    config = context.config
    share = _Share(context, "importance")
    teacher, family = open_teacher(context.source, context.reporter)
    with atomic_dir(context.run.importance) if is_writer() else nullcontext() as out:
        run(
            teacher, family, share.batches, config.importance, config.prune, out, share.device, context.reporter,
            share.scratch,
        )  # fmt: skip


def choose_plan(context: Context) -> Facts:
    from kdscale.prune.ranking import load_scores
    from kdscale.runs.choose import search_plan

    plan = search_plan(context, load_scores(context.run.importance))
    plan.save(context.run.plan)
    for warning in plan.warnings:
        context.reporter.say(f"  note: {warning}")
    before, after = plan.teacher_params.total, plan.student_params.total
    return {"parameters": f"{before / 1e6:,.1f} M → {after / 1e6:,.1f} M"}


def prune_and_check(context: Context) -> Facts:
    _on_ranks("prune", context)
    figures = read_json(context.run.logs / SELF_CHECK_FILE)
    return {"self-check": f"passed, largest relative difference {max(figures.values()):.1e}"}


def _prune_rank(context: Context) -> None:
    from kdscale.dist import is_writer
    from kdscale.models import resolve_dtype
    from kdscale.prune.apply import apply_plan
    from kdscale.prune.check import self_check
    from kdscale.prune.plan import Plan
    from kdscale.prune.ranking import load_scores
    from kdscale.prune.residual import Residuals
    from kdscale.prune.rotate import turned

    config, run = context.config, context.run
    share = _Share(context, "prune")
    teacher, family = open_teacher(context.source)
    if Plan.load(run.plan).methods.hidden == "pca":
        teacher = turned(teacher, family, load_scores(run.importance))
    plan = Plan.load(run.plan, config=teacher.config, family=family)
    residuals = None
    if is_writer():
        residuals = Residuals(run.repair)
        residuals.keep_layers(plan.kept.layers if plan.methods.compensate != "none" else [])
    student = run.work / "prune" / "student"  # becomes run.pruned when it has passed the check
    apply_plan(
        teacher,
        family,
        plan,
        student,
        config.prune,
        batches=share.batches,
        dtype=resolve_dtype(config.importance.dtype, share.device),
        device=share.device,
        reporter=context.reporter,
        scratch=share.scratch,
        residuals=residuals,
    )
    if not is_writer():
        return
    try:
        figures = self_check(teacher, family, plan, student, _check_ids(run.data, config.seed), device=share.device)
    except SelfCheckError:
        remove_tree(run.work / "prune")  # nothing of it is to be taken up again
        raise
    write_json(run.logs / SELF_CHECK_FILE, figures)
    replace_dir(student, run.pruned)


# What each rank of a stage does, in this process or in several (kdscale.runs.ranks).
RANK_WORK: Mapping[str, Callable[[Context], None]] = {"importance": _importance_rank, "prune": _prune_rank}


def _on_ranks(stage: str, context: Context) -> None:
    from kdscale.runs.ranks import launch

    if context.config.importance.processes == 1:
        RANK_WORK[stage](context)
    else:
        launch(stage, context, context.config.importance.processes)


class _Share:
    """What is this rank's: its device, its calibration batches, and a folder for what the stage resumes from."""

    def __init__(self, context: Context, stage: str):
        from kdscale import dist
        from kdscale.models import resolve_device, set_threads
        from kdscale.prune.states import Scratch
        from kdscale.runs.ranks import join

        config, processes = context.config, context.config.importance.processes
        set_threads(config.runtime.threads, processes)
        self.device = resolve_device(config.runtime.device)
        self.batches = calibration_batches(config, context.run.data)
        self.scratch = Scratch(context.run.work / stage, config.runtime.activation_bytes)
        if processes == 1:
            return
        if len(self.batches) < processes:
            raise DataError(
                "importance.processes is more than there are calibration batches",
                expected=f"at most {len(self.batches)}",
                got=str(processes),
                hint="raise importance.calibration_tokens or lower importance.micro_batch",
            )
        self.device = join(self.device)
        self.batches = self.batches[dist.rank() :: processes]
        self.scratch = self.scratch.part(f"rank-{dist.rank()}")


def what_distillation_depends_on(context: Context) -> Facts:
    return {"distill": context.config.distill.decisive()}


def distill(context: Context) -> Facts:
    from kdscale.runs.training import train

    return train(context)


def evaluate(context: Context) -> Facts:
    from kdscale.eval import metrics

    run, config = context.run, context.config
    models = {"teacher": context.teacher, "pruned": run.pruned, "distilled": run.student}
    with atomic_dir(run.eval) as tmp:
        found = metrics.evaluate(
            models,
            run.data,
            config.eval,
            config.runtime,
            tmp / "eval.json",
            context.reporter,
            trust_remote_code=config.teacher.trust_remote_code,
        )
    return metrics.headline(found)


def write_report(context: Context) -> Facts:
    from kdscale.eval.report import write_report as write

    with atomic_dir(context.run.report) as tmp:
        write(context.run.path, tmp)
    return {}


def calibration_batches(config: Config, data: Path) -> list[Batch]:
    """Training sequences spread evenly over one epoch, so that every source and author is among them."""
    from kdscale.data.loader import PackedLoader
    from kdscale.data.store import TokenStore

    settings = config.importance
    split = TokenStore.open(data).split("train")
    loader = PackedLoader(split, settings.seq_len, settings.micro_batch, settings.micro_batch, config.seed)
    wanted = -(-settings.calibration_tokens // settings.seq_len)
    if wanted > loader.epoch_sequences:
        raise DataError(
            "importance.calibration_tokens is more than there is to train on",
            expected=f"at most {loader.epoch_sequences * settings.seq_len:,} tokens",
            got=f"{settings.calibration_tokens:,}",
            hint="lower it, or add text to data.sources",
        )
    numbers = [index * loader.epoch_sequences // wanted for index in range(wanted)]
    return [loader.stack(numbers[i : i + settings.micro_batch]) for i in range(0, wanted, settings.micro_batch)]


def _check_ids(data: Path, seed: int) -> Tensor:
    """A few rows of held-out text for the self-check, as whole documents without padding."""
    from kdscale.data.loader import eval_batches
    from kdscale.data.store import TokenStore

    heldout = TokenStore.open(data).split("heldout")
    (batch, *_) = eval_batches(heldout, _CHECK_TOKENS, _CHECK_ROWS, _CHECK_ROWS * _CHECK_TOKENS, seed)
    return batch.input_ids_BS


def open_teacher(folder: Path, reporter: Reporter | None = None) -> tuple[Checkpoint, Family]:
    """The teacher with its family, its headers checked; reads no weights. Raises CheckpointError.

    With a `reporter` it says what of the checkpoint is left out.
    """
    from kdscale.families import load_family
    from kdscale.weights import Checkpoint

    teacher = Checkpoint.open(folder)
    family = load_family(teacher.config, str(folder / "config.json"))
    for notice in teacher.verify_against(family):
        if reporter is not None:
            reporter.say(f"  note: {notice}")
    return teacher, family
