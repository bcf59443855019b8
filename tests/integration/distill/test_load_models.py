"""A ZeRO-3 student and a partitioned teacher: what each rank loads, and that the number of ranks changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from kdscale.distill import step, trainer
from kdscale.runs.metrics_log import read_metrics
from kdscale_kernels.fused import products

WORKER = Path(__file__).parent / "load_models_worker.py"
ROOT = WORKER.parents[3]
WORLDS = (1, 2, 4)
ELSEWHERE = ("replicated", "offloaded")  # the teacher of further runs, over two ranks
SETTINGS = {"tokens": 2 * 4 * 48, "micro_batch": 1, "zero_stage": 3, "teacher_placement": "partitioned"}


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] in ("train", "validation")]


@pytest.fixture(scope="module")
def ran(tiny_llama_dir, student_dir, data_dir, make_config, tmp_path_factory):
    """The folder of the runs over each number of ranks."""
    folder = tmp_path_factory.mktemp("pairs")
    configs = {str(world): make_config(**SETTINGS, processes=world).resolved() for world in WORLDS}
    for placement in ELSEWHERE:
        configs[placement] = make_config(**{**SETTINGS, "teacher_placement": placement}, processes=2).resolved()
    paths = {"folder": folder, "teacher": tiny_llama_dir, "student": student_dir, "data": data_dir}
    arguments = {"configs": configs, **{name: str(path) for name, path in paths.items()}}
    (folder / "arguments.json").write_text(json.dumps(arguments))
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER), str(folder / "arguments.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_rank_loads_its_share_of_the_student(ran):
    for world in WORLDS:
        for rank in range(world):
            found = json.loads((ran / f"loaded-{world}-{rank}.json").read_text())
            assert all(found[key] for key in ("names", "tied", "weights", "buffers")), (world, rank, found)
            assert found["held"] == 0
            assert found["whole"] <= world * found["stored"] < found["whole"] + 30 * world


def test_any_number_of_ranks_is_the_run_of_one_with_whole_models(ran, distil, tmp_path):
    """Token counts differ from rank to rank, and the last round of validation has no batch for some ranks."""
    whole = distil(tmp_path, **{**SETTINGS, "zero_stage": 0, "teacher_placement": "replicated"})
    want = load_file(tmp_path / "student" / "model.safetensors")
    for world in WORLDS:
        rows = list(read_metrics(ran / str(world) / "logs" / "metrics.jsonl"))
        assert losses(rows) == pytest.approx(losses(whole), abs=2e-5)
        norms = [[row["grad_norm"] for row in run if row["kind"] == "train"] for run in (rows, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        got = load_file(ran / str(world) / "student" / "model.safetensors")
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    counts = [json.loads((ran / f"counts-4-{rank}.json").read_text()) for rank in range(4)]
    assert any(len(set(step)) > 1 for step in zip(*counts, strict=True))


@pytest.mark.parametrize(("run", "world"), [("2", 2), ("4", 4), *((placement, 2) for placement in ELSEWHERE)])
def test_all_ranks_start_the_same_collectives_in_one_order(ran, run, world):
    """What two communicators need on GPUs: a partitioned teacher gathers in one of its own, amid the student's."""
    first, *others = (json.loads((ran / f"collectives-{run}-{rank}.json").read_text()) for rank in range(world))
    assert all(calls == first for calls in others)
    groups = [group for _, group, _, _ in first]
    assert len(first) > 100
    turns = sum(left != right for left, right in pairwise(groups))
    assert turns > 20 if run.isdigit() else turns < 20  # between communicators


class _Rows(TorchDispatchMode):
    """Remembers the most rows of any tensor with a dimension as long as the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.most = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor) and self.vocab in item.shape:
                self.most = max(self.most, item.numel() // self.vocab)
        return out


def test_no_tokens_by_vocabulary_and_no_teacher_between_steps(distil, tmp_path, monkeypatch):
    """190 tokens a micro-batch, vocabulary 320: nothing has more rows than the heads have columns (96)."""
    monkeypatch.setitem(products.CHUNK_BYTES, "cpu", 8 << 10)
    train_step, tokens, left = step.train_step, [], []

    def look(engine, teacher, batches, *rest):
        tokens.extend(batch.token_count for batch in batches)
        out = train_step(engine, teacher, batches, *rest)
        left.append(sum(parameter.numel() for parameter in teacher.model.parameters()))
        return out

    monkeypatch.setattr(trainer, "train_step", look)
    with _Rows(320) as rows:
        distil(tmp_path, **{**SETTINGS, "micro_batch": 4})
    assert rows.most == 96
    assert min(tokens) > 150
    assert left == [96, 96]  # the final norm
