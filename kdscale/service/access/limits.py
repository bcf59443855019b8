"""What one client and all of them together may use: size of a request, its time, requests a minute, and at once.

Pure ASGI, around everything else, so that no thread waits for a slow client.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdscale.service.access.buckets import Buckets
from kdscale.service.access.identity import address_of
from kdscale.service.problems import Problem
from kdscale.service.settings import ServiceSettings

_MOST_PATH_BYTES = 4096
_STREAM = b"text/event-stream"
_ADDRESS_SHARE = 10.0  # an address may ask so many times as often as one token: several people may share it


class LimitsMiddleware:
    """Refuses what is too much: 408, 413, 414, 429, 431, 503.

    Event streams, which last long, are counted apart from other requests.
    """

    stream_seconds = 900.0  # of one event stream: a token that was revoked reads no longer than this

    def __init__(self, app: ASGIApp, settings: ServiceSettings, clock: Callable[[], float] = time.monotonic):
        self._app, self._limits = app, settings.limits
        rate = self._limits.requests_per_minute
        self._clients, self._addresses = Buckets(rate, clock=clock), Buckets(_ADDRESS_SHARE * rate, clock=clock)
        self._open = {False: 0, True: 0}  # requests that are being answered: others, event streams
        self._most = {False: self._limits.concurrent_requests, True: self._limits.event_streams}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = _wrong_size(scope, self._limits.header_bytes, self._limits.body_bytes) or self._too_often(scope)
        if problem is None and _has_body(scope):
            body = await self._body(receive)
            if body is None:
                return
            problem, receive = (body, receive) if isinstance(body, Problem) else (None, _replayed(body, receive))
        stream = _STREAM in _header(scope, b"accept")
        if problem is None and self._open[stream] >= self._most[stream]:
            problem = Problem(503, "busy", "too many requests at once", headers={"Retry-After": "2"})
        if problem is not None:
            problem.headers["Connection"] = "close"  # more of the request may be under way
            await problem.response()(scope, receive, send)
            return
        self._open[stream] += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._open[stream] -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, and end an event stream after a while: its client comes back, if it still may."""
        limit = asyncio.timeout(None)

        async def limiting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and _STREAM in _header(message, b"content-type"):
                limit.reschedule(asyncio.get_running_loop().time() + self.stream_seconds)
            await send(message)

        try:
            async with limit:
                await self._app(scope, receive, limiting_send)
        except TimeoutError:
            if not limit.expired():
                raise
            await send({"type": "http.response.body", "body": b""})

    async def _body(self, receive: Receive) -> bytes | Problem | None:
        """The body, or what is wrong with it; None when the client has gone."""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _whole_body(receive, self._limits.body_bytes)
        except TimeoutError:
            return Problem(408, "slow", f"a body must have come within {self._limits.body_seconds:g} seconds")
        except ClientDisconnect:
            return None
        return _too_large(self._limits.body_bytes) if body is None else body

    def _too_often(self, scope: Scope) -> Problem | None:
        wait = self._wait(scope)
        return Problem(429, "limit", "too many requests", headers={"Retry-After": str(wait)}) if wait else None

    def _wait(self, scope: Scope) -> int:
        """Seconds until the client may ask again; one with a token or a cookie has a bucket of its own."""
        address = address_of(HTTPConnection(scope))
        credentials = _header(scope, b"authorization") or _header(scope, b"cookie")
        client = hashlib.sha256(credentials).hexdigest() if credentials else address
        return self._addresses.take(address) or self._clients.take(client)


def _wrong_size(scope: Scope, most_header: int, most_body: int) -> Problem | None:
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _MOST_PATH_BYTES:
        return Problem(414, "too-large", f"the address is longer than {_MOST_PATH_BYTES:,} bytes")
    if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > most_header:
        return Problem(431, "too-large", f"the headers are larger than {most_header:,} bytes")
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if any(not (value.isascii() and value.isdigit() and len(value) < 16) for value in lengths) or len(lengths) > 1:
        return Problem(400, "request", "Content-Length: expected one number")
    if lengths and any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        return Problem(400, "request", "Content-Length and Transfer-Encoding do not go together")
    return _too_large(most_body) if lengths and int(lengths[0]) > most_body else None


def _too_large(most: int) -> Problem:
    return Problem(413, "too-large", f"the body is larger than {most:,} bytes")


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _whole_body(receive: Receive, most: int) -> bytes | None:
    """The body; None when it is larger than `most`. Raises ClientDisconnect when it ends before its end."""
    blocks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        blocks.append(message.get("body", b""))
        size, more = size + len(blocks[-1]), message.get("more_body", False)
        if size > most:
            return None
    return b"".join(blocks)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then what really comes: the end of the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header(message: Scope | Message, name: bytes) -> bytes:
    return b", ".join(value for key, value in message["headers"] if key == name)
