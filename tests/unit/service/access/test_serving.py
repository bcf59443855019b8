"""How the server listens: over TLS by settings, with the word of proxies that are trusted and of no others."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from kdscale.errors import ConfigError
from kdscale.service.access.serving import server_options
from kdscale.service.access.sessions import set_cookie
from kdscale.service.settings import ServiceSettings
from tests.unit.service.certificates import make_certificate


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with who asks, and over what."""
    request = Request(scope, receive)
    answer = JSONResponse([request.client.host if request.client else "", request.url.scheme])
    set_cookie(answer, request, "x")
    await answer(scope, receive, send)


@pytest.mark.parametrize(
    ("trusted", "client", "seen"),
    [
        ((), "127.0.0.1", ["127.0.0.1", "http"]),
        (("10.0.0.1",), "127.0.0.1", ["127.0.0.1", "http"]),
        (("127.0.0.1",), "127.0.0.1", ["192.0.2.7", "https"]),
        (("10.0.0.0/8",), "10.9.9.9", ["192.0.2.7", "https"]),
    ],
)
def test_the_word_of_a_proxy(tmp_path: Path, trusted: tuple[str, ...], client: str, seen: list[str]) -> None:
    options = server_options(ServiceSettings(home=str(tmp_path), trusted_proxies=trusted))
    config = uvicorn.Config(told, log_config=None, **options)
    config.load()
    transport = httpx.ASGITransport(config.loaded_app, client=(client, 1))
    headers = {"X-Forwarded-For": "203.0.113.1, 192.0.2.7", "X-Forwarded-Proto": "https", "Forwarded": "for=1.2.3.4"}

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/", headers=headers)).json()

    assert asyncio.run(ask()) == seen


def test_connections_leave_files_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServiceSettings(home=str(tmp_path))
    for most, limit in ((-1, 1400), (100_000, 1400), (1024, 768), (64, 16)):
        monkeypatch.setattr("resource.getrlimit", lambda _, most=most: (most, most))
        assert server_options(settings)["limit_concurrency"] == limit


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    options = server_options(ServiceSettings(home=str(tmp_path), tls_certificate=str(certificate), tls_key=str(key)))
    server = uvicorn.Server(uvicorn.Config(told, log_config=None, lifespan="off", **options))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"https://localhost:{listener.getsockname()[1]}/"
    try:
        answer = httpx.get(url, verify=ssl.create_default_context(cafile=str(certificate)))
        old = ssl.create_default_context(cafile=str(certificate))
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, verify=old)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
    assert answer.json()[1] == "https"
    assert answer.headers["Set-Cookie"].startswith("__Host-kdscale=x;")
    assert "Secure" in answer.headers["Set-Cookie"]
    assert "Server" not in answer.headers


def test_a_certificate_that_cannot_be_used_is_a_message(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    certificate, key = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, another = make_certificate(tmp_path / "other")
    locked = tmp_path / "locked.key"
    private: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"x")
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    wrong = [(tmp_path / "none", key), (certificate, tmp_path / "none"), (key, certificate), (certificate, another)]
    for one, two in [*wrong, (certificate, tmp_path), (certificate, locked)]:
        settings = ServiceSettings(home=str(tmp_path), tls_certificate=str(one), tls_key=str(two))
        with pytest.raises(ConfigError, match="tls_key"):
            server_options(settings)
