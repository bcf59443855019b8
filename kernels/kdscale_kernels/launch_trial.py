"""Whether Triton can launch a kernel on this machine, tried in a process of its own.

Triton calls a C compiler and includes Python.h at its first launch, and finds the driver's library by itself: any of
these may be missing, hang, or crash, hours into a run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from kdscale_kernels.backend import import_obstacle
from kdscale_kernels.compiler_process import run_within

_PROGRAM = Path(__file__).with_name("triton_kernels") / "trial.py"
_HINTS = {
    "Failed to find C compiler": "install gcc, or set CC",
    "Python.h": "install the headers of this Python, such as python3-dev",
    "libcuda.so": "install the driver's library, or set TRITON_LIBCUDA_PATH to its folder",
}


def launch_obstacle(gpu: int | None, seconds: float = 120.0) -> str | None:
    """What keeps Triton from launching a kernel on the GPU with this number within `seconds`; None when it can.

    Without a GPU, what keeps it from building the module that each launch needs. Nothing that was compiled before is
    used. Call it before this process uses the GPU: a card may be set to take one process at a time.
    """
    if (obstacle := import_obstacle()) is not None:
        return obstacle
    command = [sys.executable, "-P", str(_PROGRAM), *([] if gpu is None else [str(gpu)])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="kdscale-trial-") as cache:
        try:
            code, text = run_within(seconds, command, {**environment, "TRITON_CACHE_DIR": cache})
        except TimeoutError as error:
            return f"a trial of Triton {error}"
    return None if code == 0 else f"Triton cannot launch a kernel: {_reason(text, code)}"


def _reason(text: str, code: int) -> str:
    """The line that says most, of what the compiler and Python printed, and what to do about it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    of_compiler = [line for line in lines if "error:" in line and "Error:" not in line]
    reason = (of_compiler or lines[-1:] or [f"exit code {code}"])[0][:300]
    hint = next((hint for mark, hint in _HINTS.items() if mark in text), None)
    return reason + (f" ({hint})" if hint else "")
