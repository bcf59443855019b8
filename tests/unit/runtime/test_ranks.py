"""The process group: what a rank tells torch when it joins, and what joining leaves as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdscale.distill.parallel import process_group
from kdscale.runtime.ranks import join_launched_group

ROOT = Path(__file__).resolve().parents[3]
PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: None)
    for name in (*PLACE, "TORCHELASTIC_USE_AGENT_STORE", "NCCL_LAUNCH_ORDER_IMPLICIT"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize("by_torchrun", [True, False])
@pytest.mark.parametrize(("device", "bound"), [("cuda:1", torch.device("cuda", 1)), ("cpu", None)])
def test_a_launched_rank_names_its_gpu(
    joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, by_torchrun: bool, device: str, bound: Any
) -> None:
    for name, value in {**PLACE, "TORCHELASTIC_USE_AGENT_STORE": str(by_torchrun)}.items():
        monkeypatch.setenv(name, value)
    join_launched_group("nccl", torch.device(device))
    assert [call["device_id"] for call in joined] == [bound]
    assert os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") == ("1" if bound else None)
    os.environ.pop("NCCL_LAUNCH_ORDER_IMPLICIT", None)


def test_a_rank_alone_names_its_gpu_too(joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    process_group.join_group(torch.device("cuda", 0))
    assert [call["device_id"] for call in joined] == [torch.device("cuda", 0)]


def test_a_group_of_one_puts_no_rank_before_a_trace() -> None:
    """In a process of its own, since a process has at most one group."""
    code = """
import sys, torch
from kdscale.runtime.ranks import init_group
hook, store = sys.excepthook, torch._C._distributed_c10d.HashStore()
init_group("gloo", torch.device("cpu"), store=store, rank=0, world_size=1)
print(sys.excepthook is hook)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_a_group_of_one_has_the_local_rank_that_deepspeed_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process joined it before, under variables that are gone."""
    for name in (*PLACE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    process_group.join_group(torch.device("cpu"))
    monkeypatch.delenv("LOCAL_RANK")
    process_group.join_group(torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "0"
