"""Triton's trial launch: what is missing is found in a process of its own and named, and decides for `auto`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from kdscale_kernels.backend import BackendUnavailableError, choose_backend, refuse_compiled
from kdscale_kernels.launch_trial import launch_obstacle

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")

WITHOUT_HEADERS = """#!/bin/bash
for argument in "$@"; do case $argument in -I*) ;; *) kept+=("$argument") ;; esac; done
exec gcc "${kept[@]}"
"""


@pytest.fixture
def told() -> Iterator[None]:
    yield
    refuse_compiled(None)


def test_this_machine_builds_what_a_launch_needs() -> None:
    assert launch_obstacle(None) is None


def test_a_path_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    obstacle = launch_obstacle(None)
    assert obstacle is not None and "Failed to find C compiler" in obstacle and "(install gcc, or set CC)" in obstacle


def test_a_python_without_headers(compiler: Path) -> None:
    compiler.write_text(WITHOUT_HEADERS)
    obstacle = launch_obstacle(None)
    assert obstacle is not None and "Python.h: No such file" in obstacle and "python3-dev" in obstacle


def test_a_compiler_that_hangs_is_ended(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 100\n")
    assert launch_obstacle(None, seconds=2.0) == "a trial of Triton did not end within 2 s"
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to launch on")
def test_a_launch_without_a_gpu_fails_and_says_why() -> None:
    obstacle = launch_obstacle(0)
    assert obstacle is not None and obstacle.startswith("Triton cannot launch a kernel: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_is_launched() -> None:
    assert launch_obstacle(0) is None


@pytest.mark.usefixtures("told")
def test_what_a_rank_was_told_decides_for_auto_and_refuses_triton() -> None:
    assert choose_backend("auto", "cuda") == "triton"
    refuse_compiled("rank 3: no compiler")
    assert choose_backend("auto", "cuda") == "torch"
    with pytest.raises(BackendUnavailableError, match=r"backend='triton': rank 3: no compiler"):
        choose_backend("triton", "cuda")
    refuse_compiled(None)
    assert choose_backend("auto", "cuda") == "triton"
