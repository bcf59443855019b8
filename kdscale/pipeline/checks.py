"""What is checked before any work: the teacher, the plan of shapes, the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config
from kdscale.errors import ConfigError, RunFolderError
from kdscale.models import loading
from kdscale.pipeline.stage import Context

if TYPE_CHECKING:
    from kdscale.prune.plan import Plan


# Bytes a parameter: a student on disk at most; a checkpoint's fp32 master and two Adam moments.
_STUDENT_BYTES, _CHECKPOINT_BYTES = 4, 12


def check_teacher(config: Config) -> Path:
    """Everything about the teacher that can be known without reading its weights. Returns its folder."""
    from kdscale.weights import check_tokenizer, resolve_teacher

    folder = resolve_teacher(config.teacher)
    checkpoint, family = loading.open_teacher(folder)
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

    Counted: the pruned and the final student, keep+1 checkpoints, and those that `keep_every` keeps.
    """
    run, config = context.run, context.config
    if (run.stages / "distill.json").exists():
        return
    params = _student_params(context)
    settings, steps = config.distill, config.distill.tokens // (config.distill.global_batch * config.distill.seq_len)
    count = settings.keep_checkpoints + 1 + (steps // settings.keep_every if settings.keep_every else 0)
    held = sum(item.stat().st_size for item in run.path.rglob("*") if item.is_file())
    needed = 2 * params * _STUDENT_BYTES + count * params * _CHECKPOINT_BYTES + (64 << 20) - held
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise RunFolderError(
            f"run folder {run.path} is on a disk without room",
            expected=f"{needed / 1e9:.1f} GB free (two students and {count} checkpoints)",
            got=f"{free / 1e9:.1f} GB",
            hint="free some space, choose another run_dir, lower distill.keep_checkpoints or raise distill.keep_every",
        )


def _student_params(context: Context) -> int:
    """Parameters of the student: from the plan, or from a plan of shapes only before there is one."""
    from kdscale.prune.plan import Plan

    if context.run.plan.exists():
        return Plan.load(context.run.plan).student_params.total
    plans = plan_shapes(context.config, context.source)
    if len(plans) == len(context.config.steps) + 1:
        return plans[-1].student_params.total
    teacher, family = loading.open_teacher(context.source)  # under a latency target: no larger than the teacher
    return family.count_params(teacher.config).total


def plan_shapes(config: Config, teacher: Path) -> list[Plan]:
    """A plan for each step and the config's own, from the teacher's config.json alone.

    Ends before the first one whose target is a latency, which has to be measured. Raises ConfigError when a budget
    cannot be met.
    """
    from kdscale.families import load_family
    from kdscale.prune.search.shapes import make_plan
    from kdscale.weights import read_config

    model, out = read_config(teacher), []
    for one in (*(config.step(index) for index in range(len(config.steps))), config):
        if one.prune.target_decode is not None or one.prune.target_prefill is not None:
            break
        family = load_family(model, str(teacher / "config.json"))
        out.append(make_plan(model, family, None, one.prune))
        model = family.student_config(model, out[-1].student.dims(), out[-1].kept.layers)
    return out
