"""What happened to runs, in the order in which it came into the database; a reader asks for what follows a number."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from kdscale.service.database.connection import Database, alone
from kdscale.service.database.schema import EVENTS

MOST_AT_ONCE = 1000


@dataclass(frozen=True)
class Event:
    """One event; `seq` numbers grow, with gaps."""

    seq: int
    run_id: str
    time: float
    type: str
    data: dict[str, Any]


def append_event(connection: Connection, run_id: str, now: float, type_: str, data: Mapping[str, Any]) -> int:
    """Write an event in the caller's transaction; returns its number.

    In Postgres, writers of events take turns: a smaller number that is committed after a larger one would be missed by
    whoever has read the larger one already. SQLite has one writer anyway.
    """
    alone(connection, "append")
    values = {"run_id": run_id, "time": now, "type": type_, "data": dict(data)}
    return int(connection.execute(insert(EVENTS).values(values).returning(EVENTS.c.seq)).scalar_one())


class Events:
    """The events of a database. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database, self._clock = database, clock

    def append(self, run_id: str, type_: str, data: Mapping[str, Any]) -> int:
        """Write an event; returns its number."""
        with self._database.begin() as connection:
            return append_event(connection, run_id, self._clock(), type_, data)

    def since(self, seq: int, run_id: str | None = None, limit: int = 500) -> list[Event]:
        """Events behind number `seq`, of one run or of all, the oldest first."""
        query = select(EVENTS).where(EVENTS.c.seq > seq).order_by(EVENTS.c.seq).limit(max(1, min(limit, MOST_AT_ONCE)))
        if run_id is not None:
            query = query.where(EVENTS.c.run_id == run_id)
        with self._database.read() as connection:
            return [Event(**row._mapping) for row in connection.execute(query)]

    def last_seq(self) -> int:
        """The number of the last event; 0 before the first."""
        with self._database.read() as connection:
            return int(connection.execute(select(func.coalesce(func.max(EVENTS.c.seq), 0))).scalar_one())

    def latest(self, run_id: str, limit: int = 50) -> list[Event]:
        """The last events of a run, the oldest first."""
        query = select(EVENTS).where(EVENTS.c.run_id == run_id).order_by(EVENTS.c.seq.desc())
        with self._database.read() as connection:
            found = connection.execute(query.limit(max(1, min(limit, MOST_AT_ONCE)))).all()
        return [Event(**row._mapping) for row in reversed(found)]
