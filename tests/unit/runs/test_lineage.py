"""Which model a student learned from: the teacher, the corrected one, or the student of the step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.pipeline.stage import StageContext
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import corrected_teacher, distilled_from, last_step_student
from kdscale.runtime.progress import Reporter

TEACHER = Path("teacher")


def config(run_dir: Path, teacher: str, steps: bool = True, correct: dict[str, Any] | None = None) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny", "run_dir": str(run_dir), "teacher": {"path": "t"}, "prune": {"target_params": "50%"},
        "distill": {"teacher": teacher}, "correct": correct,
    }  # fmt: skip
    if steps:
        tree["steps"] = [{"name": name, "prune": {"target_params": "80%"}} for name in ("one", "two")]
    return build_config(tree, "test")


@pytest.mark.parametrize("correct", [None, {"use": "distill"}])
def test_the_teacher_of_a_step_is_the_student_of_the_one_before(tmp_path: Path, correct: dict[str, Any] | None) -> None:
    for name in ("1-one", "2-two"):
        (tmp_path / "steps" / name).mkdir(parents=True)
    original = TEACHER if correct is None else tmp_path / "corrected"
    steps = config(tmp_path, "previous", correct=correct)
    first, second = (steps.step(index) for index in range(2))
    assert distilled_from(RunFolder(tmp_path), steps, TEACHER) == tmp_path / "steps" / "2-two" / "student"
    inner = RunFolder(tmp_path / "steps" / "2-two")
    assert distilled_from(inner, second, TEACHER) == tmp_path / "steps" / "1-one" / "student"
    assert distilled_from(RunFolder(tmp_path / "steps" / "1-one"), first, TEACHER) == original
    assert distilled_from(inner, config(tmp_path, "original", correct=correct).step(1), TEACHER) == original
    without = config(tmp_path, "previous", steps=False, correct=correct)
    assert distilled_from(RunFolder(tmp_path), without, TEACHER) == original
    assert last_step_student(without) is None
    assert last_step_student(steps) == tmp_path / "steps" / "2-two" / "student"


@pytest.mark.parametrize(
    ("use", "pruned"), [(None, "teacher"), ("distill", "teacher"), ("prune_and_distill", "corrected")]
)
@pytest.mark.parametrize("teacher", ["original", "previous"])
def test_stages_and_a_later_look_at_the_folder_agree(
    tmp_path: Path, use: str | None, pruned: str, teacher: str
) -> None:
    """`previous` is the model before the one that is pruned: for a run without steps the same teacher."""
    cfg, run = config(tmp_path, teacher, False, None if use is None else {"use": use}), RunFolder(tmp_path)
    corrected = corrected_teacher(cfg, run)
    context = StageContext(cfg, run, TEACHER, Reporter(quiet=True), corrected=corrected)
    assert context.model_to_prune.name == pruned
    assert context.model_to_learn_from == distilled_from(run, cfg, TEACHER) == (corrected or TEACHER)
