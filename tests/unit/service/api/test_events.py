"""Events as pages and as streams: each once, in order, from where a client was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from kdscale.service.api.streaming import broadcaster
from kdscale.service.api.streaming.broadcaster import Broadcaster, Message
from kdscale.service.api.streaming.events import written
from kdscale.service.database.events import Event
from kdscale.service.database.runs import Run
from tests.unit.service.api.conftest import Caller


class OpenStream:
    """A client of a stream, which reads message by message and leaves when it likes."""

    def __init__(self, app: FastAPI, path: str, token: str, **headers: str):
        path, _, query = path.partition("?")
        given = {"host": "localhost", "authorization": token, "accept": "text/event-stream", **headers}
        self._scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": query.encode(),
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()], "scheme": "http",
            "server": ("localhost", 80), "client": ("127.0.0.1", 1), "http_version": "1.1", "root_path": "",
        }  # fmt: skip
        self._app, self._left, self._text = app, asyncio.Event(), ""
        self._came: asyncio.Queue[Any] = asyncio.Queue()
        self.status, self.body = 0, b""

    async def __aenter__(self) -> OpenStream:
        async def receive() -> dict[str, Any]:
            await self._left.wait()
            return {"type": "http.disconnect"}

        self._task = asyncio.create_task(self._app(self._scope, receive, self._came.put))
        self.status = (await self._came.get())["status"]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left.set()
        await self._task

    async def message(self) -> dict[str, str]:
        """The next message; comments are left out."""
        while True:
            block, end, rest = self._text.partition("\n\n")
            if end:
                self._text = rest
                fields = [line.partition(": ") for line in block.split("\n")]
                if any(name == "id" for name, _, _ in fields):
                    return {name: value for name, _, value in fields}
            else:
                self._text += (await self._came.get())["body"].decode()

    async def numbers(self, count: int) -> list[int]:
        """The numbers of the next messages."""
        found = [await self.message() for _ in range(count)]
        assert all(json.loads(one["data"])["seq"] == int(one["id"]) for one in found)
        return [int(one["id"]) for one in found]


@pytest.fixture
def stream(app: FastAPI, as_: Caller) -> Callable[..., OpenStream]:
    token = as_("reader").headers["authorization"]
    app.state.broadcaster = Broadcaster(app.state.events, written, every=0.005)
    return lambda path, **headers: OpenStream(app, path, token, **headers)


def test_pages_of_events_have_a_cursor(as_: Caller, app: FastAPI, make_run: Callable[..., Run]) -> None:
    run, other = make_run(1), make_run(2)
    for number in range(5):
        app.state.events.append((run if number % 2 else other).id, "stage", {"stage": "data", "number": number})
    reader = as_("reader")
    page = reader.get(f"/v1/runs/{run.id}/events?limit=2").json()
    assert [event["type"] for event in page["items"]] == ["state", "stage"]
    rest = reader.get(f"/v1/runs/{run.id}/events", params={"after": page["next"]}).json()
    assert [event["data"]["number"] for event in rest["items"]] == [3]
    assert reader.get(f"/v1/runs/{run.id}/events", params={"after": rest["next"]}).json() == {"items": [], "next": None}
    assert len(reader.get("/v1/events").json()["items"]) == 7


@pytest.mark.parametrize("where", ["header", "query"])
def test_a_stream_goes_on_behind_the_last_event(
    app: FastAPI, make_run: Callable[..., Run], stream: Callable[..., OpenStream], where: str
) -> None:
    run, other = make_run(1), make_run(2)
    before = [app.state.events.append(run.id, "stage", {"n": n}) for n in range(3)]

    async def client() -> None:
        async with stream(f"/v1/runs/{run.id}/events") as open_:
            assert await open_.numbers(4) == [1, *before], "all of the run, and nothing of the other"
            app.state.events.append(other.id, "stage", {})
            live = app.state.events.append(run.id, "stage", {})
            assert await open_.numbers(1) == [live]
        last = str(before[1])
        path = f"/v1/runs/{run.id}/events" + (f"?after={last}" if where == "query" else "")
        async with stream(path, **({"last_event_id": last} if where == "header" else {})) as again:
            assert await again.numbers(2) == [before[2], live]

    asyncio.run(client())


def test_a_stream_of_all_begins_now(
    app: FastAPI, make_run: Callable[..., Run], stream: Callable[..., OpenStream]
) -> None:
    run = make_run(1)

    async def client() -> None:
        async with stream("/v1/events") as first, stream("/v1/events", last_event_id="999") as second:
            seq = app.state.events.append(run.id, "stage", {"text": "a\nb\r\n\u2028data: x"})
            for open_ in (first, second):  # also one with a number that the database does not have yet
                assert json.loads((await open_.message())["data"])["data"]["text"] == "a\nb\r\n\u2028data: x"
            assert seq == 2

    asyncio.run(client())


def test_all_streams_are_fed_by_one_reader(
    app: FastAPI, make_run: Callable[..., Run], stream: Callable[..., OpenStream]
) -> None:
    run, events = make_run(1), app.state.events
    reads, since = list[list[Event]](), events.since

    def counted(*arguments: Any) -> list[Event]:
        reads.append(since(*arguments))
        return reads[-1]

    events.since = counted

    async def client() -> None:
        streams = [stream("/v1/events") for _ in range(20)]
        for one in streams:
            await one.__aenter__()
        for number in (1, 2):
            reads.clear()
            seqs = [events.append(run.id, "stage", {}) for _ in range(3)]
            assert [await one.numbers(3) for one in streams] == [seqs] * 20
            # by the first ones on, every stream has looked at what was before it
            assert number == 1 or sum(map(len, reads)) == 3, "each event is read once, and not once for each stream"
        for one in streams:
            await one.__aexit__()

    asyncio.run(client())
    assert app.state.open_streams == 0


class Memory:
    """Events in a list."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, count: int) -> None:
        """That many more."""
        self.events += [Event(len(self.events) + n, "r", 0.0, "stage", {}) for n in range(1, count + 1)]

    def since(self, seq: int, run_id: str | None = None, limit: int = 500) -> list[Event]:
        """See Events."""
        return [event for event in self.events if event.seq > seq][:limit]

    def last_seq(self) -> int:
        """See Events."""
        return len(self.events)


