"""The table of notices: written in the transaction that finds them, kept until they are delivered or given up.

A notice is taken with a lease: its next try is set some minutes ahead before anything is sent. So a service that is
killed in the middle sends it again later, under the same id, and two services never send it at the same time.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from kdscale.files import sha256_json
from kdscale.service.database.connection import Database
from kdscale.service.database.schema import CURSORS, NOTICES
from kdscale.service.notices.occasions import OCCASIONS, Notice, NoticeKind, body_of, subject_of
from kdscale.service.notices.recipients import Recipient

STATES = ("waiting", "sent", "failed")
LEASE_SECONDS = 600.0
TRIES = 9
_FIRST_WAIT, _LONGEST_WAIT = 30.0, 6 * 3600.0
_CURSOR = "notices"


@dataclass(frozen=True)
class Letter:
    """One notice to one recipient, taken for a try; `tries` counts it."""

    id: str
    run_id: str
    kind: NoticeKind
    recipient: Recipient
    subject: str
    body: dict[str, Any]
    tries: int


class Outbox:
    """Notices of a database that wait, were sent, or were given up."""

    def __init__(self, database: Database):
        self._database = database

    def add(
        self, connection: Connection, notice: Notice, recipients: Collection[Recipient], service_url: str | None
    ) -> int:
        """Write a notice for each of its recipients who does not have it yet; returns how many were new."""
        added = 0
        for recipient in recipients:
            key = sha256_json([notice.run.id, notice.topic, recipient.channel, recipient.address])
            if self._is_known(connection, notice, recipient, key):
                continue
            row = {
                "id": f"notice-{secrets.token_hex(12)}", "key": key, "topic": notice.topic, "run_id": notice.run.id,
                "kind": notice.kind, "channel": recipient.channel, "address": recipient.address,
                "subject": subject_of(notice), "body": body_of(notice, service_url), "created": notice.time,
                "due": notice.time, "tries": 0, "state": "waiting", "problem": "",
            }  # fmt: skip
            connection.execute(insert(NOTICES).values(row))
            added += 1
        return added

    @staticmethod
    def _is_known(connection: Connection, notice: Notice, recipient: Recipient, key: str) -> bool:
        if connection.execute(select(NOTICES.c.id).where(NOTICES.c.key == key)).first() is not None:
            return True
        pause = OCCASIONS[notice.kind].at_most_every
        if not pause:
            return False
        recent = select(NOTICES.c.id).where(
            NOTICES.c.run_id == notice.run.id, NOTICES.c.kind == notice.kind, NOTICES.c.address == recipient.address,
            NOTICES.c.created > notice.time - pause,
        )  # fmt: skip
        return connection.execute(recent.limit(1)).first() is not None

    def take(self, now: float, most: int = 20) -> list[Letter]:
        """The notices that are due, each taken for one try."""
        due = (NOTICES.c.state == "waiting", NOTICES.c.due <= now)
        chosen = select(NOTICES.c.id).where(*due).order_by(NOTICES.c.due, NOTICES.c.id).limit(most)
        if not self._database.is_sqlite:
            chosen = chosen.with_for_update(skip_locked=True)
        with self._database.begin() as connection:
            ids = list(connection.execute(chosen).scalars())
            if not ids:
                return []
            taken = connection.execute(
                update(NOTICES)
                .where(NOTICES.c.id.in_(ids), *due)
                .values(due=now + LEASE_SECONDS, tries=NOTICES.c.tries + 1)
                .returning(NOTICES)
            )
            return sorted(map(_letter, taken), key=lambda letter: ids.index(letter.id))

    def sent(self, letter: Letter, now: float) -> None:
        """A notice arrived."""
        self._finish(letter, state="sent", sent=now, problem="")

    def put_off(self, letter: Letter, seconds: float) -> None:
        """Give back a notice that was not tried; it is due again in so many seconds from when it was taken."""
        self._finish(letter, due=NOTICES.c.due - LEASE_SECONDS + seconds, tries=NOTICES.c.tries - 1)

    def failed(self, letter: Letter, now: float, problem: str, final: bool) -> bool:
        """A try failed: the next is later, or there is none. Returns whether the notice was given up."""
        given_up = final or letter.tries >= TRIES
        wait = min(_FIRST_WAIT * 4.0 ** (letter.tries - 1), _LONGEST_WAIT)
        self._finish(letter, state="failed" if given_up else "waiting", due=now + wait, problem=problem[:500])
        return given_up

    def _finish(self, letter: Letter, **values: Any) -> None:
        with self._database.begin() as connection:
            connection.execute(
                # only the try that this letter is: after its lease another one may have been made
                update(NOTICES)
                .where(NOTICES.c.id == letter.id, NOTICES.c.state == "waiting", NOTICES.c.tries == letter.tries)
                .values(**values)
            )

    def counts(self) -> dict[str, int]:
        """How many notices wait, were sent and were given up."""
        query = select(NOTICES.c.state, func.count()).group_by(NOTICES.c.state)
        with self._database.read() as connection:
            return {str(row[0]): int(row[1]) for row in connection.execute(query)}

    def told(self, run_id: str, topic: str) -> float | None:
        """When the first recipient got the notice of this topic; None before that."""
        query = select(func.min(NOTICES.c.sent)).where(
            NOTICES.c.run_id == run_id, NOTICES.c.topic == topic, NOTICES.c.state == "sent"
        )
        with self._database.read() as connection:
            return connection.execute(query).scalar()

    def forget(self, before: float) -> int:
        """Delete what was sent or given up before a time; returns how many."""
        statement = delete(NOTICES).where(NOTICES.c.state != "waiting", NOTICES.c.due < before)
        with self._database.begin() as connection:
            return connection.execute(statement).rowcount


def cursor(connection: Connection, is_sqlite: bool) -> int | None:
    """The number of the last event that was looked at, locked for this transaction; None before the first time."""
    query = select(CURSORS.c.seq).where(CURSORS.c.name == _CURSOR)
    return connection.execute(query if is_sqlite else query.with_for_update()).scalar()


def set_cursor(connection: Connection, seq: int) -> None:
    """Note up to which event all notices are written."""
    done = connection.execute(update(CURSORS).where(CURSORS.c.name == _CURSOR).values(seq=seq))
    if done.rowcount == 0:
        connection.execute(insert(CURSORS).values(name=_CURSOR, seq=seq))


def _letter(row: Row[Any]) -> Letter:
    return Letter(row.id, row.run_id, row.kind, Recipient(row.channel, row.address), row.subject, row.body, row.tries)
