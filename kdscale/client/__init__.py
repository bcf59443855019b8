"""A client of a service that `kdscale serve` started: `Client` in Python, and what the commands stand on."""

from __future__ import annotations

from kdscale.client.client import Client
from kdscale.client.connection import Patience
from kdscale.client.models import (
    ENDED,
    STATES,
    Artifact,
    Event,
    Metrics,
    Page,
    Run,
    RunDetail,
    RunState,
    Series,
    Stage,
    Verdict,
)
from kdscale.client.problems import (
    BusyError,
    ChangedError,
    RefusedError,
    ScopeError,
    SpecError,
    StateError,
    TokenError,
    UnknownError,
    UnreachableError,
)

__all__ = [
    "ENDED", "STATES", "Artifact", "BusyError", "ChangedError", "Client", "Event", "Metrics", "Page", "Patience",
    "RefusedError", "Run", "RunDetail", "RunState", "ScopeError", "Series", "SpecError", "Stage", "StateError",
    "TokenError", "UnknownError", "UnreachableError", "Verdict",
]  # fmt: skip
