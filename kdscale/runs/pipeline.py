"""The stages of a run, in order, and the one function that brings a run up to a given stage.

Heavy imports live inside the stages: a run that finds everything done never loads torch.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kdscale.config import Config
from kdscale.errors import ConfigError, Interrupted, KdscaleError, RunFolderError
from kdscale.files import atomic_dir, read_json, remove_leftovers, write_json
from kdscale.progress import Reporter
from kdscale.runs.folder import RunFolder
from kdscale.runs.stage import Context, Stage, run_stage


def _data(context: Context) -> Mapping[str, Any]:
    from kdscale.data.store import TokenStore

    store = TokenStore.build_for_teacher(context.run.data, context.config.data, context.teacher, context.reporter)
    splits = {name: store.split(name) for name in ("train", "heldout")}
    return {f"{name} tokens": f"{split.tokens:,}" for name, split in splits.items()}


def _importance(context: Context) -> Mapping[str, Any]:
    from kdscale.prune.importance import run_importance

    with atomic_dir(context.run.importance) as tmp:
        return run_importance(context.teacher, context.run.data, context.config, out_dir=tmp, reporter=context.reporter)


def _plan(context: Context) -> Mapping[str, Any]:
    from kdscale.prune.plan import load_scores, make_plan, teacher_shape

    family, teacher_config = teacher_shape(context.teacher)
    plan = make_plan(teacher_config, family, load_scores(context.run.importance), context.config.prune)
    write_json(context.run.plan, plan.to_json())
    for warning in plan.warnings:
        context.reporter.say(f"  note: {warning}")
    return plan.facts()


def _prune(context: Context) -> Mapping[str, Any]:
    from kdscale.prune.apply import prune_teacher

    with atomic_dir(context.run.pruned) as tmp:
        return prune_teacher(
            context.teacher, context.run.plan, context.run.data, context.config, out_dir=tmp, reporter=context.reporter
        )


def _distill(context: Context) -> Mapping[str, Any]:
    from kdscale.runs.training import distill

    return distill(context)


def _eval(context: Context) -> Mapping[str, Any]:
    from kdscale.eval.metrics import evaluate

    run = context.run
    models = {"teacher": context.teacher, "pruned": run.pruned, "distilled": run.student}
    with atomic_dir(run.eval) as tmp:
        return evaluate(models, run.data, context.config, out_path=tmp / "eval.json", reporter=context.reporter)


def _report(context: Context) -> Mapping[str, Any]:
    from kdscale.eval.report import write_report

    with atomic_dir(context.run.report) as tmp:
        write_report(context.run.path, tmp)
    return {"report": str(context.run.report / "report.html")}


_PRUNE_CHOICES = ("prune.axes", "prune.hidden", "prune.ffn", "prune.heads", "prune.kv_heads", "prune.layers")
_CODE = ("teacher.trust_remote_code",)

STAGES: tuple[Stage, ...] = (
    Stage("data", "tokenise the text", ("data",), (), ("data",), _data, reads_teacher=True),
    Stage(
        "importance", "measure importance", ("importance", *_PRUNE_CHOICES, "seed", *_CODE), ("data",), ("importance",),
        _importance, reads_teacher=True,
    ),
    Stage(
        "plan", "choose the student's shape", ("prune",), ("importance",), ("plan.json",), _plan, reads_teacher=True,
        hand_editable=True,
    ),
    Stage(
        "prune", "prune and check", ("prune", "importance", "seed", *_CODE), ("plan.json", "data"), ("pruned",), _prune,
        reads_teacher=True,
    ),
    Stage(
        "distill", "distil the teacher into the student", ("distill", "seed", *_CODE), ("pruned", "data"), ("student",),
        _distill, reads_teacher=True, scratch=("checkpoints", "logs/metrics.jsonl", "logs/tensorboard"),
    ),
    Stage(
        "eval", "evaluate side by side", ("eval", "seed", *_CODE), ("pruned", "student", "data"), ("eval",), _eval,
        reads_teacher=True,
    ),
    Stage(
        "report", "write the report", ("name",), ("plan.json", "importance", "eval", "logs/metrics.jsonl"), ("report",),
        _report,
    ),
)  # fmt: skip
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def run_until(config: Config, last: str, reporter: Reporter, accept_changes: bool = False) -> bool:
    """Bring every stage up to and including `last` up to date; returns whether anything had to be done.

    Safe to kill at any instant and to call again. Raises KdscaleError subclasses, and Interrupted on a signal.
    """
    run = RunFolder(Path(config.run_dir))
    _refuse_hopeless_paths(run.path)
    teacher = check_teacher(config)
    with run.lock(), _signals_as_exceptions():
        changes = run.adopt_config(config, accept_changes)
        for change in changes:
            reporter.say(f"  config changed: {change}")
        for folder in (run.logs, run.checkpoints, run.stages):
            if folder.exists():
                remove_leftovers(folder)
        context = Context(config, run, teacher, reporter)
        check_disk(context)
        did = False
        for stage in STAGES[: STAGE_NAMES.index(last) + 1]:
            did |= _guarded(stage, context)
        return did


def _guarded(stage: Stage, context: Context) -> bool:
    """Run one stage; whatever ends it early is on record in status.json and events.jsonl before it goes on up."""
    try:
        return run_stage(stage, context)
    except Interrupted as stop:
        context.run.set_status(stage.name, "interrupted", reason=str(stop))
        raise
    except KdscaleError as error:
        context.run.set_status(stage.name, "failed", reason=str(error))
        raise
    except OSError as error:
        raise RunFolderError(
            f"{stage.title} failed on {error.filename or context.run.path}", got=str(error),
            hint="make room or choose another folder, then run the same command again: finished work is kept",
        ) from error  # fmt: skip


def check_teacher(config: Config) -> Path:
    """Everything about the teacher that can be known without reading its weights. Returns its folder."""
    from kdscale.weights import Checkpoint, check_tokenizer, resolve_teacher

    folder = resolve_teacher(config.teacher)
    checkpoint = Checkpoint.open(folder)
    from kdscale.families import load_family

    family = load_family(checkpoint.config, str(folder / "config.json"))
    checkpoint.verify_against(family)
    check_tokenizer(folder, family.dims(checkpoint.config).vocab)
    return folder


def _refuse_hopeless_paths(path: Path) -> None:
    """The nearest existing parent must be a folder."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError("run_dir", expected="a folder (new or empty)", got=f"{parent} is a file")


