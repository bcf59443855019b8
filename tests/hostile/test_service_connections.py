"""Bytes on a socket that no client library sends: slow, cut, smuggled, with paths as they are."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from kdscale.errors import ServiceError
from kdscale.service.access.serving import PatientProtocol, server_options
from kdscale.service.database.connection import open_database
from tests.hostile.nasty import HostileCases
from tests.hostile.service_app import SECRET, Target, settings_of
from tests.hostile.test_service import PATHS

_PATIENCE = 0.4  # seconds that the service of these tests waits for headers; half a second for a body


class Server:
    """A real server on a port of this machine."""

    def __init__(self, target: Target):
        self.target = target
        options = {"log_config": None, "lifespan": "off", "timeout_keep_alive": 1, **server_options(target.settings)}
        self.server = uvicorn.Server(uvicorn.Config(target.app, **options))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()

    def talk(self, *parts: bytes, every: float = 0.0, until: str = "") -> str:
        """All that is answered to some bytes until the connection is closed, or `until` was read."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            answer = b""
            try:
                for part in parts:
                    connection.sendall(part)
                    if every:
                        time.sleep(every)
                while not (until and until.encode() in answer) and (block := connection.recv(65_536)):
                    answer += block
            except (BrokenPipeError, ConnectionResetError):
                pass
        return answer.decode("latin-1")

    def ask(self, request: bytes, *parts: bytes, every: float = 0.0) -> str:
        """As `talk`. Raises ServiceError when all was refused, AssertionError for what no answer may be."""
        answer = self.talk(request, *parts, every=every)
        statuses = [int(status) for status in re.findall(r"HTTP/1\.1 (\d{3}) ", answer)]
        assert SECRET not in answer
        assert all(status < 500 for status in statuses), answer[:300]
        if not any(status < 400 for status in statuses):
            raise ServiceError(str(statuses))
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("service") / "home"
    settings = settings_of(home)
    database = open_database(settings)
    before, PatientProtocol.header_seconds = PatientProtocol.header_seconds, _PATIENCE
    running = Server(Target(home, database, settings))
    yield running
    running.stop()
    PatientProtocol.header_seconds = before
    database.close()


def lines(server: Server, first: str, *more: str, who: str = "admin") -> bytes:
    """A request's head; its connection is closed afterwards."""
    head = [first, f"Host: 127.0.0.1:{server.port}", f"Authorization: Bearer {server.target.secrets[who]}", *more]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1")


def test_paths_as_they_are(server: Server, hostile: HostileCases) -> None:
    for path in [*PATHS, "..", ".", "..;/", "\\..\\", "a/./../../../first-token"]:
        first = f"GET /v1/runs/{server.target.run_id}/artifacts/{path.replace(' ', '%20')} HTTP/1.1"
        hostile.run(
            path[:60], lambda first=first: server.ask(lines(server, first)), must="" if path == "." else "refuse"
        )
    for path in (
        "/../first-token",
        "//evil.example/",
        "http://evil.example/v1/runs",
        "/v1/../../etc/passwd",
        "*",
        "/v1/runs/..",
        "",
    ):
        first = f"GET {path} HTTP/1.1"
        hostile.run(f"whole path {path}", lambda first=first: server.ask(lines(server, first)), must="refuse")


