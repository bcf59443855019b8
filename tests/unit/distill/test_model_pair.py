"""What is known of teacher and student: from the plan beside the student, and only if it made this student."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdscale.distill.model_pair import model_pair
from kdscale.runs.importance_scores import ROTATION, ImportanceScores, write_scores
from tests.unit.sizing.test_flops import LLAMA


@pytest.fixture
def folders(tmp_path):
    """Teacher and pruned student (2 of 3 layers, 48 of 64 channels), without a plan."""
    for name, changes in (("teacher", {}), ("run/pruned", {"num_hidden_layers": 2, "hidden_size": 48})):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return tmp_path / "teacher", tmp_path / "run" / "pruned"


def write_plan(student, method, teacher_layers=3):
    plan = {
        "teacher": {"layers": teacher_layers, "hidden": 64}, "student": {"layers": 2, "hidden": 48},
        "kept": {"layers": [0, 2], "hidden": list(range(48))}, "methods": {"hidden": method},
    }  # fmt: skip
    (student.parent / "plan.json").write_text(json.dumps(plan))


def test_kept_channels_are_a_basis(folders):
    write_plan(folders[1], "activation")
    pair = model_pair(*folders)
    assert (pair.teacher_layers, pair.student_layers, pair.kept_layers) == (3, 2, (0, 2))
    assert (pair.teacher_hidden, pair.student_hidden, pair.widths) == (64, 48, (64, 32, 64, 32))
    assert np.array_equal(pair.basis_HG, np.eye(64)[:48])


def test_kept_components_are_rows_of_the_rotation(folders):
    write_plan(folders[1], "pca")
    assert model_pair(*folders).basis_HG is None  # the scores are gone
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    scores = ImportanceScores({ROTATION: rotation.astype(np.float32), "hidden.pca": np.ones(64, np.float32)})
    (folders[1].parent / "importance").mkdir()
    write_scores(folders[1].parent / "importance", scores, {})
    assert np.array_equal(model_pair(*folders).basis_HG, rotation[:48].astype(np.float32))


def test_a_plan_of_other_models_says_nothing(folders):
    write_plan(folders[1], "activation", teacher_layers=4)
    pair = model_pair(*folders)
    assert pair.kept_layers is None and pair.basis_HG is None
    (folders[1].parent / "plan.json").write_text('{"kept": 3}')
    assert model_pair(*folders).kept_layers is None
