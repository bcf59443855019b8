"""Around every request: its id, its figures and its line in the log. Pure ASGI, as other kinds break streams."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdscale.service.operations.metrics import ServiceMetrics
from kdscale.service.problems import Problem
from kdscale.service.request_ids import CURRENT, HEADER, chosen_id, request_id

_log = logging.getLogger("kdscale.service.requests")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds by supervisors: in the log only when something is wrong.
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
OTHER = "other"  # in the place of whatever a stranger may write: it would be a new series each time


class RequestsMiddleware:
    """The outermost layer. Its time of a request ends where the answer begins: a stream may go on for hours."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, clock: Callable[[], float] = time.monotonic):
        self._app, self._metrics, self._clock = app, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chosen = chosen_id(Headers(scope=scope).get(HEADER, ""))
        token = CURRENT.set(chosen)
        begun, answered = self._clock(), False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = chosen
                answered = True
                self._note(scope, message["status"], self._clock() - begun)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if not answered:  # an error in a layer: the framework answers 500, and logs it
                self._note(scope, 500, self._clock() - begun)
            raise
        finally:
            CURRENT.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else OTHER
        route = route_of(scope)
        self._metrics.request(method, route, status, seconds)
        level = logging.DEBUG if status < 400 and scope["path"] in _PROBES else logging.INFO
        if _log.isEnabledFor(level):
            client = (scope.get("client") or ("",))[0]
            _log.log(
                level, "%s %s %d in %.1f ms from %s", method, scope["path"][:500], status, 1000 * seconds, client,
                extra={"fields": {"method": method, "route": route, "status": status, "seconds": round(seconds, 6),
                                  "client": client}},
            )  # fmt: skip


class BugsMiddleware:
    """The innermost layer: makes an exception that nobody expected a problem, which then passes all other layers.

    The framework's own handler for these stands outside of every layer: its answers would have no headers of ours.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            if scope["type"] != "http" or begun:  # a part was sent already: the server cuts the connection off
                raise
            _log.exception("%s %s failed", scope["method"], scope["path"][:500])
            number = request_id()
            detail = f"the service failed; its log has more under {number}"
            problem = Problem(500, "service", detail, hint="tell whoever runs this service", incident=number)
            await problem.response()(scope, receive, send)


def route_of(scope: MutableMapping[str, Any]) -> str:
    """The pattern of the route that answers (`/v1/runs/{run_id}`): of a request that met none, `other`."""
    route = scope.get("route")
    path = getattr(route, "path_format", None) or getattr(route, "path", None)
    return str(path) if path else OTHER


def install_innermost(app: FastAPI) -> None:
    """Add the layer that answers for bugs."""
    app.add_middleware(BugsMiddleware)


def install_outermost(app: FastAPI) -> None:
    """Add the layer of ids and figures, with its metrics in `app.state.metrics`."""
    state = app.state
    state.metrics = ServiceMetrics(state)
    if state.scheduler is not None:
        state.scheduler.on_step = state.metrics.scheduler_step
    app.add_middleware(RequestsMiddleware, metrics=state.metrics)
