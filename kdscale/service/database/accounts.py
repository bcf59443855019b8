"""Tokens, of which only a hash is kept, and the log of who did what."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select, update

from kdscale.service.database.connection import Database
from kdscale.service.database.schema import AUDIT, TOKENS

PREFIX = "kds_"  # by which people and scanners of secrets know a token
_USED_EVERY = 60.0  # seconds between two writes of a token's last use


@dataclass(frozen=True)
class Token:
    """A token without its secret."""

    id: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    used: float | None

    def is_valid(self, now: float) -> bool:
        """Whether it opens anything at this time."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True)
class AuditEntry:
    """Who did what, when and from where."""

    seq: int
    time: float
    actor: str
    action: str
    run_id: str | None
    detail: dict[str, Any]
    address: str


class Accounts:
    """Tokens and the audit log of a database. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database, self._clock = database, clock

    def new_token(
        self, name: str, owner: str, scopes: Collection[str], expires: float | None = None
    ) -> tuple[Token, str]:
        """A new token, and its secret, which is nowhere else."""
        secret = PREFIX + secrets.token_urlsafe(32)
        values = {
            "id": secrets.token_hex(8), "name": name, "owner": owner, "digest": _digest(secret),
            "scopes": sorted(scopes), "created": self._clock(), "expires": expires,
        }  # fmt: skip
        with self._database.begin() as connection:
            return _token(connection.execute(insert(TOKENS).values(values).returning(TOKENS)).one()), secret

    def by_secret(self, secret: str) -> Token | None:
        """The valid token of this secret, and note that it was used."""
        token = self._one(TOKENS.c.digest == _digest(secret))
        now = self._clock()
        if token is None or not token.is_valid(now):
            return None
        if token.used is None or now - token.used >= _USED_EVERY:
            with self._database.begin() as connection:
                connection.execute(update(TOKENS).where(TOKENS.c.id == token.id).values(used=now))
        return token

    def by_id(self, token_id: str) -> Token | None:
        """The valid token of this id: for a cookie, which names it."""
        token = self._one(TOKENS.c.id == token_id)
        return token if token is not None and token.is_valid(self._clock()) else None

    def revoke(self, token_id: str) -> bool:
        """Make a token worthless; False when there is none of this id that is worth anything."""
        with self._database.begin() as connection:
            statement = update(TOKENS).where(TOKENS.c.id == token_id, TOKENS.c.revoked.is_(None))
            return connection.execute(statement.values(revoked=self._clock())).rowcount > 0

    def tokens(self) -> list[Token]:
        """Every token, the oldest first."""
        with self._database.read() as connection:
            return [_token(row) for row in connection.execute(select(TOKENS).order_by(TOKENS.c.created, TOKENS.c.id))]

    def audit(
        self, actor: str, action: str, run_id: str | None = None, detail: Mapping[str, Any] | None = None,
        address: str = "",
    ) -> None:  # fmt: skip
        """Write down who did what."""
        values = {
            "time": self._clock(), "actor": actor, "action": action, "run_id": run_id, "detail": dict(detail or {}),
            "address": address,
        }  # fmt: skip
        with self._database.begin() as connection:
            connection.execute(insert(AUDIT).values(values))

    def audit_log(self, before: int | None = None, limit: int = 100) -> list[AuditEntry]:
        """What was done, the latest first, before number `before`."""
        query = select(AUDIT).order_by(AUDIT.c.seq.desc()).limit(max(1, min(limit, 1000)))
        if before is not None:
            query = query.where(AUDIT.c.seq < before)
        with self._database.read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(query)]

    def _one(self, condition: Any) -> Token | None:
        with self._database.read() as connection:
            row = connection.execute(select(TOKENS).where(condition)).first()
        return None if row is None else _token(row)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _token(row: Row[Any]) -> Token:
    fields = {name: value for name, value in row._mapping.items() if name != "digest"}
    return Token(**{**fields, "scopes": tuple(row.scopes)})
