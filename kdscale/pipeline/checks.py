"""What is checked before any work: the teacher, the shapes, what ranks can share, the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config
from kdscale.errors import ConfigError, RunFolderError
from kdscale.models.loading import open_teacher
from kdscale.pipeline.stage import Stage, StageContext, manifest_path

if TYPE_CHECKING:
    from kdscale.prune.plan import Plan

_MARGIN_BYTES = 64 << 20  # logs, reports and what else is small


def check_run_dir(path: Path) -> None:
    """Raises ConfigError when the nearest existing parent of a run folder is a file."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError("run_dir", expected="a folder (new or empty)", got=f"{parent} is a file")


def check_teacher(config: Config) -> Path:
    """Everything about the teacher that can be known without reading its weights. Returns its folder."""
    from kdscale.weights import check_tokenizer, resolve_teacher, sidecar_names

    folder = resolve_teacher(config.teacher)
    checkpoint, family = open_teacher(folder)
    check_tokenizer(folder, family.dims(checkpoint.config).vocab)
    sidecar_names(folder, config.teacher.trust_remote_code)
    return folder


def plan_shapes(config: Config, teacher: Path) -> list[Plan]:
    """A plan for each step and the config's own, from the teacher's config.json alone.

    Ends before the first one whose target is a latency, which has to be measured. Raises ConfigError when a budget
    cannot be met.
    """
    from kdscale.families import load_family
    from kdscale.prune.search.planning import make_plan
    from kdscale.weights import read_config

    model, plans = read_config(teacher), []
    for step in (*(config.step(index) for index in range(len(config.steps))), config):
        if step.prune.target_decode is not None or step.prune.target_prefill is not None:
            break
        family = load_family(model, str(teacher / "config.json"))
        plans.append(make_plan(model, family, None, step.prune))
        model = family.student_config(model, plans[-1].student.dims(), plans[-1].kept.layers)
    return plans


def check_shared_models(config: Config, teacher: Path, plans: Iterable[Plan]) -> None:
    """Raises ConfigError when ranks cannot share the teacher or a planned student as the config says."""
    from kdscale.distill.parallel.checks import (
        check_sequence_dims,
        check_sequence_parallel,
        check_tensor_dims,
        check_tensor_parallel,
    )

    distill = config.distill
    check_tensor_parallel(distill.tensor_parallel, {"teacher": teacher})
    check_sequence_parallel(distill.sequence_parallel, distill.seq_len, {"teacher": teacher})
    for plan in plans:
        check_tensor_dims(distill.tensor_parallel, "student", plan.student.dims())
        check_sequence_dims(distill.sequence_parallel, "student", plan.student.dims())


def student_parameters(context: StageContext, plans: Sequence[Plan]) -> int:
    """Parameters of the student: from the plan on disk, or from the planned shapes before there is one."""
    from kdscale.prune.plan import Plan

    if context.run.plan.exists():
        return Plan.load(context.run.plan).student_params.total
    if len(plans) == len(context.config.steps) + 1:
        return plans[-1].student_params.total
    teacher, family = open_teacher(context.model_to_prune)  # under a latency target: no larger than the teacher
    return family.count_params(teacher.config).total


def check_disk(context: StageContext, stages: Iterable[Stage], student_params: int) -> None:
    """Raises RunFolderError, before any work, when the disk cannot hold what the stages have yet to write.

    A stage that is finished needs nothing more; of an unfinished one, what its killed try has written counts.
    """
    run = context.run
    needed = {}
    for stage in stages:
        if stage.disk_bytes is None or manifest_path(stage, run).exists():
            continue
        written = [run.at(artifact) for artifact in (*stage.writes, *stage.resumes_from)] + [run.work / stage.name]
        needed[stage.name] = max(0, stage.disk_bytes(context, student_params) - sum(map(_bytes_under, written)))
    total, free = sum(needed.values()) + _MARGIN_BYTES, shutil.disk_usage(run.path).free
    if needed and total > free:
        listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        raise RunFolderError(
            f"run folder {run.path} is on a disk without room",
            expected=f"{total / 1e9:.1f} GB free ({listed})",
            got=f"{free / 1e9:.1f} GB",
            hint="free some space, choose another run_dir, lower distill.keep_checkpoints or raise distill.keep_every",
        )


def _bytes_under(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
