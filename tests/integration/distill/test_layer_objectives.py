"""Objectives that match layers, of a student narrower than its teacher: any ZeRO stage, resuming, the export."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.model_pair import model_pair

OBJECTIVES = [
    {"name": "token_divergence", "top_k": 16, "temperature": {"start": 2.0, "end": 1.0, "over": 0.5}},
    {"name": "hidden_states", "layers": {-1: -1, 2: 3}, "weight": {"start": 1.0, "end": 0.1}},
    {"name": "attention", "compare": ["query", "map"], "weight": 0.3},
]
SETTINGS = {"objectives": OBJECTIVES, "micro_batch": 1, "checkpoint_every": 2, "validate_every": 8}
PROJECTION = "objectives.hidden_states.projection.weight"


def train_rows(rows):
    return [row for row in rows if row["kind"] == "train"]


def weights(run_dir):
    return load_file(run_dir / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(distil, narrow_student_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, distil(folder, narrow_student_dir, zero_stage=1, **SETTINGS)


def test_what_follows_a_schedule_is_logged_and_part_of_the_loss(whole):
    rows = train_rows(whole[1])
    assert [row["token_divergence_temperature"] for row in rows] == pytest.approx([2, 5 / 3, 4 / 3, 1, 1, 1, 1, 1])
    for row in rows:
        parts = row["token_divergence"] + row["hidden_states_weight"] * row["hidden_states"] + 0.3 * row["attention"]
        assert row["loss"] == pytest.approx(parts, rel=1e-12)
    before, after = (row for row in whole[1] if row["kind"] == "validation")
    assert after["hidden_error"] < before["hidden_error"]
    assert after["attention_kl"] < before["attention_kl"]
    assert after["loss"] == pytest.approx(
        after["token_divergence"] + 0.1 * after["hidden_states"] + 0.3 * after["attention"], rel=1e-12
    )


def test_the_projection_is_in_checkpoints_and_in_no_export(whole, narrow_student_dir):
    newest = checkpoint_folder.sealed_checkpoints(whole[0] / "checkpoints")[0]
    manifest = checkpoint_folder.verify(newest)
    assert manifest["helpers"] == [PROJECTION]
    assert manifest["parameters"][PROJECTION] == [96, 64]
    assert weights(whole[0]).keys() == load_file(narrow_student_dir / "model.safetensors").keys()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_and_any_micro_batch_train_the_same(distil, narrow_student_dir, whole, tmp_path, stage):
    settings = {**SETTINGS, "micro_batch": 4 if stage == 0 else 2, "gradient_checkpointing": stage == 3}
    rows = train_rows(distil(tmp_path, narrow_student_dir, zero_stage=stage, **settings))
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in train_rows(whole[1])], abs=tolerance)
    expected = weights(whole[0])
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4)


def test_a_killed_run_ends_with_the_same_bytes(distil, narrow_student_dir, whole, tmp_path, dies_at_step):
    with dies_at_step(5):
        distil(tmp_path, narrow_student_dir, zero_stage=1, **SETTINGS)
    rows = distil(tmp_path, narrow_student_dir, zero_stage=1, **SETTINGS)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole[1]]
    name = "student/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_what_no_objective_depends_on_is_left_alone_at_every_stage(distil, student_dir, tmp_path):
    """The layers above the matched one, the final norm and the rest of the head have no gradient."""
    settings = {"objectives": [{"name": "hidden_states", "layers": {0: 1}}], "tokens": 3 * 4 * 48,
                "optimizer": {"weight_decay": 0.0, "lr": 1e-3}}  # fmt: skip
    before, made = load_file(student_dir / "model.safetensors"), []
    for stage in range(4):
        distil(tmp_path / str(stage), zero_stage=stage, **settings)
        made.append(weights(tmp_path / str(stage)))
    for name, value in made[0].items():
        assert torch.equal(value, before[name]) == (".layers.0." not in name and "embed" not in name), name
        for other in made[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


def test_layers_that_pruning_dropped_are_known(tiny_llama_dir, narrow_student_dir, student_dir):
    found = model_pair(tiny_llama_dir, narrow_student_dir)
    kept = json.loads((narrow_student_dir.parent / "plan.json").read_text())["kept"]
    assert found.kept_layers == (0, 1, 3)
    assert found.matched_layers(3) == {0: 0, 1: 2, 2: 3}
    assert found.basis_HG.shape == (64, 96)
    assert found.basis_HG[5].argmax() == kept["hidden"][5]
    unknown = model_pair(tiny_llama_dir, student_dir)
    assert unknown.kept_layers is None
    assert unknown.matched_layers(2) == {0: 0, 2: 3}
