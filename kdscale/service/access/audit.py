"""Who did what: every request that changes something leaves a line in the database, whatever route it took."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdscale.service.access.identity import Actor
from kdscale.service.access.sessions import SAFE_METHODS
from kdscale.service.ids import RUN_ID, is_run_id


class AuditMiddleware:
    """Writes down the requests of known actors that may change something, before they are answered.

    The action is the method and the route (`POST /v1/runs/{run_id}/cancel`); the detail has the status, also of what
    was refused. A route may add to `request.state.audit`, a dict: the names that it changed.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, and write it down."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        state["audit"], written = {}, False

        async def noting_send(message: Message) -> None:
            nonlocal written
            if message["type"] == "http.response.start" and not written:
                written = True
                location = dict(message["headers"]).get(b"location", b"").decode("latin-1")
                await run_in_threadpool(_write, scope, message["status"], location)
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            if not written:
                await run_in_threadpool(_write, scope, 500, "")


def _write(scope: Scope, status: int, location: str) -> None:
    actor = scope["state"].get("actor")
    if not isinstance(actor, Actor):
        return
    route = getattr(scope.get("route"), "path", scope["path"])
    named = scope.get("path_params", {}).get("run_id", "")
    found = RUN_ID.search(location)
    run_id = named if is_run_id(named) else found[0] if found else None
    detail = {**scope["state"]["audit"], "status": status, "token_id": actor.token_id, "by": actor.how}
    action = f"{scope['method']} {route}"[:60]
    scope["app"].state.accounts.audit(actor.owner, action, run_id, detail, actor.address)
