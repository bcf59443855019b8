"""linear_sparse_kl on a head that DeepSpeed ZeRO-3 keeps in pieces over two ranks, against one plain process.

tests/integration/distill covers the engine's own way, a wrapper module that makes hidden states and loss in one
forward. Here: a head that takes the targets, checkpointing around it, a frozen head, loss and backward in a gather.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdscale_kernels

WORKER = Path(__file__).with_name("zero3_worker.py")
CASES = ["head", "checkpointed", "frozen", "gathered"]


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("zero3_worker", WORKER)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    path = os.pathsep.join([str(Path(kdscale_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(folder / "store"), str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(ran, worker, name):
    assert list(worker.CASES) == CASES
    case = worker.CASES[name]
    student = worker.Student(frozen=case.get("frozen", False))
    for index in range(worker.WORLD * worker.MICROS):
        student(*worker.micro_batch(index)).backward()
    want = {key: value.grad for key, value in student.named_parameters() if value.grad is not None}
    for found in ran:
        assert found[name].keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
