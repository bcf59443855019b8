"""Where the Triton kernels run: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from kdscale_kernels.backend import kernels_are_interpreted


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in module.__version__.split(".")[:2])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test's tensors; the test is skipped where the kernels cannot run there."""
    triton = pytest.importorskip("triton", reason="triton is not installed (the dev extra installs it on Linux)")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and kernels_are_interpreted()
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device and TRITON_INTERPRET unset")
    if request.param == "cpu" and not interpreted:
        pytest.skip("on a machine with a GPU the interpreter runs only under TRITON_INTERPRET=1")
    if request.param == "cpu" and _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 needs numpy before 2.4")
    return str(request.param)
