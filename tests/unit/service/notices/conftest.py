"""A database, runs in it, and servers of the tests' own that take webhooks and mail."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.settings import NoticeSettings, ServiceSettings
from tests.unit.service.certificates import make_certificate
from tests.unit.service.conftest import Clock


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., ServiceSettings]:
    (tmp_path / "home").mkdir()
    return lambda **notices: ServiceSettings(home=str(tmp_path / "home"), notices=NoticeSettings(**notices))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(ServiceSettings(home=str(tmp_path / "home")))
    yield opened
    opened.close()


@pytest.fixture
def runs(database: Database, clock: Clock) -> Runs:
    return Runs(database, clock)


@pytest.fixture
def run(runs: Runs, tmp_path: Path) -> Run:
    return runs.add(NewRun(name="tiny", owner="ada", config={}, folder=tmp_path / "run"))


@dataclass
class Receiver:
    """What came, and what is answered: a status, or a function that writes to the socket itself."""

    port: int = 0
    answer: Any = 204
    headers: dict[str, str] = field(default_factory=dict)
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def _serving(server: Any) -> Iterator[None]:
    server.handle_error = lambda *_: None  # clients that hang up are what the tests are about
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()
    with _serving(_web_server(state)):
        yield state


@pytest.fixture
def https_receiver(certificate: Certificate) -> Iterator[Receiver]:
    state = Receiver()
    server = _web_server(state)
    server.socket = certificate.server.wrap_socket(server.socket, server_side=True)
    with _serving(server):
        yield state


def _web_server(state: Receiver) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            state.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if callable(state.answer):
                state.answer(self)
                return
            self.send_response(state.answer)
            for name, value in {"content-length": "0", **state.headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    return server


@dataclass
class Certificate:
    """Contexts of a server called hooks.example, and of a client that trusts it."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    pem, key = make_certificate(tmp_path_factory.mktemp("tls"), "hooks.example")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem, key)
    return Certificate(server, ssl.create_default_context(cafile=pem))


@dataclass
class MailServer:
    """A mail server that can STARTTLS and LOGIN; `refuse` maps a command to the answer it gets."""

    port: int = 0
    offers_tls: bool = True
    refuse: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # commands, with `(tls)` before those that nobody could read
    mails: list[str] = field(default_factory=list)


@pytest.fixture
def mail_server(certificate: Certificate) -> Iterator[MailServer]:
    state = MailServer()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            stream, secure = connection.makefile("rb"), False

            def say(words: str) -> None:
                connection.sendall(words.encode() + b"\r\n")

            say("220 mail.example")
            while line := stream.readline():
                words = line.decode().strip()
                state.said.append(("(tls) " if secure else "") + words)
                command = words.partition(" ")[0].upper()
                if command in state.refuse:
                    say(state.refuse[command])
                elif command == "EHLO":
                    extra = ["STARTTLS"] if state.offers_tls and not secure else []
                    lines = ["mail.example", *extra, "AUTH PLAIN"]
                    for line_ in lines[:-1]:
                        say(f"250-{line_}")
                    say(f"250 {lines[-1]}")
                elif command == "STARTTLS":
                    say("220 go ahead")
                    connection = certificate.server.wrap_socket(connection, server_side=True)
                    stream, secure = connection.makefile("rb"), True
                elif command == "AUTH":
                    say("235 welcome")
                elif command == "DATA":
                    say("354 go ahead")
                    body = b""
                    while not body.endswith(b"\r\n.\r\n"):
                        body += stream.readline()
                    state.mails.append(body.decode())
                    say("250 taken")
                elif command == "QUIT":
                    say("221 bye")
                    return
                else:
                    say("250 fine")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    with _serving(server):
        yield state
