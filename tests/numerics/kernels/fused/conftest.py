"""The ops as on a CPU with bf16 instructions, with the steps on bf16 logits in torch and in C."""

from __future__ import annotations

import pytest

from kdscale_kernels import backend
from kdscale_kernels.c_kernels.library import library_obstacle
from kdscale_kernels.fused import products


@pytest.fixture(params=["torch", "compiled"])
def on_bf16_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also where the CPU has none, and however small the call is; gives the row of ROW_STEPS that is taken."""
    if request.param == "compiled" and (obstacle := library_obstacle()):
        pytest.skip(obstacle)
    monkeypatch.setattr(products, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(backend, "C_FROM_LOGITS", {"torch": 1 << 62, "compiled": 1}[request.param])
    return request.param
