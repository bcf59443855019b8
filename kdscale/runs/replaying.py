"""`kdscale replay`: finds what a step was made of in a run folder and leaves the result in its replay/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdscale.config import Config, load_config
from kdscale.errors import RunFolderError
from kdscale.files import explain_os_errors, write_json
from kdscale.progress import Reporter
from kdscale.runs.folder import RunFolder
from kdscale.runs.pipeline import check_teacher


def replay_step(
    folder: Path, step: int, *, overrides: Sequence[str], max_steps: int, nearest: bool, reporter: Reporter
) -> tuple[dict[str, Any], Path]:
    """Run one training step of `folder` again; returns what was found and the file it is in.

    Writes nothing else there and takes no lock, so it may be called while the run goes on elsewhere. Raises
    RunFolderError when the folder is no run, or has not come to the distillation.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        raise RunFolderError(f"{folder} is not a run folder", expected="a folder with config.yaml")
    config = load_config(run.config, overrides)
    for part in (run.pruned / "config.json", run.data / "manifest.json"):
        if not part.exists():
            raise RunFolderError(f"{folder}: no step was trained yet", expected=str(part), got="no such file")
    teacher = distilled_from(run, config, check_teacher(config))
    from kdscale.distill.replay import Folders, replay

    found = replay(
        config, Folders(run.path, teacher, run.pruned, run.data), step, max_steps=max_steps, nearest=nearest,
        reporter=reporter,
    )  # fmt: skip
    file = run.path / "replay" / f"step-{step}.json"
    with explain_os_errors(file):
        file.parent.mkdir(exist_ok=True)
        write_json(file, found)
    return found, file


def distilled_from(run: RunFolder, config: Config, teacher: Path) -> Path:
    """Whose distribution the student learned: with `distill.teacher: previous` the student of the step before."""
    if config.distill.teacher == "original":
        return teacher
    if config.steps:
        steps, before = run.steps, len(config.steps)
    elif run.path.resolve().parent.name == "steps":
        steps, before = run.path.resolve().parent, int(run.path.resolve().name.split("-")[0]) - 1
    else:
        return teacher
    return next((RunFolder(path).student for path in steps.glob(f"{before}-*")), teacher)
