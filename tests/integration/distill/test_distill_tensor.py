"""Ranks that share layers: the run of one process, whatever shares what; checkpoints go from one to any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdscale.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[3]
# name → phases of (ranks, of which so many share layers, ZeRO stage, killed when it begins this step)
RUNS = {
    "stage-0": [(2, 2, 0, None)],
    "stage-1": [(2, 2, 1, None)],
    "stage-2-four-ranks": [(4, 2, 2, None)],
    "stage-3-four-ranks": [(4, 2, 3, None)],
    "there-and-back": [(2, 2, 1, 2), (1, 1, 2, 4), (4, 2, 0, 6), (2, 2, 3, None)],
}


def rows_of(run_dir):
    return [row for row in read_metrics(run_dir / "logs" / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama_dir, student_dir, data_dir, make_config):
    folder = tmp_path_factory.mktemp("tensor")
    jobs = []
    for name, phases in RUNS.items():
        configs = [
            make_config(processes=ranks, tensor_parallel=tensor, zero_stage=stage, micro_batch=1, checkpoint_every=1)
            for ranks, tensor, stage, _ in phases
        ]
        jobs.append({
            "run_dir": str(folder / name), "teacher_dir": str(tiny_llama_dir), "student_dir": str(student_dir),
            "data_dir": str(data_dir),
            "phases": [
                {"config": config.resolved(), "until": until}
                for config, (*_, until) in zip(configs, phases, strict=True)
            ],
        })  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "parallel_worker.py", folder / "jobs.json"],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(distil, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    distil(folder, zero_stage=1, micro_batch=1, checkpoint_every=100)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_share_layers_train_what_one_process_trains(runs, alone, name):
    rows, expected = rows_of(runs / name), rows_of(alone)
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("labels", 0)):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], abs=tolerance)
    got = load_file(runs / name / "student/model.safetensors")
    want = load_file(alone / "student/model.safetensors")
    assert got.keys() == want.keys()
    assert max(float((got[key] - want[key]).abs().max()) for key in want) < 1e-4
