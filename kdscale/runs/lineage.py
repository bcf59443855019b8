"""Which model a run's student learned from, by what lies in the run's folder."""

from __future__ import annotations

from pathlib import Path

from kdscale.config.root import Config
from kdscale.runs.folder import CORRECTED, MERGED, RunFolder


def last_step_student(config: Config) -> Path | None:
    """The student of the last step on the way to the run's own; None without steps."""
    return RunFolder(Path(config.step(len(config.steps) - 1).run_dir)).student if config.steps else None


def corrected_teacher(config: Config, run: RunFolder) -> Path | None:
    """Where the corrected teacher of a run is, or will be; None where the config asks for no correction."""
    return run.at(CORRECTED) if config.correct is not None else None


def merged_teacher(config: Config, run: RunFolder) -> Path | None:
    """Where the teacher with its adapters merged is, or will be; None where the config names no adapters."""
    return run.at(MERGED) if config.teacher.adapters is not None else None


def teacher_of_run(run: RunFolder, config: Config, named: Path) -> Path:
    """The teacher that a run works with: the merged one once it is there, else the folder that the config names.

    `run` may be a step of another run.
    """
    folder = run.path.resolve()
    outer = RunFolder(folder.parents[1]) if folder.parent.name == "steps" else run
    return present(merged_teacher(config, outer)) or named


def present(model: Path | None) -> Path | None:
    """The folder of a model that a stage makes, if it is finished."""
    return model if model is not None and (model / "config.json").is_file() else None


def distilled_from(run: RunFolder, config: Config, teacher: Path) -> Path:
    """The model whose distribution the student learned; with `distill.teacher: previous` the last step's student.

    `teacher` is the folder of the config's teacher; where that was corrected, the corrected one counts.
    """
    folder, teacher = run.path.resolve(), teacher_of_run(run, config, teacher)
    is_step = folder.parent.name == "steps"
    original = corrected_teacher(config, RunFolder(folder.parents[1]) if is_step else run) or teacher
    if config.distill.teacher == "original":
        return original
    if config.steps:
        steps, before = run.steps, len(config.steps)
    elif is_step:
        steps, before = folder.parent, int(folder.name.split("-")[0]) - 1
    else:
        return original
    return next((RunFolder(path).student for path in steps.glob(f"{before}-*")), original)
