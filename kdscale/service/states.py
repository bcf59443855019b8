"""The states of a run, and which may follow which.

Why a run is in its state is a field of its own (`reason`): there are ten states, and any number of reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from kdscale.errors import ServiceError

RunState = Literal[
    "queued", "starting", "running", "recovering", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"
]
STATES: tuple[RunState, ...] = get_args(RunState)

# Nothing follows by itself. A failed or cancelled run may be queued again on request: it goes on from what it saved.
FINAL: frozenset[RunState] = frozenset({"cancelled", "succeeded", "failed"})
# These hold the devices that they were given.
ACTIVE: frozenset[RunState] = frozenset({"starting", "running", "recovering", "pausing", "cancelling"})

NEXT: Mapping[RunState, frozenset[RunState]] = {
    "queued": frozenset({"starting", "paused", "cancelled", "failed"}),
    "starting": frozenset({"running", "recovering", "pausing", "cancelling", "queued", "succeeded", "failed"}),
    "running": frozenset({"recovering", "pausing", "cancelling", "succeeded", "failed"}),
    "recovering": frozenset({"queued", "starting", "running", "pausing", "cancelling", "succeeded", "failed"}),
    "pausing": frozenset({"paused", "cancelling", "succeeded", "failed"}),
    "paused": frozenset({"queued", "cancelled"}),
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "cancelled": frozenset({"queued"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
}

Request = Literal["pause", "resume", "cancel"]
# What a request makes of a run in a state; states that are missing refuse it.
ANSWERS: Mapping[Request, Mapping[RunState, RunState]] = {
    "pause": {"queued": "paused", "starting": "pausing", "running": "pausing", "recovering": "pausing"},
    "resume": {"paused": "queued", "failed": "queued", "cancelled": "queued"},
    "cancel": {
        "queued": "cancelled", "paused": "cancelled", "starting": "cancelling", "running": "cancelling",
        "recovering": "cancelling", "pausing": "cancelling",
    },
}  # fmt: skip


class WrongTransitionError(ServiceError):
    """What was asked of a run does not fit the state that it is in."""


class UnknownRunError(ServiceError):
    """There is no such run, or none that may be seen."""
