"""Two ranks on this machine: on which addresses they listen, and what they send each other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kdscale_launch import JobSpec, run_local

RANK = """
import json, os, sys
from datetime import timedelta
import psutil, torch, torch.distributed as dist
from kdscale.distill.parallel.process_group import join_group
from kdscale.errors import RunFolderError
from kdscale.runtime.kernel_backend import agree_on_backend
from kdscale.runtime.ranks import all_reduce_sum, gather, on_main, rank
from kdscale_kernels import choose_backend

def refuse(*_, **__):
    raise AssertionError("a pickle between ranks")

dist.distributed_c10d._object_to_tensor = dist.distributed_c10d._tensor_to_object = refuse
join_group(torch.device("cpu"), timedelta(seconds=60))

def ask(function):
    try:
        return on_main(function)
    except (RunFolderError, OSError) as error:
        return [type(error).__name__, str(error), error.__dict__ if isinstance(error, RunFolderError) else error.errno]

def no_room():
    raise OSError(28, "No space left on device", "/a file")

def used():
    raise RunFolderError("in use", expected="none", hint="wait")

def agreed():
    asked = []
    for reason in ("no compiler", None):
        decided = agree_on_backend(reason if rank() == 1 else None)
        asked.append((decided, choose_backend("auto", "cuda")))
    return dict(zip(("backends", "chosen"), zip(*asked)))

seen = {
    "sum": float(all_reduce_sum(torch.ones(1))),
    "gathered": gather([rank(), "ü" * (1 + 1000 * rank()), None, {"a": [1.5]}]),
    "result": on_main(lambda: [[rank(), "name"], {"b": None}]),
    "os_error": ask(no_room),
    "error": ask(used),
    **agreed(),
    "listens": sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}),
}
with open(f"seen-{rank()}", "w") as stream:
    json.dump(seen, stream)
dist.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks wrote down."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    spec = JobSpec((sys.executable, "-c", RANK), 2, folder / "logs", env=env, cwd=folder)
    assert run_local(spec) == 0
    return [json.loads((folder / f"seen-{number}").read_text()) for number in range(2)]


def test_ranks_on_one_machine_listen_on_the_loopback_alone(seen: list[dict[str, Any]]) -> None:
    assert [rank["sum"] for rank in seen] == [2.0, 2.0]
    assert [rank["listens"] for rank in seen] == [["127.0.0.1"], ["127.0.0.1"]]


def test_a_rank_that_cannot_launch_kernels_decides_for_all(seen: list[dict[str, Any]]) -> None:
    assert [rank["backends"] for rank in seen] == [["rank 1: no compiler", None]] * 2
    assert [rank["chosen"] for rank in seen] == [["torch", "triton"]] * 2


def test_ranks_exchange_values_and_errors_without_pickles(seen: list[dict[str, Any]]) -> None:
    values = [[number, "ü" * (1 + 1000 * number), None, {"a": [1.5]}] for number in range(2)]
    for rank in seen:
        assert rank["gathered"] == values
        assert rank["result"] == [[0, "name"], {"b": None}]
        assert rank["os_error"] == ["OSError", "[Errno 28] No space left on device: '/a file'", 28]
        name, message, parts = rank["error"]
        assert (name, message) == ("RunFolderError", "in use\n  expected: none\n  to do:    wait")
        assert {name: part for name, part in parts.items() if part} == {
            "what": "in use",
            "expected": "none",
            "hint": "wait",
        }
