"""Who is asking: the bearer of a token, or somebody who signed in with one. Every route names the scope it needs.

    def cancel(run_id: str, actor: Annotated[Actor, Depends(require("run"))]) -> ...

Tokens are found by their SHA-256, of which the database has nothing else: the time that takes says nothing about them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request

from kdscale.service.access.buckets import Buckets
from kdscale.service.access.sessions import SAFE_METHODS, Session, check_csrf, sessions_of
from kdscale.service.database.accounts import Accounts, Token

Scope = Literal["read", "run", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "run", "admin")  # each may what those before it may
_LONGEST_ADDRESS = 100  # characters: a proxy may pass on anything
_ASK = {"WWW-Authenticate": 'Bearer realm="kdscale"'}
# Only for the OpenAPI description; actor_of reads the header itself, to refuse two of them.
_BEARER = HTTPBearer(auto_error=False, description="A token that `kdscale token create` printed.")
_Header = Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]


@dataclass(frozen=True)
class Actor:
    """Whoever makes a request. `how`: by the token itself, or by the cookie of a sign-in."""

    owner: str
    scopes: Collection[str]
    token_id: str
    how: Literal["token", "cookie"] = "token"
    address: str = ""

    def may(self, scope: Scope) -> bool:
        """Whether one of its scopes is this one or a wider one."""
        return any(wide in self.scopes for wide in SCOPES[SCOPES.index(scope) :])

    def may_change(self, owner: str) -> bool:
        """Whether it may stop, pause or change a run of this owner: its own, or everybody's with the scope admin."""
        return self.may("admin") or (self.may("run") and self.owner == owner)

    @property
    def is_admin(self) -> bool:
        """Whether it may everything."""
        return self.may("admin")


@cache
def require(scope: Scope) -> Callable[..., Awaitable[Actor]]:
    """The dependency of a route: gives the Actor, or answers 401 (nobody), 403 (scope, cross-site), 429 (guessing)."""

    async def actor(request: Request, _: _Header) -> Actor:
        found, session = await run_in_threadpool(actor_of, request)
        request.state.actor = found  # for the audit log also where it is refused
        if not found.may(scope):
            headers = {"WWW-Authenticate": f'Bearer realm="kdscale", error="insufficient_scope", scope="{scope}"'}
            raise HTTPException(403, f"this needs a token with the scope {scope}", headers)
        if session is not None and request.method not in SAFE_METHODS:
            await check_csrf(request, sessions_of(request), session)
        return found

    actor.scope = scope  # type: ignore[attr-defined]
    return actor


def actor_of(request: Request) -> tuple[Actor, Session | None]:
    """Who is asking, and the session where a cookie says it. Raises HTTPException (401, 429)."""
    accounts: Accounts = request.app.state.accounts
    given = request.headers.getlist("authorization")
    if given:
        return _actor(_token_of(request, accounts, given), "token", request), None
    session = sessions_of(request).of(request)
    token = accounts.by_id(session.token_id) if session is not None else None
    if session is None or token is None:
        raise HTTPException(401, "send a token as Authorization: Bearer, or sign in", _ASK)
    return _actor(token, "cookie", request), session


def _token_of(request: Request, accounts: Accounts, headers: list[str]) -> Token:
    scheme, _, secret = headers[0].partition(" ")
    token = accounts.by_secret(secret.strip()) if len(headers) == 1 and scheme.lower() == "bearer" else None
    if token is not None:
        return token
    if wait := failed_sign_ins(request).take(address_of(request)):
        raise HTTPException(429, "too many tokens that open nothing", {"Retry-After": str(wait)})
    raise HTTPException(401, "this token opens nothing: it was revoked, it ended, or it never was one", _ASK)


def _actor(token: Token, how: Literal["token", "cookie"], request: Request) -> Actor:
    return Actor(token.owner, token.scopes, token.id, how, address_of(request))


def address_of(connection: HTTPConnection) -> str:
    """The address of the client, as a trusted proxy says it where there is one."""
    return connection.client.host[:_LONGEST_ADDRESS] if connection.client is not None else ""


def failed_sign_ins(request: Request) -> Buckets:
    """How many wrong tokens an address may still try: those of the request's service."""
    state = request.app.state
    if getattr(state, "failed_sign_ins", None) is None:
        per_minute = state.settings.limits.failed_sign_ins_per_minute
        state.failed_sign_ins = Buckets(per_minute, burst=per_minute)
    found: Buckets = state.failed_sign_ins
    return found
