"""Tokens, cookies and what a request by cookie must show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kdscale.errors import ServiceError
from kdscale.service.access.identity import SCOPES, Actor
from kdscale.service.access.sessions import Sessions, secret_key
from kdscale.service.settings import ServiceSettings

Bearer = Callable[..., dict[str, str]]
CALLS = {"read": ("GET", "/read"), "run": ("POST", "/v1/runs/r/cancel"), "admin": ("DELETE", "/admin")}


def test_a_wider_scope_may_what_a_narrower_one_may(client: TestClient, bearer: Bearer) -> None:
    for held in SCOPES:
        headers = bearer(held)
        for needed, (method, path) in CALLS.items():
            status = client.request(method, path, headers=headers).status_code
            assert status == (200 if SCOPES.index(held) >= SCOPES.index(needed) else 403), (held, needed)
    assert not Actor("ada", ["run"], "t").may_change("bob")
    assert Actor("ada", ["run"], "t").may_change("ada")
    assert Actor("ada", ["admin"], "t").may_change("bob")


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer kds_x", "Basic YTpi", "kds_x", "Bearer \xff", "Bearer " + "x" * 9000]
)
def test_what_is_no_token_opens_nothing(client: TestClient, value: str) -> None:
    answer = client.get("/read", headers=[(b"Authorization", value.encode("latin-1"))])
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_two_authorization_headers_open_nothing(client: TestClient, bearer: Bearer) -> None:
    value = bearer("read")["Authorization"]
    assert client.get("/read", headers=[("Authorization", value), ("Authorization", value)]).status_code == 401


def test_a_token_ends_when_it_expires_or_is_revoked(
    client: TestClient, app: FastAPI, bearer: Bearer, clock: Any
) -> None:
    headers = bearer("read", expires=clock.now + 10)
    assert client.get("/read", headers=headers).json()["owner"] == "ada"
    clock.now += 10
    assert client.get("/read", headers=headers).status_code == 401
    headers = bearer("read")
    app.state.accounts.revoke(app.state.accounts.tokens()[-1].id)
    assert client.get("/read", headers=headers).status_code == 401


def test_the_last_use_is_written_once_a_minute(client: TestClient, app: FastAPI, bearer: Bearer, clock: Any) -> None:
    headers, start = bearer("read"), clock.now
    for seconds, written in ((0, 0), (59, 0), (60, 60), (100, 60)):
        clock.now = start + seconds
        client.get("/read", headers=headers)
        assert app.state.accounts.tokens()[0].used == start + written


def test_wrong_tokens_are_slowed_and_right_ones_are_not(client: TestClient, app: FastAPI, bearer: Bearer) -> None:
    wrong = [client.get("/read", headers={"Authorization": "Bearer kds_x"}) for _ in range(30)]
    assert [answer.status_code for answer in wrong] == [401] * 10 + [429] * 20
    assert int(wrong[-1].headers["Retry-After"]) >= 1
    assert client.get("/read", headers=bearer("read")).status_code == 200


@pytest.fixture
def cookie(app: FastAPI, settings: ServiceSettings, client: TestClient) -> str:
    """The client has a cookie of a token with the scope run; the text for its requests."""
    app.state.sessions = Sessions(secret_key(settings.folder))
    token, _ = app.state.accounts.new_token("t", "ada", ["run"])
    client.cookies.set("kdscale", app.state.sessions.signed(token.id))
    return str(client.get("/read").json()["csrf"])


def test_a_cookie_reads_and_needs_the_text_to_change(client: TestClient, cookie: str) -> None:
    url = "/v1/runs/r/cancel"
    assert client.get("/read").json()["how"] == "cookie"
    assert client.post(url).status_code == 403
    assert client.post(url, headers={"X-CSRF-Token": cookie[:-1] + "x"}).status_code == 403
    assert client.post(url, headers={"X-CSRF-Token": "é".encode()}).status_code == 403
    assert client.post(url, headers={"X-CSRF-Token": cookie}).status_code == 200
    assert client.post(url, data={"csrf_token": cookie}).status_code == 200
    assert client.post(url, files={"csrf_token": ("f", cookie)}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:8765"}, 200),
        ({"Origin": "http://127.0.0.1:8765", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8765.evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:99999999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
    ],
)
def test_a_page_of_another_origin_changes_nothing(
    client: TestClient, cookie: str, headers: dict[str, str], status: int
) -> None:
    sent = {"X-CSRF-Token": cookie, **headers}
    assert client.post("/v1/runs/r/cancel", headers=sent).status_code == status


def test_a_cookie_dies_with_its_token(client: TestClient, app: FastAPI, cookie: str) -> None:
    app.state.accounts.revoke(app.state.accounts.tokens()[0].id)
    assert client.get("/read").status_code == 401


def test_a_cookie_that_we_did_not_sign_is_none(client: TestClient, app: FastAPI, cookie: str) -> None:
    token = app.state.accounts.tokens()[0]
    for value in ("", "x", token.id, Sessions(b"another key" * 3).signed(token.id), client.cookies["kdscale"] + "x"):
        client.cookies.set("kdscale", value)
        assert client.get("/read").status_code == 401


def test_the_text_of_one_session_is_worth_nothing_in_another(client: TestClient, app: FastAPI, cookie: str) -> None:
    client.cookies.set("kdscale", app.state.sessions.signed(app.state.accounts.tokens()[0].id))
    assert client.post("/v1/runs/r/cancel", headers={"X-CSRF-Token": cookie}).status_code == 403


def test_the_key_is_made_once_and_for_its_owner_alone(settings: ServiceSettings) -> None:
    key = secret_key(settings.folder)
    path = settings.folder / "secret.key"
    assert secret_key(settings.folder) == key
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(ServiceError, match=r"secret.key is too short"):
        secret_key(settings.folder)
