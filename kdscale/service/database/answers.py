"""What requests with an Idempotency-Key were answered, so that a repeated request does nothing a second time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from kdscale.errors import ServiceError
from kdscale.service.database.connection import Database
from kdscale.service.database.schema import ANSWERS

KEPT_SECONDS = 2 * 86_400.0


class KeyReusedError(ServiceError):
    """An Idempotency-Key that came with another request before, or whose first request is still being answered."""


@dataclass(frozen=True)
class StoredAnswer:
    """What the first request with a key was answered; `status` None: it was cut off before its answer was kept."""

    status: int | None
    run_id: str | None
    body: Any


class Answers:
    """The kept answers of a database. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database, self._clock = database, clock

    def begin(self, owner: str, key: str, request: str, run_id: str | None = None) -> StoredAnswer | None:
        """None when this is the first request with the key, which is now taken; otherwise what the first one had.

        `request` is a digest of the whole request. Raises KeyReusedError when the first one had another.
        """
        values = {"owner": owner, "key": key, "request": request, "created": self._clock(), "run_id": run_id}
        try:
            with self._database.begin() as connection:
                connection.execute(delete(ANSWERS).where(ANSWERS.c.created < self._clock() - KEPT_SECONDS))
                connection.execute(insert(ANSWERS).values(values))
        except IntegrityError:
            return self._found(owner, key, request)
        return None

    def _found(self, owner: str, key: str, request: str) -> StoredAnswer:
        with self._database.read() as connection:
            row = connection.execute(select(ANSWERS).where(ANSWERS.c.owner == owner, ANSWERS.c.key == key)).first()
        if row is None or row.request != request:
            raise KeyReusedError(
                "Idempotency-Key", expected="a key of its own for each request", got="that of another request",
                hint="make a new key, such as a UUID",
            )  # fmt: skip
        return StoredAnswer(row.status, row.run_id, row.body)

    def finish(self, owner: str, key: str, status: int, body: Mapping[str, Any], run_id: str | None = None) -> None:
        """Keep the answer."""
        statement = update(ANSWERS).where(ANSWERS.c.owner == owner, ANSWERS.c.key == key)
        with self._database.begin() as connection:
            connection.execute(statement.values(status=status, body=dict(body), run_id=run_id))

    def forget(self, owner: str, key: str) -> None:
        """Free a key whose request was refused, so that it may be corrected and sent again."""
        with self._database.begin() as connection:
            connection.execute(delete(ANSWERS).where(ANSWERS.c.owner == owner, ANSWERS.c.key == key))
