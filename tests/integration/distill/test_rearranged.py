"""A checkpoint belongs to no number of ranks and no ZeRO stage: the losses go on as in an unbroken run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdscale.distill import schedule, trainer
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.runs.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[3]
# (ranks, ZeRO stage, killed when it begins this step); test_zero_state.py has every pair of stages. `layers` has a
# student that is narrower than its teacher, and objectives that match layers; `grid` trains on the grid of 4 bits.
CHAINS = {
    "float32": [(1, 1, 2), (2, 3, 5), (4, 0, None)],
    "bfloat16": [(2, 3, 4), (1, 2, None)],
    "layers": [(4, 3, 2), (2, 2, 3), (1, 0, None)],
    "grid": [(2, 3, 2), (1, 0, None)],
}
LAYERS = {
    "objectives": [
        {"name": "token_divergence", "top_k": 16, "temperature": {"start": 2.0, "end": 1.0}},
        {"name": "hidden_states", "weight": {"start": 1.0, "end": 0.0, "over": 4}},
        {"name": "attention", "compare": ["value", "map"]},
    ],
    "tokens": 5 * 4 * 48,
}
GRID = {"fake_quantize": {"bits": 4, "group": 32}, "tokens": 4 * 4 * 48}
SETTINGS = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}, "layers": LAYERS, "grid": GRID}


# 4 steps of four micro-batches a rank: unbroken, saved after each by rank 0's clock, and stopped in the third
TWO_RANKS = {"ranks": 2, "until": None, "zero_stage": 2}
SIGNALLED = {
    "unbroken": [{**TWO_RANKS, "checkpoint_minutes": 1e-9, "keep_checkpoints": 9}],
    "signalled": [{**TWO_RANKS, "signal": [1, 2]}, TWO_RANKS],
}


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def chained(tmp_path_factory, tiny_llama_dir, student_dir, narrow_student_dir, data_dir, make_config):
    """The run folder of each chain, all made by one process that forks the ranks."""
    folders, jobs = {}, []
    for name, chain in CHAINS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        phases = [{"ranks": ranks, "zero_stage": stage, "until": until} for ranks, stage, until in chain]
        # the last ranks write in the background
        phases[-1]["async_checkpoints"] = True
        config = make_config(**SETTINGS[name], checkpoint_every=1, validate_every=100).resolved()
        student = narrow_student_dir if name == "layers" else student_dir
        places = {"teacher_dir": tiny_llama_dir, "student_dir": student, "data_dir": data_dir}
        places = {key: str(value) for key, value in places.items()}
        jobs.append({"config": config, "run_dir": str(folders[name]), "phases": phases, **places})
    places["student_dir"] = str(student_dir)
    for name, phases in SIGNALLED.items():
        folders[name] = tmp_path_factory.mktemp(name)
        config = make_config(validate_every=2, checkpoint_every=100, global_batch=8).resolved()
        jobs.append({"config": config, "run_dir": str(folders[name]), "phases": phases, **places})
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "chain_worker.py", json.dumps(jobs)],
        capture_output=True, text=True, env=environment, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folders, done.stderr


@pytest.mark.parametrize(
    ("name", "loss_tolerance", "tolerance"),
    [("float32", 1e-5, 1e-5), ("bfloat16", 1e-2, 1e-2), ("layers", 1e-4, 2e-4), ("grid", 1e-2, 1e-2)],
)
def test_the_losses_go_on_with_any_number_of_ranks_and_any_stage(
    chained, distil, narrow_student_dir, tmp_path, name, loss_tolerance, tolerance
):
    folders, said = chained
    student = narrow_student_dir if name == "layers" else None
    whole = distil(tmp_path, student, **SETTINGS[name], micro_batch=1, validate_every=100)
    rows = list(read_metrics(folders[name] / "logs" / "metrics.jsonl"))
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, len(losses(whole)) + 1))
    assert losses(rows) == pytest.approx(losses(whole), abs=loss_tolerance)
    expected, got = (
        load_file(tmp_path / "student/model.safetensors"),
        load_file(folders[name] / "student/model.safetensors"),
    )
    assert expected.keys() == got.keys()
    worst = max(float((expected[key] - got[key]).abs().max()) for key in expected)
    assert worst < tolerance
    ranks, stage, _ = CHAINS[name][-1]
    before = CHAINS[name][-2]
    assert f"written by {before[0]} ranks at ZeRO {before[1]}, now {ranks} ranks at ZeRO {stage}" in said


def test_every_rank_has_a_file_and_all_of_them_make_up_the_student(chained):
    folders, _ = chained
    newest = checkpoint_folder.sealed_checkpoints(folders["float32"] / "checkpoints")[0]
    manifest = checkpoint_folder.verify(newest)
    assert list(manifest["files"]) == [checkpoint_folder.rank_file(rank) for rank in range(4)]
    sizes = [about["bytes"] for about in manifest["files"].values()]
    assert max(sizes) < 1.5 * min(sizes)  # the writing is shared


def test_a_signal_to_one_rank_stops_all_at_the_same_micro_batch_and_costs_the_unfinished_step_alone(chained):
    """Rank 1 gets it in the first micro-batch of the third step: all ranks know before their third."""
    folders, said = chained
    stopped, unbroken = folders["signalled"], folders["unbroken"]
    assert [(stopped / f"began-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    saved = [checkpoint_folder.step_of(path) for path in checkpoint_folder.sealed_checkpoints(stopped / "checkpoints")]
    assert saved == [4, 2]
    assert "going on from step 2 of 4" in said
    one, two = ((folder / "student" / "model.safetensors").read_bytes() for folder in (stopped, unbroken))
    assert one == two
    rows, expected = (list(read_metrics(folder / "logs" / "metrics.jsonl")) for folder in (stopped, unbroken))
    assert [(row["kind"], row["step"], row["loss"]) for row in rows] == [
        (row["kind"], row["step"], row["loss"]) for row in expected
    ]


def test_ranks_save_when_rank_0s_clock_says_so(chained):
    folders, _ = chained
    sealed = checkpoint_folder.sealed_checkpoints(folders["unbroken"] / "checkpoints")
    assert [checkpoint_folder.step_of(path) for path in sealed] == [4, 3, 2, 1]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_in_the_background_changes_no_byte(distil, tmp_path, stage):
    settings = {"zero_stage": stage, "checkpoint_every": 1}
    distil(tmp_path / "one", **settings)
    distil(tmp_path / "two", async_checkpoints=True, **settings)
    one, two = (checkpoint_folder.sealed_checkpoints(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for left, right in zip(one, two, strict=True):
        name = checkpoint_folder.rank_file(0)
        assert (left / name).read_bytes() == (right / name).read_bytes()


def test_dropout_draws_the_same_after_a_resume(distil, tmp_path, monkeypatch, dies_at_step):
    """The tiny model has no dropout: here the learning rate of a step is drawn where dropout would draw."""
    import torch

    real_rate = schedule.cosine_lr
    monkeypatch.setattr(
        trainer, "cosine_lr", lambda *args, **kwargs: real_rate(*args, **kwargs) * float(torch.rand(()))
    )
    whole = distil(tmp_path / "whole")

    with dies_at_step(5):
        distil(tmp_path / "cut")
    assert losses(distil(tmp_path / "cut")) == losses(whole)
