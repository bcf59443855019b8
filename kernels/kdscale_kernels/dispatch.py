"""Which implementation runs. Said once in the log, never chosen silently against a request."""

from __future__ import annotations

import logging
from typing import get_args

from kdscale_kernels.types import Backend

_log = logging.getLogger("kdscale_kernels")
_said: set[str] = set()


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here."""


def choose_backend(requested: Backend) -> str:
    """The backend to run. Raises ValueError for an unknown name, BackendUnavailableError for one that cannot run."""
    if requested not in get_args(Backend):
        raise ValueError(f"backend: expected {' | '.join(get_args(Backend))}, got {requested!r}")
    if requested == "triton":
        raise BackendUnavailableError(
            "backend='triton' is not available in this version of kdscale_kernels; "
            "use backend='torch' (chunked, same memory behaviour) or 'auto'"
        )
    if "torch" not in _said:
        _said.add("torch")
        _log.info("kdscale_kernels: using the chunked torch path (requested backend: %s)", requested)
    return "torch"
