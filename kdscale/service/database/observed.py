"""What watchers see of runs: progress, what happened inside them, and the states of runs that somebody else started."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, update

from kdscale.service.database.connection import Database
from kdscale.service.database.events import append_event
from kdscale.service.database.schema import RUNS
from kdscale.service.states import FINAL, RunState


@dataclass(frozen=True)
class Seen:
    """Something that happened in a run, which becomes an event."""

    type: str
    time: float
    data: Mapping[str, Any]


class Observations:
    """Writes what was seen. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database, self._clock = database, clock

    def keep(self, run_id: str, progress: Mapping[str, Any], seen: Sequence[Seen] = ()) -> None:
        """Keep a run's progress and its new events together: the progress says up to where its events were read."""
        with self._database.begin() as connection:
            connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(progress=dict(progress)))
            for item in seen:
                append_event(connection, run_id, item.time, item.type, item.data)

    def found(self, run_id: str, state: RunState, reason: str) -> None:
        """Note the state of a run that the service did not start, which follows no rules of ours."""
        now = self._clock()
        values = {"state": state, "reason": reason, "updated": now, "ended": now if state in FINAL else None}
        with self._database.begin() as connection:
            changed = connection.execute(
                update(RUNS).where(RUNS.c.id == run_id, RUNS.c.origin != "service", RUNS.c.state != state)
                .values(values).returning(RUNS.c.attempt)
            ).first()  # fmt: skip
            if changed is not None:
                append_event(
                    connection, run_id, now, "state", {"state": state, "reason": reason, "attempt": changed.attempt}
                )

    def forget(self, run_id: str) -> None:
        """Forget a run that the service did not start and whose folder is gone."""
        with self._database.begin() as connection:
            connection.execute(delete(RUNS).where(RUNS.c.id == run_id, RUNS.c.origin != "service"))
