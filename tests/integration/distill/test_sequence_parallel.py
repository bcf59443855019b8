"""Ranks that share sequences: the run of one process, and checkpoints that go to any other arrangement."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from kdscale.runs.metrics_log import read_metrics

# name → phases of (ranks, of which so many share a sequence, killed when it begins this step, other settings)
RUNS = {
    "stage 1": [(2, 2, None, {"zero_stage": 1})],
    "more ranks than kv heads": [(6, 6, None, {"zero_stage": 2, "teacher_placement": "offloaded"})],
    "there and back": [
        (2, 2, 2, {"zero_stage": 1}),
        (1, 1, 3, {"zero_stage": 2}),
        (4, 2, None, {"zero_stage": 3, "teacher_placement": "partitioned", "gradient_checkpointing": "selective"}),
    ],
}
OBJECTIVES = [
    {"name": "token_divergence", "top_k": 16, "ce_weight": 0.2},
    {"name": "hidden_states", "layers": {-1: -1, 2: 3}, "weight": 0.5},
]
SETTINGS = {"tokens": 5 * 4 * 48, "micro_batch": 1, "checkpoint_every": 1, "objectives": OBJECTIVES}


def rows_of(run_dir, kind="train"):
    return [row for row in read_metrics(run_dir / "logs" / "metrics.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama_dir, student_dir, data_dir, make_config, run_parallel):
    folder = tmp_path_factory.mktemp("sequence")
    jobs = []
    for name, phases in RUNS.items():
        configs = [
            make_config(processes=ranks, sequence_parallel=share, **SETTINGS, **other)
            for ranks, share, _, other in phases
        ]
        jobs.append({
            "run_dir": str(folder / name), "teacher_dir": str(tiny_llama_dir), "student_dir": str(student_dir),
            "data_dir": str(data_dir),
            "phases": [
                {"config": config.resolved(), "until": until}
                for config, (_, _, until, _) in zip(configs, phases, strict=True)
            ],
        })  # fmt: skip
    run_parallel(folder, jobs)
    return folder


@pytest.fixture(scope="module")
def alone(distil, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    distil(folder, zero_stage=1, **SETTINGS)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_share_sequences_train_what_one_process_trains(runs, alone, name):
    rows, expected = rows_of(runs / name), rows_of(alone)
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("labels", 0)):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=tolerance)
    checked, wanted = rows_of(runs / name, "validation")[-1], rows_of(alone, "validation")[-1]
    assert checked["labels"] == wanted["labels"]
    assert checked["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    got = load_file(runs / name / "student/model.safetensors")
    want = load_file(alone / "student/model.safetensors")
    assert got.keys() == want.keys()
    assert max(float((got[key] - want[key]).abs().max()) for key in want) < 1e-4


def test_every_rank_counts_its_own_labels_once(runs, alone):
    seen = [json.loads((runs / "stage 1" / f"seen-0-{rank}.json").read_text()) for rank in range(2)]
    assert sum(one["labels"] for one in seen) == rows_of(alone)[0]["labels"]
    assert min(one["labels"] for one in seen) > 0
