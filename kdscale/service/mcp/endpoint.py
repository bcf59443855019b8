"""Where agents call tools: /mcp (Model Context Protocol, streamable HTTP), by the same tokens as the API."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kdscale.service.access.identity import actor_of

PATH = "/mcp"


def add_mcp(app: FastAPI) -> None:
    """Have `app` answer at /mcp, where the settings allow it and the package `mcp` is installed."""
    if app.state.settings.mcp and importlib.util.find_spec("mcp") is not None:
        app.add_route(PATH, _Endpoint(), methods=None, include_in_schema=False)  # type: ignore[arg-type]


@asynccontextmanager
async def mcp_running(app: FastAPI) -> AsyncIterator[None]:
    """What answers at /mcp, as long as the application runs."""
    if not any(getattr(route, "path", None) == PATH for route in app.routes):
        yield
        return
    from mcp.server.transport_security import TransportSecuritySettings

    from kdscale.service.mcp.tools import make_server

    server = make_server(app)
    # no sessions: a token is asked for with every request, and a service that starts anew has forgotten nothing
    server.streamable_http_app(
        stateless_http=True, json_response=True,
        max_request_body_size=app.state.settings.limits.body_bytes,
        # the application's own layers check Host and Origin
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )  # fmt: skip
    async with server.session_manager.run():
        app.state.mcp = server.session_manager
        yield


class _Endpoint:
    """The ASGI application at /mcp: nobody without a token comes as far as the protocol."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if "authorization" not in request.headers:  # a cookie would let other sites call tools
            raise HTTPException(401, "send a token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})
        actor, _ = await run_in_threadpool(actor_of, request)
        if not actor.may("read"):
            raise HTTPException(403, "this needs a token with the scope read")
        await request.app.state.mcp.handle_request(scope, receive, send)
