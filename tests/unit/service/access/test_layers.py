"""Limits, headers and the audit log around an app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Scope

from kdscale.service.access.buckets import Buckets
from kdscale.service.access.headers import DOCUMENT_HEADERS, PAGE_POLICY
from kdscale.service.access.layers import add_access_layers
from kdscale.service.access.limits import LimitsMiddleware
from kdscale.service.access.sessions import Sessions, secret_key, set_cookie
from kdscale.service.settings import LimitSettings, ServiceSettings

Bearer = Callable[..., dict[str, str]]


def test_buckets_fill_again(clock: Any) -> None:
    buckets = Buckets(60, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 1, 1]
    assert buckets.take("b") == 0
    assert buckets.wait("a") == 1
    clock.now += 2
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 1]
    clock.now += 1e6
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 1]


def test_buckets_forget_the_oldest_client_of_many(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdscale.service.access.buckets._MOST_CLIENTS", 10)
    buckets = Buckets(60, burst=1, clock=clock)
    for number in range(11):
        buckets.take(str(number))
    assert len(buckets._levels) == 10
    assert buckets.take("10") == 1
    assert buckets.take("0") == 0


@pytest.fixture
def settings(tmp_path: Any) -> ServiceSettings:
    limits = LimitSettings(
        body_bytes=1000, header_bytes=2000, requests_per_minute=60, body_seconds=0.05, concurrent_requests=2,
        event_streams=3,
    )  # fmt: skip
    return ServiceSettings(home=str(tmp_path / "home"), allowed_hosts=("train.example",), limits=limits)


@pytest.fixture
def layered(app: FastAPI, settings: ServiceSettings) -> Iterator[TestClient]:
    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.get("/document")
    def document() -> Response:
        return Response("x", headers={**DOCUMENT_HEADERS, "Cache-Control": "private"})

    @app.get("/sign-in")
    def sign_in(request: Request) -> Response:
        response = Response()
        set_cookie(response, request, Sessions(secret_key(settings.folder)).signed("t"), 60)
        return response

    add_access_layers(app)
    yield TestClient(app, base_url="http://127.0.0.1:8765")


def test_bodies_headers_and_addresses_have_a_size(layered: TestClient) -> None:
    def parts(size: int) -> Iterator[bytes]:
        yield from [b"x" * 100] * (size // 100)

    assert layered.post("/size", content=b"x" * 1000).json() == 1000
    assert layered.post("/size", content=parts(1000)).json() == 1000
    for content in (b"x" * 1001, parts(1100)):
        answer = layered.post("/size", content=content)
        assert (answer.status_code, answer.json()["status"]) == (413, 413)
        assert answer.headers["Connection"] == "close"
    assert layered.get("/read", headers={"X": "x" * 2000}).status_code == 431
    assert layered.get("/read?" + "x" * 4096).status_code == 414
    for length in ("x", "-1", "1_0", "٣".encode()):
        assert layered.post("/size", headers={"Content-Length": length}).status_code == 400


def test_a_client_that_asks_too_often_waits(layered: TestClient, bearer: Bearer) -> None:
    codes = [layered.get("/read").status_code for _ in range(12)]
    assert codes == [401] * 10 + [429] * 2
    assert int(layered.get("/read").headers["Retry-After"]) >= 1
    assert layered.get("/read", headers=bearer("read")).status_code == 200


class Client:
    """A client of an ASGI app that sends its body in its own time."""

    def __init__(self, app: Any, accept: str = "*/*", method: str = "POST", length: str = "5"):
        self.sent: list[Message] = []
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        headers = [(b"host", b"x"), (b"accept", accept.encode()), (b"content-length", length.encode())]
        self.scope: Scope = {
            "type": "http", "method": method, "path": "/", "raw_path": b"/", "query_string": b"", "headers": headers,
            "client": ("10.0.0.1", 1), "scheme": "http",
        }  # fmt: skip
        self.app = app

    async def __call__(self) -> int:
        async def send(message: Message) -> None:
            self.sent.append(message)

        await self.app(self.scope, self.messages.get, send)
        return int(self.sent[0]["status"]) if self.sent else 0


def test_new_tokens_are_no_new_rate(settings: ServiceSettings, clock: Any) -> None:
    async def check() -> None:
        layer, codes = LimitsMiddleware(Response("ok"), settings, clock), []
        for number in range(105):
            client = Client(layer, method="GET")
            client.scope["headers"] = [(b"authorization", f"Bearer {number}".encode())]
            codes.append(await client())
        assert codes == [200] * 100 + [429] * 5

    asyncio.run(check())


def test_a_slow_body_ends_and_holds_no_place(settings: ServiceSettings) -> None:
    async def check() -> None:
        layer = LimitsMiddleware(Response("ok"), settings)
        slow = [Client(layer) for _ in range(5)]
        waiting = [asyncio.create_task(client()) for client in slow]
        await asyncio.sleep(0)
        quick = Client(layer)
        quick.messages.put_nowait({"type": "http.request", "body": b"12345", "more_body": False})
        assert await quick() == 200
        slow[0].messages.put_nowait({"type": "http.disconnect"})
        assert await asyncio.gather(*waiting) == [0, 408, 408, 408, 408]

    asyncio.run(check())


def test_only_so_many_requests_at_once_and_streams_apart(settings: ServiceSettings) -> None:
    async def check() -> None:
        leave = asyncio.Event()

        async def app(scope: Scope, receive: Any, send: Any) -> None:
            await leave.wait()
            await Response("ok")(scope, receive, send)

        layer = LimitsMiddleware(app, settings)
        kinds = ["*/*"] * 3 + ["text/event-stream"] * 4
        clients = [Client(layer, accept, "GET") for accept in kinds]
        for client in clients:
            client.scope["headers"] = client.scope["headers"][:2]
        waiting = [asyncio.create_task(client()) for client in clients]
        while sum(task.done() for task in waiting) < 2:
            await asyncio.sleep(0)
        leave.set()
        assert await asyncio.gather(*waiting) == [200, 200, 503, 200, 200, 200, 503]
        again = Client(layer, "*/*", "GET")
        again.scope["headers"] = again.scope["headers"][:2]
        assert await again() == 200

    asyncio.run(check())


def test_a_stream_ends_after_a_while_and_its_client_comes_back(settings: ServiceSettings) -> None:
    async def check() -> None:
        left = []

        async def forever() -> Any:
            try:
                yield "data: 1\n\n"
                await asyncio.Event().wait()
            finally:
                left.append(True)

        async def app(scope: Scope, receive: Any, send: Any) -> None:
            await StreamingResponse(forever(), media_type="text/event-stream")(scope, receive, send)

        layer = LimitsMiddleware(app, settings)
        layer.stream_seconds = 0.02
        client = Client(layer, "text/event-stream", "GET")
        client.scope["headers"] = client.scope["headers"][:2]
        assert await client() == 200
        assert [message.get("body") for message in client.sent[1:]] == [b"data: 1\n\n", b""]
        assert not client.sent[-1].get("more_body")
        assert left

    asyncio.run(check())


@pytest.mark.parametrize(
    ("host", "ok"),
    [
        ("127.0.0.1", True), ("127.0.0.1:8765", True), ("localhost:1", True), ("[::1]:8765", True), ("10.1.2.3", True),
        ("train.example", True), ("TRAIN.example.:443", True), ("evil.example", False), ("", False),
        ("localhost.evil.example", False), ("localhost:x", False), ("localhost@evil.example", False), ("a b", False),
        ("localhost/evil.example", False), ("[::1", False), ("evil.example#localhost", False), ("lоcalhost", False),
    ],
)  # fmt: skip
def test_other_names_are_refused(layered: TestClient, host: str, ok: bool) -> None:
    answer = layered.get("/read", headers={"Host": host.encode()})
    assert answer.status_code == (401 if ok else 421)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_two_hosts_are_refused(layered: TestClient) -> None:
    assert layered.get("/read", headers=[("Host", "localhost"), ("Host", "localhost")]).status_code == 421


def test_every_answer_has_the_headers(layered: TestClient, bearer: Bearer) -> None:
    answers = [
        layered.get("/read", headers=bearer("read")), layered.get("/read"), layered.get("/none"),
        layered.post("/size", content=b"x" * 2000), layered.get("/openapi.json"),
    ]  # fmt: skip
    for answer in answers:
        assert answer.headers["Content-Security-Policy"] == PAGE_POLICY
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
    document = layered.get("/document")
    assert "sandbox" in document.headers["Content-Security-Policy"]
    assert document.headers["Cache-Control"] == "private"


def test_the_cookie_is_for_this_site_and_no_script(layered: TestClient, app: FastAPI) -> None:
    plain = layered.get("/sign-in").headers["Set-Cookie"]
    assert all(word in plain for word in ("kdscale=", "HttpOnly", "SameSite=strict", "Path=/", "Max-Age=60"))
    assert "Secure" not in plain
    tls = TestClient(app, base_url="https://127.0.0.1:8765").get("/sign-in").headers["Set-Cookie"]
    assert tls.startswith("__Host-kdscale=")
    assert "Secure" in tls


def test_who_changes_something_is_written_down(layered: TestClient, app: FastAPI, bearer: Bearer) -> None:
    run_id = "0123456789abcdef"[:9] + "-0123456"
    layered.get("/read", headers=bearer("read"))
    layered.post(f"/v1/runs/{run_id}/cancel")
    layered.post(f"/v1/runs/{run_id}/cancel", headers=bearer("run", owner="bob"))
    layered.post("/v1/runs/%0d%0ax/cancel", headers=bearer("run", owner="bob"))
    layered.delete("/admin", headers=bearer("run", owner="eve"))
    log = app.state.accounts.audit_log()[::-1]
    action = "POST /v1/runs/{run_id}/cancel"
    assert [(entry.actor, entry.action, entry.run_id, entry.detail["status"]) for entry in log] == [
        ("bob", action, run_id, 200), ("bob", action, None, 200), ("eve", "DELETE /admin", None, 403),
    ]  # fmt: skip
    assert {entry.address for entry in log} == {"testclient"}
