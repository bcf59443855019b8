"""The steps in C: compiled where a compiler works, and else what is missing is named, once, and torch is taken."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale_kernels import backend
from kdscale_kernels.backend import C_FROM_LOGITS, choose_backend, refuse_compiled
from kdscale_kernels.c_kernels import library
from kdscale_kernels.c_kernels.library import LibraryError, library_obstacle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C steps are for Linux")


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_logged", set())
    yield
    refuse_compiled(None)


def test_this_machine_compiles_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert library_obstacle() is None
    assert list(tmp_path.iterdir()) == []


def test_a_path_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library_obstacle() == "no C compiler (no-such-compiler): install gcc, or set CC"
    with pytest.raises(LibraryError, match="no C compiler"):
        library.library()


@pytest.mark.parametrize(("given", "said"), [("gcc 'x", "CC: expected a program"), ("gcc -no-such-option", "failed: ")])
def test_cc_may_hold_options(monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.setenv("CC", given)
    assert said in str(library_obstacle())
    monkeypatch.setenv("CC", "gcc -g0")
    assert library_obstacle() is None


def test_without_a_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert "No such file or directory" in str(library_obstacle())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'x.c: warning: odd' >&2; echo 'cc: error: no -march=native' >&2; exit 1",
            "failed: cc: error: no -march",
        ),
        ("exit 3", "failed: no message"),
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "cannot be loaded"),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_named_and_asked_once(compiler: Path, script: str, said: str) -> None:
    compiler.write_text(f"#!/bin/sh\necho run >> {compiler}.log\n{script}\n")
    obstacles = [library_obstacle() for _ in range(2)]
    assert str(compiler) in str(obstacles[0]) and said in str(obstacles[0])
    assert obstacles[0] == obstacles[1]
    assert Path(f"{compiler}.log").read_text() == "run\n"


def test_a_compiler_that_hangs_is_ended(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_SECONDS", 0.5)
    compiler.write_text("#!/bin/sh\nsleep 100\n")  # which outlives the shell and holds what that printed to
    assert library_obstacle() == f"{compiler} did not end within 0.5 s"


def test_auto_takes_c_for_many_bf16_logits_and_torch_is_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdscale_kernels"):
        assert choose_backend("auto", "cpu", bf16_logits=C_FROM_LOGITS) == "compiled"
    assert caplog.messages == [
        "kdscale_kernels: using the chunked torch path with steps in C (requested backend: auto)"
    ]
    assert choose_backend("auto", "cpu", bf16_logits=C_FROM_LOGITS - 1) == "torch"
    assert choose_backend("torch", "cpu", bf16_logits=C_FROM_LOGITS) == "torch"


def test_without_a_compiler_auto_is_torch_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, "kdscale_kernels"):
        assert choose_backend("auto", "cpu", bf16_logits=C_FROM_LOGITS) == "torch"
    assert "no C compiler (no-such-compiler): install gcc, or set CC" in caplog.text


def test_what_a_rank_was_told_decides_for_auto() -> None:
    refuse_compiled("rank 3: no C compiler")
    assert choose_backend("auto", "cpu", bf16_logits=C_FROM_LOGITS) == "torch"
    refuse_compiled(None)
    assert choose_backend("auto", "cpu", bf16_logits=C_FROM_LOGITS) == "compiled"
