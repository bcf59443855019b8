"""The models of a run, in the order to show them: the teacher, and what the stages made of it.

Evaluation, bias, packages, chats and comparisons take the models from here, and the report their titles. A stage that
makes another model adds it here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kdscale.config.quantize import FORMS
from kdscale.config.root import Config
from kdscale.runs.folder import CORRECTED as CORRECTED_FOLDER
from kdscale.runs.folder import (
    CORRECTED_WEIGHTS,
    PRUNED_WEIGHTS,
    QUANTIZED_WEIGHTS,
    STUDENT,
    STUDENT_WEIGHTS,
    RunFolder,
)
from kdscale.runs.folder import PRUNED as PRUNED_FOLDER

TEACHER = "teacher"  # what the others are compared with
CORRECTED = "corrected"  # the teacher after its fine-tuning; no student
PRUNED = "pruned"
START = "start"  # a ready student, before it learnt
DISTILLED = "distilled"  # the run's result

# what is read of all that the stages made: a model that is added to the function below is added here
MODEL_WEIGHTS = (CORRECTED_WEIGHTS, PRUNED_WEIGHTS, STUDENT_WEIGHTS, QUANTIZED_WEIGHTS)


def models_of_run(run: RunFolder, config: Config, teacher: Path) -> dict[str, Path]:
    """Name and folder of each model that a run with this config has when it is finished, in the order to show them."""
    folders = {PRUNED if config.student is None else START: PRUNED_FOLDER, DISTILLED: STUDENT}
    if config.correct is not None:
        folders = {CORRECTED: CORRECTED_FOLDER, **folders}
    forms = config.quantize.forms if config.quantize is not None else ()
    return {
        TEACHER: teacher,
        **{name: run.at(folder) for name, folder in folders.items()},
        **{form.label: run.quantized / form.label for form in forms},
    }


def before_learning(names: Iterable[str]) -> str | None:
    """The student as it was before the distillation, among these models; None where it is not there."""
    return next((name for name in names if name in (PRUNED, START)), None)


def is_quantized(name: str) -> bool:
    """Whether a model of a run, by its name, is the result in a form with fewer bits, and no further student."""
    return name.partition("_")[0] in FORMS


def model_title(name: str) -> str:
    """A model's name as a column title: `distilled` → `Distilled`, `int4_gptq_g32` → `INT4 GPTQ g32`."""
    if is_quantized(name):
        form, *details = name.split("_")
        plain = [word if word[-1:].isdigit() or word == DISTILLED else word.upper() for word in details]
        return " ".join([form.upper(), *plain])
    return name.replace("_", " ").capitalize()
