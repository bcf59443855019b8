"""Which implementation runs: logged once, and never another one than was asked for."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import get_args

import torch

from kdscale_kernels.c_kernels.library import library_obstacle
from kdscale_kernels.types import Backend

_log = logging.getLogger("kdscale_kernels")
_logged: set[str] = set()
_refused: list[str] = []  # why nothing compiled is used, as `refuse_compiled` was told last
MIN_TRITON = (3, 4)
# bf16 logits of a call from which on it is worth compiling C: that takes as long as C saves on a hundred times as many.
C_FROM_LOGITS = 1 << 22
_NAMES = {
    "triton": "Triton row kernels",
    "compiled": "chunked torch path with steps in C",
    "torch": "chunked torch path",
}


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here."""


def refuse_compiled(reason: str | None) -> None:
    """From now on do without Triton on GPUs and C on CPUs in this process, because of `reason`; None: use them again.

    For ranks, which must all compute with the same backend: one that cannot compile kernels decides for all.
    """
    _refused[:] = [] if reason is None else [reason]


def choose_backend(
    requested: Backend, device: torch.device | str = "cpu", *, limit: str | None = None, bf16_logits: int = 0
) -> str:
    """The row of ROW_STEPS for tensors on `device`: "torch", "compiled" or "triton".

    limit: why this call cannot run in Triton, if so. bf16_logits: how many it makes on a CPU.

    "auto" is Triton on a CUDA device (ROCm's included) where triton can be imported, and on a CPU C for a call of many
    bf16 logits where a C compiler works (c_kernels/library.py); where not, or after `refuse_compiled`, chunked torch.
    "triton" on a CPU means triton's interpreter, for tests: TRITON_INTERPRET=1, set before triton is first imported.
    Raises ValueError for an unknown name, BackendUnavailableError for a requested backend that cannot run.
    """
    if requested not in get_args(Backend):
        raise ValueError(f"backend: expected {' | '.join(get_args(Backend))}, got {requested!r}")
    on_gpu = torch.device(device).type == "cuda"
    backend, obstacle = "torch", None
    if requested == "triton" or (requested == "auto" and on_gpu):
        obstacle = limit or _triton_obstacle(on_gpu)
        if requested == "triton" and obstacle:
            raise BackendUnavailableError(
                f"backend='triton': {obstacle}; use backend='torch' (chunked, same memory behaviour) or 'auto'"
            )
        backend = "torch" if obstacle else "triton"
    elif requested == "auto" and bf16_logits >= C_FROM_LOGITS:
        obstacle = _refused[0] if _refused else library_obstacle()
        backend = "torch" if obstacle else "compiled"
    message = f"requested backend: {requested}" + (f"; {obstacle}" if obstacle else "")
    if f"{backend} {message}" not in _logged:
        _logged.add(f"{backend} {message}")
        _log.info("kdscale_kernels: using the %s (%s)", _NAMES[backend], message)
    return backend


def _triton_obstacle(on_gpu: bool) -> str | None:
    """What keeps Triton from running, or None."""
    obstacle = import_obstacle()
    if obstacle is None and on_gpu and _refused:
        obstacle = _refused[0]
    if obstacle is not None:
        return obstacle
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if on_gpu or (interpreted and kernels_are_interpreted()):
        return None
    return (
        "tensors on a CPU run in triton's interpreter only, for tests: set TRITON_INTERPRET=1 before triton is imported"
    )


@cache
def import_obstacle() -> str | None:
    """What keeps Triton from being imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed (pip install 'triton>={MIN_TRITON[0]}.{MIN_TRITON[1]}', Linux only)"
    try:
        import triton
    except ImportError as error:
        return f"triton is installed but cannot be imported ({error})"
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is too old, {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer is needed"
    return None


def kernels_are_interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET: triton decides at import, not at launch."""
    import triton

    from kdscale_kernels.triton_kernels import sparse

    return not isinstance(sparse.sparse_kl_rows_kernel, triton.JITFunction)
