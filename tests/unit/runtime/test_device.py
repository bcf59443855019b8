"""Which dtype `auto` takes: what the hardware multiplies, not what torch can emulate; whose peak memory is read."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kdscale.runtime.device import resolve_dtype


@pytest.mark.parametrize(
    ("card", "hip", "dtype"),
    [
        (SimpleNamespace(name="V100", major=7, minor=0), None, torch.float32),
        (SimpleNamespace(name="T4", major=7, minor=5), None, torch.float32),
        (SimpleNamespace(name="A100", major=8, minor=0), None, torch.bfloat16),
        (SimpleNamespace(name="B200", major=10, minor=0), None, torch.bfloat16),
        (SimpleNamespace(name="MI50", major=9, minor=0, gcnArchName="gfx906:sramecc+:xnack-"), "6.4", torch.float32),
        (SimpleNamespace(name="MI300X", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-"), "6.4", torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_auto_is_bf16_only_where_the_gpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, card: SimpleNamespace, hip: str | None, dtype: torch.dtype
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)  # what torch says of all of them
    monkeypatch.setattr(torch.version, "hip", hip)
    assert resolve_dtype("auto", torch.device("cuda", 3)) == dtype
    assert asked == [3]
    assert resolve_dtype("bfloat16", torch.device("cuda", 3)) == torch.bfloat16


def test_peak_memory_is_the_processs_own() -> None:
    """Linux hands getrusage's maximum down through exec: a small child of a big parent must still read as small."""
    ballast = bytearray(1 << 30)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    code = "import torch; from kdscale.runtime.device import peak_memory; print(peak_memory(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < len(ballast) // 2