def test_requests_within_requests(server: Server, hostile: HostileCases) -> None:
    inner = lines(server, f"POST /v1/runs/{server.target.run_id}/cancel HTTP/1.1").decode()
    outer = lines(server, "POST /v1/runs HTTP/1.1", who="none").decode().replace("Connection: close\r\n", "")
    length = f"Content-Length: {len(inner)}\r\n"
    cases = {
        "two lengths": outer[:-2] + "Content-Length: 0\r\n" + length + "\r\n" + inner,
        "length and chunks": outer[:-2] + length + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
        "odd chunks": outer[:-2] + "Transfer-Encoding: xchunked\r\n\r\n" + inner,
        "chunked twice": outer[:-2] + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + inner,
        "a space before the colon": outer[:-2] + "Content-Length : 5\r\n\r\n" + inner,
        "a folded line": outer[:-2] + "X: a\r\n Content-Length: 9\r\nContent-Length: 0\r\n\r\n",
        "a length with a sign": outer[:-2] + "Content-Length: +5\r\n\r\n" + inner,
        "a chunk of no number": outer[:-2] + "Transfer-Encoding: chunked\r\n\r\nzz\r\n" + inner,
        "a negative chunk": outer[:-2] + "Transfer-Encoding: chunked\r\n\r\n-1\r\n" + inner,
        "a chunk without end": outer[:-2] + "Transfer-Encoding: chunked\r\n\r\n" + "f" * 50 + "\r\n" + inner,
        "a bare line feed": outer[:-2] + "X: y\nContent-Length: 0\r\n\r\n",
        "a nul in a header": outer[:-2] + "X: \x00\r\n\r\n",
        "a header without a name": outer[:-2] + ": x\r\n\r\n",
        "no version": "GET /v1/runs\r\n\r\n", "version 9": "GET / HTTP/9.9\r\n\r\n",
        "no host": "GET /v1/runs HTTP/1.1\r\n\r\n",
        "two hosts": "GET /v1/runs HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "http/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "tls": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "garbage": "\xff" * 1000, "lines": "\r\n" * 1000, "a long first line": "GET /" + "x" * 100_000,
        "many headers": "GET / HTTP/1.1\r\n" + "".join(f"X{n}: y\r\n" for n in range(20_000)) + "\r\n",
    }  # fmt: skip
    for name, text in cases.items():
        hostile.run(name, lambda text=text: server.ask(text.encode("latin-1")), must="refuse")
    assert server.target.app.state.runs.get(server.target.run_id).state == "queued"


def test_slow_clients_are_left(server: Server, hostile: HostileCases) -> None:
    head = lines(server, "POST /v1/runs HTTP/1.1", "Content-Type: application/json", "Content-Length: 100")
    cases = {
        "nothing": [b""], "a letter at a time": [bytes([letter]) for letter in head[:8]],
        "no end of the headers": [head[:-2]], "no body": [head],
        "a body by letters": [head, *[b"{"] * 8], "half a body": [head + b"{" * 50],
    }  # fmt: skip
    for name, parts in cases.items():
        begun = time.monotonic()
        hostile.run(name, lambda parts=parts: server.ask(*parts, every=0.1), must="refuse")
        assert time.monotonic() - begun < 5, name


def test_a_second_request_of_a_connection_is_not_waited_for_either(server: Server) -> None:
    head = lines(server, "GET /healthz HTTP/1.1").replace(b"Connection: close\r\n", b"")
    begun = time.monotonic()
    answer = server.talk(head, b"GET /healthz HTT", every=0.1)
    assert answer.count("HTTP/1.1 200") == 1
    assert time.monotonic() - begun < 5


def test_slow_clients_are_in_nobodys_way(server: Server) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in idle:
        connection.sendall(b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
    begun = time.monotonic()
    assert "200 OK" in server.talk(lines(server, "GET /v1/runs HTTP/1.1"))
    assert time.monotonic() - begun < 2
    for connection in idle:
        connection.close()


def test_events_end_no_line_of_the_stream(server: Server) -> None:
    path = f"/v1/runs/{server.target.run_id}/events"
    text = server.talk(lines(server, f"GET {path}?after=0 HTTP/1.1", "Accept: text/event-stream"), until="data: x")
    body = text.partition("\r\n\r\n")[2]
    fields = {line.partition(":")[0] for line in re.split(r"\r\n|\r|\n", body)}
    assert {field for field in fields if not re.fullmatch(r"[0-9a-f]*", field)} <= {"id", "data", "event", "retry"}
    assert not re.search(r"^id: [78]$", body, re.MULTILINE)


def test_the_service_still_works(server: Server) -> None:
    assert "200 OK" in server.talk(lines(server, "GET /healthz HTTP/1.1"))
