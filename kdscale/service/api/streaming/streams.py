"""Streams of server-sent events: kept alive, counted, and ended for a client that does not read them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kdscale.service.problems import Problem

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_SECONDS, _SEND_SECONDS = 15, 20.0
_LOG = logging.getLogger(__name__)


class StreamResponse(EventSourceResponse):
    """Sends what `messages` gives until it ends or the client leaves; `at_end` is called however it ends."""

    def __init__(
        self, state: State, messages: AsyncIterator[ServerSentEvent | bytes], at_end: Callable[[], None] | None = None
    ):
        """Raises a Problem when too many streams are open."""
        self._state, self._at_end = state, at_end
        most, self._state.open_streams = state.settings.limits.event_streams, getattr(state, "open_streams", 0)
        if self._state.open_streams >= most:
            self._leave()
            raise Problem(
                429, "limit", "too many streams are open", expected=f"at most {most}", headers={"Retry-After": "10"}
            )
        super().__init__(
            messages, ping=KEEP_ALIVE_SECONDS, send_timeout=_SEND_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="still here", sep="\n"),
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        self._state.open_streams += 1
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _LOG.info("a stream was ended: its client took nothing for %g s", _SEND_SECONDS)
        finally:
            self._state.open_streams -= 1
            self._leave()

    def _leave(self) -> None:
        if self._at_end is not None:
            self._at_end()


def message(data: str, number: int | str, event: str | None = None) -> ServerSentEvent:
    """One message. `number` is what the client sends as Last-Event-ID when it connects again."""
    return ServerSentEvent(data=data, id=str(number), event=event, sep="\n")


def wants_stream(request: Request) -> bool:
    """Whether a client asks for a stream and not for JSON."""
    return MEDIA_TYPE in request.headers.get("accept", "")


def last_event_id(request: Request) -> int | None:
    """The number of the last message that the client had; None when it is a new one. Raises a Problem."""
    text = request.headers.get("last-event-id", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise Problem(422, "request", "Last-Event-ID", expected="the id of a message of this stream", got=text[:60])
    return int(text)


STREAM_DESCRIPTION: dict[str, Any] = {
    "responses": {"200": {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}},
}
