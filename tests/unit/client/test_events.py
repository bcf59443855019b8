"""Streams of events: read in any pieces, taken up again behind the last event, ended with the run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.client import Client, UnreachableError
from kdscale.client import events as events_module
from kdscale.client.events import Message, messages
from kdscale.errors import ServiceError
from tests.unit.client.conftest import RUN_ID, Clock, run_json


def event(seq: int, type_: str = "state", **data: object) -> bytes:
    value = {"seq": seq, "run_id": RUN_ID, "time": "2026-11-30T22:00:00Z", "type": type_, "data": data}
    return f"id: {seq}\nevent: {type_}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class Breaking(httpx.SyncByteStream):
    """A stream that breaks off after its bytes, or ends."""

    def __init__(self, *chunks: bytes, breaks: bool = True):
        self._chunks, self._breaks = chunks, breaks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        if self._breaks:
            raise httpx.ReadError("the connection was lost")


_STREAM = (
    b"\xef\xbb\xbf: hello\r\n\r\nid: 1\rdata: a\rdata:b\r\r"
    b"event: state\r\nid: 2\r\ndata: {\"x\": \"\xe2\x80\xa8\xc3\xa9\"}\r\n\r\n"
    b"data\n\nretry: 5\nid: 3\n\nid: x\x00y\nevent: e\ndata:  c\n\ndata: cut off"
)  # fmt: skip
_MESSAGES = [
    Message("1", "message", "a\nb"), Message("2", "state", '{"x": "\u2028é"}'), Message("2", "message", ""),
    Message("3", "e", " c"),
]  # fmt: skip


@given(st.lists(st.integers(0, len(_STREAM)), max_size=12))
def test_messages_are_the_same_in_whatever_pieces_they_come(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(_STREAM)]
    pieces = [_STREAM[start:end] for start, end in itertools.pairwise(places)]
    assert list(messages(pieces)) == _MESSAGES


@pytest.mark.parametrize("pieces", [[b"data: " + b"x" * 90] * 2, [b"data: " + b"x" * 60 + b"\n"] * 2])
def test_a_message_without_end_is_given_up(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MOST_BYTES", 100)
    with pytest.raises(ServiceError, match="at most 100 bytes"):
        list(messages(pieces))


def test_a_stream_that_breaks_off_is_taken_up_behind_the_last_event(client_of: Callable[..., Client]) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=run_json(state="succeeded"))
        asked.append(request.headers["last-event-id"])
        streams = {
            "0": Breaking(event(4, state="running"), event(7, "stage", name="prune")[:-5]),
            "4": Breaking(event(4, state="running"), event(7, "stage", name="prune")),  # says the last one again
            "7": Breaking(b": nothing new\n\n", event(9, state="succeeded"), event(10, "note")),
        }
        return httpx.Response(200, stream=streams[asked[-1]])

    found = list(client_of(answer).events(RUN_ID))
    assert [(item.seq, item.type) for item in found] == [(4, "state"), (7, "stage"), (9, "state")]
    assert asked == ["0", "4", "7"]


def test_an_end_that_somebody_undid_does_not_end_the_events(client_of: Callable[..., Client]) -> None:
    states = iter(["running", "succeeded"])
    stream = event(1, state="failed") + event(2, state="queued") + event(3, state="succeeded")

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, content=stream)
        return httpx.Response(200, json=run_json(state=next(states)))

    assert [item.seq for item in client_of(answer).events(RUN_ID)] == [1, 2, 3]


def test_events_begin_where_they_are_asked_for(client_of: Callable[..., Client]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=run_json(state="cancelled"))
        assert request.headers["accept"] == "text/event-stream"
        assert request.headers["last-event-id"] == "41"
        return httpx.Response(200, content=event(42, state="cancelled"))

    assert [item.seq for item in client_of(answer).events(RUN_ID, after=41)] == [42]


def test_a_stream_that_the_service_ends_is_asked_for_again_until_the_run_has_ended(
    client_of: Callable[..., Client], clock: Clock
) -> None:
    states = ["running", "succeeded"]

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=run_json(state=states.pop(0)))
        if "text/event-stream" in request.headers["accept"]:
            return httpx.Response(200, content=b": stopping\n\n")
        return httpx.Response(200, json={"items": [json.loads(event(5).split(b"data: ")[1])], "next": None})

    assert [item.seq for item in client_of(answer).events(RUN_ID)] == [5]
    assert states == []
    assert len(clock.slept) == 1


def test_a_service_that_stays_away_ends_the_waiting(client_of: Callable[..., Client], clock: Clock) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Breaking())

    with pytest.raises(UnreachableError):
        list(client_of(answer, seconds=30.0).events(RUN_ID))
    assert clock.now <= 30.0


def test_a_stream_that_was_idle_for_long_is_taken_up_again(client_of: Callable[..., Client], clock: Clock) -> None:
    streams = 0

    def idle() -> Iterator[bytes]:
        clock.now += 3600.0
        yield b": still here\n\n"
        raise httpx.ReadError("the connection was lost")

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal streams
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=run_json(state="succeeded"))
        streams += 1
        return httpx.Response(200, content=idle() if streams == 1 else event(1, state="succeeded"))

    assert [item.seq for item in client_of(answer).events(RUN_ID)] == [1]


def test_waiting_tells_how_the_run_is_and_ends_with_it(client_of: Callable[..., Client], clock: Clock) -> None:
    states = iter(["queued", "running", "paused", "running", "succeeded"])
    told: list[str] = []
    client = client_of(lambda _request: httpx.Response(200, json=run_json(state=next(states))))
    assert client.wait(RUN_ID, told=lambda run: told.append(run.state)).state == "succeeded"
    assert told == ["queued", "running", "paused", "running", "succeeded"]
    assert clock.slept == [2.0] * 4


def test_a_log_is_followed_over_connections_to_its_end(client_of: Callable[..., Client]) -> None:
    asked: list[tuple[str | None, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.headers.get("last-event-id"), request.url.params["tail"]))
        if asked[-1][0] is None:
            return httpx.Response(200, stream=Breaking(b"id: 12\ndata: one\ndata: two\n\nid: 15\ndata: cut"))
        return httpx.Response(200, content=b"id: 18\ndata: three\n\nid: 18\nevent: end\ndata:\n\n")

    assert list(client_of(answer).logs(RUN_ID, tail=5, follow=True)) == ["one", "two", "three"]
    assert asked == [(None, "5"), ("12", "5")]


def test_a_log_whose_end_was_lost_on_the_way_ends_too(client_of: Callable[..., Client]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "last-event-id" in request.headers:
            return httpx.Response(204)
        return httpx.Response(200, stream=Breaking(b"id: 12\ndata: one\n\n"))

    assert list(client_of(answer).logs(RUN_ID, follow=True)) == ["one"]


def test_the_tail_of_a_log_is_lines(client_of: Callable[..., Client]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert dict(request.url.params) == {"tail": "2", "rank": "0"}
        return httpx.Response(200, text="one\ntwo\n")

    assert list(client_of(answer).logs(RUN_ID, tail=2, rank=0)) == ["one", "two"]
