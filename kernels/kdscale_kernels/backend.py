"""Which implementation runs. Said once in the log, never chosen silently against a request."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import get_args

import torch

from kdscale_kernels.types import Backend

_log = logging.getLogger("kdscale_kernels")


_said: set[str] = set()


MIN_TRITON = (3, 4)


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here."""


def choose_backend(requested: Backend, device: torch.device | str = "cpu", *, cannot: str | None = None) -> str:
    """Either "torch" or "triton", for tensors on `device`; `cannot` says why this call has no Triton form, if so.

    "auto" is Triton on a CUDA device (ROCm's included) where triton can be imported, else chunked torch. "triton" on a
    CPU means triton's interpreter, for tests: TRITON_INTERPRET=1, set before triton is first imported.
    Raises ValueError for an unknown name, BackendUnavailableError for a requested backend that cannot run.
    """
    if requested not in get_args(Backend):
        raise ValueError(f"backend: expected {' | '.join(get_args(Backend))}, got {requested!r}")
    on_gpu = torch.device(device).type == "cuda"
    problem = None
    if requested == "triton" or (requested == "auto" and on_gpu):
        problem = cannot or _triton_problem(on_gpu)
        if requested == "triton" and problem:
            raise BackendUnavailableError(
                f"backend='triton': {problem}; use backend='torch' (chunked, same memory behaviour) or 'auto'"
            )
    chosen = "triton" if problem is None and (requested == "triton" or (requested == "auto" and on_gpu)) else "torch"
    why = f"requested backend: {requested}" + (f"; {problem}" if problem else "")
    if f"{chosen} {why}" not in _said:
        _said.add(f"{chosen} {why}")
        name = "Triton row kernels" if chosen == "triton" else "chunked torch path"
        _log.info("kdscale_kernels: using the %s (%s)", name, why)
    return chosen


def _triton_problem(on_gpu: bool) -> str | None:
    """What keeps Triton from running, or None."""
    found = _triton_import_problem()
    if found is not None:
        return found
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if on_gpu or (interpreted and _body_is_interpreted()):
        return None
    return (
        "tensors on a CPU run in triton's interpreter only, for tests: set TRITON_INTERPRET=1 before triton is imported"
    )


@cache
def _triton_import_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed (pip install 'triton>={MIN_TRITON[0]}.{MIN_TRITON[1]}', Linux only)"
    try:
        import triton
    except ImportError as error:
        return f"triton is installed but cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is too old, {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer is needed"
    return None


def _body_is_interpreted() -> bool:
    """Triton decides at import, not at launch, whether a body is compiled or interpreted."""
    import triton

    from kdscale_kernels.triton_kernels import sparse

    return not isinstance(sparse.sparse_kl_rows_kernel, triton.JITFunction)
