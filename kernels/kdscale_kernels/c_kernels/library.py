"""Compiles bf16_rows.c for the processor it runs on, once a process, and loads it.

It takes a C compiler about a second. Nothing is kept on disk: a library in a cache would have to be told apart by
processor and compiler, and trusted. The library's threads are torch's own, since both use the same OpenMP.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from kdscale_kernels.compiler_process import run_within

_SOURCE = Path(__file__).with_name("bf16_rows.c")
# No -ffast-math: a NaN must poison its row. The two `no` flags let exp be vectorised and change no result.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 60.0
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_FUNCTIONS: dict[str, list[type]] = {
    "exponentials": [_POINTER, _POINTER, _LONG, _LONG, _FLOAT, _POINTER, _POINTER, _POINTER, _INT],
    "scale": [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT],
    "dots": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT],
    "candidates": [_POINTER, _LONG, _LONG, _LONG, _FLOAT, _POINTER, _POINTER, _POINTER, _INT],
}


class LibraryError(RuntimeError):
    """The C steps cannot be compiled or loaded here."""


def library_obstacle() -> str | None:
    """What keeps the C steps from running in this process, or None. The first call compiles them."""
    try:
        library()
    except LibraryError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The compiled steps. Raises LibraryError."""
    loaded = _library(os.environ.get("CC"))
    if isinstance(loaded, str):
        raise LibraryError(loaded)
    return loaded


@cache
def _library(compiler: str | None) -> ctypes.CDLL | str:
    """The library, or why there is none: a compiler that failed is not started again."""
    try:
        command = _compiler(compiler)
        with tempfile.TemporaryDirectory(prefix="kdscale-c-") as folder:
            return _load(_compiled(command, Path(folder)), command[0])
    except (LibraryError, OSError) as error:
        return str(error)


def _compiler(given: str | None) -> list[str]:
    """The program and options that CC asks for, as in "ccache gcc", or the first usual one that is here."""
    if not sys.platform.startswith("linux"):
        raise LibraryError(f"the C steps are for Linux, and this is {sys.platform}")
    try:
        usual = [shlex.split(given)] if given and given.strip() else [["gcc"], ["cc"]]
    except ValueError as error:
        raise LibraryError(f"CC: expected a program and its options, got {given!r} ({error})") from error
    for program, *options in usual:
        if path := shutil.which(program):
            return [path, *options]
    raise LibraryError(f"no C compiler ({given or 'gcc, cc'}): install gcc, or set CC")


def _compiled(compiler: list[str], folder: Path) -> Path:
    target = folder / "bf16_rows.so"
    try:
        command = [*compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(target), str(_SOURCE), "-lm"]
        code, text = run_within(_SECONDS, command)
    except TimeoutError as error:
        raise LibraryError(f"{compiler[0]} {error}") from error
    except OSError as error:
        raise LibraryError(f"{compiler[0]} cannot be started: {error}") from error
    if code:
        lines = text.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise LibraryError(f"{compiler[0]} failed: {reason[:300]}")
    return target


def _load(path: Path, compiler: str) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"what {compiler} made cannot be loaded: {error}") from error
    for name, arguments in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INT if name == "candidates" else None
    return loaded
