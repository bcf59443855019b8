"""Launches one small kernel in this process, or builds what every launch needs where there is no GPU.

`python -P trial.py [GPU]`, as launch_trial.py starts it; ends with an exception when something is missing.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

_ELEMENTS = 64
# Triton compiles a module like this one, against Python.h, before its first launch and for each signature of a kernel.
_MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kdscale_trial", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_kdscale_trial(void) { return PyModule_Create(&definition); }
"""


@triton.jit
def _double_kernel(x_ptr: Any, out_ptr: Any, elements: tl.constexpr) -> None:
    index = tl.arange(0, elements)
    tl.store(out_ptr + index, 2 * tl.load(x_ptr + index))


def launch(index: int) -> None:
    """Launch the kernel on the GPU with this number. Raises AssertionError when it computes something else."""
    import torch

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    x = torch.arange(_ELEMENTS, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    _double_kernel[(1,)](x, out, _ELEMENTS)
    assert torch.equal(out, 2 * x), "the kernel computed something else"


def build() -> None:
    """Compile and load a module for this Python, by Triton's own way to do it."""
    from triton.runtime.build import compile_module_from_src

    compile_module_from_src(_MODULE, "kdscale_trial")


if __name__ == "__main__":
    launch(int(sys.argv[1])) if len(sys.argv) > 1 else build()
