"""What a host tries before the work, and whether layers are compiled: the choice, and what keeps some rank from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdscale.config.load import find_config, load_config
from kdscale.errors import ConfigError
from kdscale.runtime import kernel_backend
from kdscale.runtime.kernel_backend import agree_on_compiling, try_launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("choice", "device", "triton", "compiler", "expected"),
    [
        ("auto", GPU, None, None, (True, None)),
        ("auto", GPU, "no gcc", None, (False, "no gcc")),
        ("layers", GPU, None, "unused", (True, None)),
        ("off", GPU, "no gcc", None, (False, None)),
        ("auto", CPU, "no Triton", None, (False, None)),
        ("layers", CPU, "no Triton", None, (True, None)),
    ],
)
def test_what_each_choice_comes_to(choice, device, triton, compiler, expected, monkeypatch):
    monkeypatch.setattr(kernel_backend, "_compiler_obstacle", lambda: compiler)
    assert agree_on_compiling(choice, device, triton) == expected


@pytest.mark.parametrize(("device", "triton"), [(GPU, "no compiler"), (CPU, None)])
def test_layers_are_refused_where_they_cannot_be_compiled(device, triton, monkeypatch):
    monkeypatch.setattr(kernel_backend, "_compiler_obstacle", lambda: "no compiler")
    with pytest.raises(ConfigError, match=r"(?s)distill.compile.*no compiler.*compile: off"):
        agree_on_compiling("layers", device, triton)


def test_a_missing_compiler_is_named(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("InvalidCxxCompiler:\n  none of g++, clang")

    monkeypatch.setattr(torch, "compile", refuse)
    assert kernel_backend._compiler_obstacle() == "RuntimeError: InvalidCxxCompiler: none of g++, clang"


@pytest.mark.parametrize(
    ("dtype", "local_rank", "found"), [("bfloat16", 0, "no C compiler"), ("bfloat16", 1, None), ("float32", 0, None)]
)
def test_on_a_cpu_the_first_rank_of_a_host_compiles_c_for_bf16_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, local_rank: int, found: str | None
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(kernel_backend, "library_obstacle", lambda: "no C compiler")
    settings = [f"run_dir={tmp_path}", "runtime.device=cpu", f"distill.dtype={dtype}"]
    assert try_launch(load_config(find_config("demo"), settings)) == found