def check_disk(context: Context) -> None:
    """Refuse before any work when the disk cannot hold what is still to be written.

    Counted: tokenised text, pruned and final student, and keep+1 checkpoints of fp32 master, two Adam moments and the
    working copy; each student is at most the teacher's size.
    """
    run, config = context.run, context.config
    if (run.stages / "distill.json").exists():
        return
    teacher_bytes = sum(item.stat().st_size for item in context.teacher.glob("*.safetensors"))
    share = _planned_share(context)
    student = int(teacher_bytes * share)
    values = _values_stored(context.teacher) * share
    checkpoints = (config.distill.keep_checkpoints + 1) * values * 14
    held = sum(item.stat().st_size for item in run.path.rglob("*") if item.is_file())
    needed = int(2 * student + checkpoints + (64 << 20)) - held
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise RunFolderError(
            f"run folder {run.path} is on a disk without room",
            expected=f"{needed / 1e9:.1f} GB free (two students and {config.distill.keep_checkpoints + 1} checkpoints)",
            got=f"{free / 1e9:.1f} GB",
            hint="free some space, choose another run_dir, or lower distill.keep_checkpoints",
        )


def _planned_share(context: Context) -> float:
    """Student's share of the teacher's parameters: from the plan, or a shapes-only plan before there is one."""
    from kdscale.prune.plan import make_plan, teacher_shape

    if context.run.plan.exists():
        params = read_json(context.run.plan)["params"]
        return float(params["student"]["total"]) / float(params["teacher"]["total"])
    family, teacher_config = teacher_shape(context.teacher)
    plan = make_plan(teacher_config, family, None, context.config.prune)
    return plan.params.student.total / plan.params.teacher.total


def _values_stored(teacher: Path) -> int:
    from kdscale.families import load_family

    teacher_config = read_json(teacher / "config.json")
    return load_family(teacher_config, str(teacher / "config.json")).count_params(teacher_config).total


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM become Interrupted wherever the work happens to be, so that temporary folders are removed."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
