"""Memory that the machine refuses is not a damaged checkpoint: another try, or another machine, may well have it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdscale.distill.parallel import zero3_loading
from kdscale.errors import CheckpointError, MachineError
from kdscale.runtime.exits import FINAL_CODES
from kdscale.teacher.placement import host_memory
from kdscale.teacher.placement.host_memory import HostMemory

CPU = torch.device("cpu")


def refuse(code: int) -> Callable[..., Any]:
    def refused(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as rank 0 of two on a host."""

    monkeypatch.setattr(host_memory, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(host_memory, "gather", lambda name: [name, ""])


def test_the_launcher_tries_again_where_memory_was_refused() -> None:
    assert MachineError.exit_code not in FINAL_CODES
    assert not issubclass(MachineError, CheckpointError)


def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))
    with pytest.raises(MachineError, match=r"fit into this host's memory(.|\n)*4,096 bytes(.|\n)*allocate memory"):
        HostMemory(4096, CPU)


def test_too_little_memory_for_a_parameter_of_a_zero3_student_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))
    with pytest.raises(MachineError, match=r"parameter of the student(.|\n)*24 bytes(.|\n)*more ranks"):
        zero3_loading._empty(torch.Size([2, 3]), torch.float32, CPU)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("function", ["memfd_create", "ftruncate"])
def test_no_room_for_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(os, function, refuse(errno.ENOSPC))
    with pytest.raises(MachineError, match=r"shared memory(.|\n)*No space left(.|\n)*partitioned"):
        HostMemory(4096, CPU)


@pytest.mark.usefixtures("two_ranks")
def test_shared_memory_is_one_file_for_the_ranks_of_a_host() -> None:
    memory = HostMemory(4096, CPU)
    assert memory.bytes.tolist() == [0] * 4096
    assert list(memory.indices_to_fill(5)) == [0, 2, 4]


@pytest.mark.usefixtures("two_ranks")
def test_files_that_ranks_cannot_open_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(host_memory, "rank", lambda: 1)
    monkeypatch.setattr(host_memory, "gather", lambda _: ["/proc/0/fd/9", ""])
    with pytest.raises(MachineError, match=r"/proc/0/fd/9 cannot be shared"):
        HostMemory(4096, CPU)


def test_a_limit_on_locked_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(MachineError, match=r"page-locked(.|\n)*CUDA error 2(.|\n)*ulimit -l"):
        HostMemory(4096, torch.device("cuda"))