def test_events_that_come_while_a_stream_catches_up_are_told_once() -> None:
    memory = Memory()
    memory.add(1700)

    async def client() -> list[int]:
        one, numbers = await Broadcaster(memory, written, every=0.001).listen(0), []
        async for event in one.messages():
            numbers.append(event.seq)
            if event.seq in (3, 600, 1650):
                memory.add(100)
            if event.seq == 2000:
                return numbers
        return numbers

    assert asyncio.run(client()) == list(range(1, 2001))


def test_a_listener_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster, "_MOST_WAITING", 10)
    memory = Memory()

    async def client() -> tuple[list[int], list[int]]:
        source = Broadcaster(memory, written, every=0.001)
        slow, fast = await source.listen(None), await source.listen(None)
        slow_events, fast_events = slow.messages(), fast.messages()
        numbers = []
        for _ in range(4):
            memory.add(5)
            numbers += [(await anext(fast_events)).seq for _ in range(5)]
        return [event.seq async for event in slow_events], numbers

    slow, fast = asyncio.run(client())
    assert slow == list(range(1, 21)), "what it missed is in the database"
    assert fast == list(range(1, 21))


def test_there_are_only_so_many_streams(app: FastAPI, stream: Callable[..., OpenStream]) -> None:
    app.state.open_streams = app.state.settings.limits.event_streams

    async def client() -> int:
        async with stream("/v1/events") as refused:
            return refused.status

    assert asyncio.run(client()) == 429
    assert app.state.broadcaster._listeners == set()


def test_whatever_goes_wrong_with_a_read_streams_go_on() -> None:
    memory = Memory()

    class Failing(Broadcaster):
        failed = False

        async def read(self, after: int, run_id: str | None) -> list[Message]:
            task = asyncio.current_task()
            if not self.failed and task is not None and task.get_name() == "events for listeners":
                self.failed = True
                memory.add(1)
                raise ValueError("a row that is no JSON")
            return await super().read(after, run_id)

    async def client() -> list[int]:
        source = Failing(memory, lambda _event: b"", every=0.001)
        events = (await source.listen(0)).messages()
        first = await asyncio.wait_for(anext(events), 5.0)
        memory.add(1)
        return [first.seq, (await asyncio.wait_for(anext(events), 5.0)).seq]

    assert asyncio.run(client()) == [1, 2]


@pytest.mark.parametrize("number", ["x", "-1", "1e3", "٣", "9" * 40])
def test_a_last_event_id_is_a_number(stream: Callable[..., OpenStream], number: str) -> None:
    async def client() -> int:
        async with stream("/v1/events", last_event_id=number) as refused:
            return refused.status

    assert asyncio.run(client()) == 422
