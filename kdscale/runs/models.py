"""The models of a run, in the order to show them: the teacher, and what the stages made of it.

Evaluation, bias, packages, chats and comparisons take the models from here, and the report their titles. A stage that
makes another model adds it here.
"""

from __future__ import annotations

from pathlib import Path

from kdscale.config.root import Config
from kdscale.runs.folder import CORRECTED as CORRECTED_FOLDER
from kdscale.runs.folder import PRUNED as PRUNED_FOLDER
from kdscale.runs.folder import STUDENT, RunFolder

TEACHER = "teacher"  # what the others are compared with
CORRECTED = "corrected"  # the teacher after its fine-tuning; no student
PRUNED = "pruned"
DISTILLED = "distilled"  # the run's result


def models_of_run(run: RunFolder, config: Config, teacher: Path) -> dict[str, Path]:
    """Name and folder of each model that a run with this config has when it is finished, in the order to show them."""
    folders = {PRUNED: PRUNED_FOLDER, DISTILLED: STUDENT}
    if config.correct is not None:
        folders = {CORRECTED: CORRECTED_FOLDER, **folders}
    return {TEACHER: teacher, **{name: run.at(folder) for name, folder in folders.items()}}


def model_title(name: str) -> str:
    """A model's name as a column title: `distilled` → `Distilled`."""
    return name.replace("_", " ").capitalize()
