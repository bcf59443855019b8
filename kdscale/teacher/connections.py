"""The teacher service's connections: how many there may be, and how long a client may keep one waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.applications import Starlette

MOST_CONNECTIONS = 256  # a rank of a job opens two
CLIENT_SECONDS = 60.0  # for a client to send a whole request, or to take the next bytes of an answer
_CHECKS = 20  # within CLIENT_SECONDS


def make_server(app: Starlette) -> uvicorn.Server:
    """A server for `app` that closes connections which are too many, idle or stuck."""
    return uvicorn.Server(
        uvicorn.Config(app, http=_Connection, ws="none", log_level="warning", timeout_graceful_shutdown=30)
    )


class _Connection(H11Protocol):
    """One client's connection. uvicorn itself waits without end for a request, its body and a reader of the answer."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept the connection, unless there are too many already."""
        super().connection_made(transport)
        self._waiting_since, self._unsent_bytes = self.loop.time(), 0
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _check_later(self) -> None:
        self._timer = self.loop.call_later(CLIENT_SECONDS / _CHECKS, self._check)

    def _check(self) -> None:
        """Close the connection when its client has kept it waiting for too long."""
        cycle, unsent_bytes = self.cycle, self.transport.get_write_buffer_size()
        computing = cycle is not None and not cycle.more_body and not cycle.response_complete
        if (computing and not unsent_bytes) or unsent_bytes != self._unsent_bytes:
            self._waiting_since, self._unsent_bytes = self.loop.time(), unsent_bytes
        if self.loop.time() - self._waiting_since > CLIENT_SECONDS:
            self.transport.abort()
        else:
            self._check_later()
