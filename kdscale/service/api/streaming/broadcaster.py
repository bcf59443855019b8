"""New events for all who listen, of one reader: it asks the database twice a second while anybody does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

from starlette.concurrency import run_in_threadpool

from kdscale.service.database.events import Event

EVERY_SECONDS = 0.5
_PAGE, _MOST_WAITING = 500, 1000  # events that are read at once, and that may wait for one slow listener
_LOG = logging.getLogger(__name__)


class EventReader(Protocol):
    """What is asked of the database."""

    def since(self, seq: int, run_id: str | None = None, limit: int = 500) -> list[Event]:
        """Events behind number `seq`."""

    def last_seq(self) -> int:
        """The number of the last event."""


class Message(NamedTuple):
    """An event as it is sent, the same to all."""

    seq: int
    run_id: str
    content: bytes


class Listener:
    """One stream: what came before and then what comes, each event once and in order.

    One that takes its events too slowly is dropped: the iterator ends, and the client connects again and says which
    event was its last.
    """

    def __init__(self, broadcaster: Broadcaster, after: int, run_id: str | None):
        self._broadcaster, self._last, self.run_id = broadcaster, after, run_id
        self._queue: asyncio.Queue[Message] = asyncio.Queue(_MOST_WAITING)
        self._dropped = False

    def offer(self, message: Message) -> None:
        """Hand over a new event."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._dropped = True
            self._broadcaster.leave(self)

    async def messages(self) -> AsyncIterator[Message]:
        """The events; without an end, unless the listener is dropped."""
        while True:
            # what is committed from here on is offered, too: nothing is missed between this and the queue
            page = await self._broadcaster.read(self._last, self.run_id)
            for message in page:
                self._last = message.seq
                yield message
            if len(page) < _PAGE:
                break
        while not (self._dropped and self._queue.empty()):
            message = await self._queue.get()
            if message.seq > self._last:
                self._last = message.seq
                yield message


class Broadcaster:
    """Reads new events once for all listeners, and writes each once with `write`. It belongs to one event loop."""

    def __init__(self, events: EventReader, write: Callable[[Event], bytes], every: float = EVERY_SECONDS):
        self._events, self._write, self._every = events, write, every
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._seq = 0

    async def listen(self, after: int | None, run_id: str | None = None) -> Listener:
        """A listener to what follows event `after`; None: to what happens from now on. It must `leave` at the end.

        A number that no event has yet counts as the last one: the database may have been made anew.
        """
        async with self._starting:
            last = await run_in_threadpool(self._events.last_seq)
            idle = self._task is None or self._task.done()
            self._seq = last if idle else self._seq
            listener = Listener(self, last if after is None else min(after, last), run_id)
            self._listeners.add(listener)
            if idle:
                self._task = asyncio.create_task(self._pump(), name="events for listeners")
        return listener

    def leave(self, listener: Listener) -> None:
        """Forget a listener."""
        self._listeners.discard(listener)

    async def read(self, after: int, run_id: str | None) -> list[Message]:
        """Events that are in the database already."""
        found = await run_in_threadpool(self._events.since, after, run_id, _PAGE)
        return [Message(event.seq, event.run_id, self._write(event)) for event in found]

    async def _pump(self) -> None:
        while self._listeners:
            try:
                messages = await self.read(self._seq, None)
            except Exception:  # noqa: BLE001 (whatever it was: without this task all who listen would wait for ever)
                _LOG.exception("events cannot be read; streams wait")
                messages = []
            for message in messages:
                self._seq = message.seq
                for listener in [one for one in self._listeners if one.run_id in (None, message.run_id)]:
                    listener.offer(message)
            if len(messages) < _PAGE:
                await asyncio.sleep(self._every)
