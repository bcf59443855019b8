"""Signing in with a provider: a stand-in that behaves as one, and the ways in which it, or a person, may lie."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx
import pytest
from fastapi.testclient import TestClient
from joserfc.jwk import ECKey, OctKey

from kdscale.errors import ConfigError
from kdscale.service.access.oidc import Identity, Provider
from kdscale.service.app import make_app
from kdscale.service.database.connection import open_database
from kdscale.service.problems import Problem
from kdscale.service.settings import OidcSettings, ServiceSettings
from tests.unit.service.access.identity_provider import ISSUER, StandInProvider

BACK = "https://train.example/sign-in/oidc/callback"


@pytest.fixture
def stand_in() -> StandInProvider:
    return StandInProvider()


@pytest.fixture
def oidc(tmp_path: Path) -> OidcSettings:
    (tmp_path / "secret").write_text("a secret\n")
    return OidcSettings(
        issuer=ISSUER, client_id="kdscale", client_secret_file=str(tmp_path / "secret"),
        scopes={"ml": "run", "root": "admin"},
    )  # fmt: skip


def provider(oidc: OidcSettings, stand_in: StandInProvider) -> Provider:
    return Provider(oidc, httpx.MockTransport(stand_in))


def sign_in(oidc: OidcSettings, stand_in: StandInProvider, **changes: str) -> Identity:
    asked = provider(oidc, stand_in)
    url, pending = asked.begin(BACK, "/runs")
    return asked.finish({**dict(parse_qsl(stand_in.sign_in(url))), **changes}, BACK, pending)


def test_a_person_comes_in_with_the_scope_of_a_group(oidc: OidcSettings, stand_in: StandInProvider) -> None:
    assert sign_in(oidc, stand_in) == Identity("ada", "run")
    stand_in.claims["groups"] = "ml root other"
    assert sign_in(oidc, stand_in) == Identity("ada", "admin")
    stand_in.claims["groups"] = None
    with pytest.raises(Problem, match="may not use"):
        sign_in(oidc, stand_in)
    assert sign_in(oidc.model_copy(update={"default_scope": "read"}), stand_in) == Identity("ada", "read")


def test_an_address_must_be_verified(oidc: OidcSettings, stand_in: StandInProvider) -> None:
    by_mail = oidc.model_copy(update={"owner_claim": "email"})
    stand_in.claims |= {"email": "ada@example.org", "email_verified": True}
    assert sign_in(by_mail, stand_in).owner == "ada@example.org"
    for value in (False, None, "true"):
        stand_in.claims["email_verified"] = value
        with pytest.raises(Problem, match="not verified"):
            sign_in(by_mail, stand_in)


NOW = int(time.time())


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil.example"}, {"iss": None}, {"aud": "another"}, {"aud": None}, {"aud": ["another"]},
        {"aud": ["kdscale", "x"], "azp": "x"}, {"exp": NOW - 3600}, {"exp": None}, {"exp": "soon"}, {"nonce": "x"},
        {"nonce": None}, {"iat": None}, {"nbf": NOW + 3600}, {"preferred_username": None}, {"preferred_username": 5},
        {"preferred_username": "a\nb"}, {"preferred_username": " "}, {"preferred_username": "a" * 201},
        {"groups": {"ml": 1}}, {"groups": [["ml"]]}, {"at_hash": "x"},
    ],
)  # fmt: skip
def test_claims_that_are_not_for_us(oidc: OidcSettings, stand_in: StandInProvider, claims: dict[str, Any]) -> None:
    stand_in.claims |= claims
    with pytest.raises(Problem) as caught:
        sign_in(oidc, stand_in)
    assert caught.value.status == 401


def test_a_token_that_another_signed(
    oidc: OidcSettings, stand_in: StandInProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = stand_in(httpx.Request("GET", f"{ISSUER}/keys")).json()
    stand_in.answers["/realm/keys"] = httpx.Response(200, json=published)
    stand_in.key = ECKey.generate_key("P-256", {"kid": "1"})
    with pytest.raises(Problem, match="cannot be trusted"):
        sign_in(oidc, stand_in)
    # as if the public key were a shared secret
    stand_in.key, stand_in.header = OctKey.import_key(str(published), {"kid": "1"}), {"alg": "HS256", "kid": "1"}
    with pytest.raises(Problem, match="cannot be trusted"):
        sign_in(oidc, stand_in)


@pytest.mark.parametrize("token", [None, "", "x", "eyJhbGciOiJub25lIn0.e30.", 5])
def test_a_token_that_is_none(oidc: OidcSettings, stand_in: StandInProvider, token: Any) -> None:
    stand_in.answers["/realm/token"] = httpx.Response(200, json={"id_token": token})
    with pytest.raises(Problem, match="cannot be trusted"):
        sign_in(oidc, stand_in)


def test_what_a_browser_brings_back(oidc: OidcSettings, stand_in: StandInProvider) -> None:
    for changes in (
        {"state": "x"},
        {"state": ""},
        {"state": "é"},
        {"error": "access_denied"},
        {"code": ""},
        {"iss": "x"},
    ):
        with pytest.raises(Problem) as caught:
            sign_in(oidc, stand_in, **changes)
        assert caught.value.status == 401
    asked = provider(oidc, stand_in)
    url, pending = asked.begin(BACK, "/runs")
    back = dict(parse_qsl(stand_in.sign_in(url)))
    with pytest.raises(Problem, match="not begun here"):
        asked.finish(back, BACK, None)
    with pytest.raises(Problem, match="tokens cannot be fetched"):
        asked.finish(back, BACK, replace(pending, verifier="another"))
    with pytest.raises(Problem, match="tokens cannot be fetched"):  # the code was used
        asked.finish(back, BACK, pending)


@pytest.mark.parametrize("name", [".well-known/openid-configuration", "token", "keys"])
@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500), httpx.Response(200, json=[]), httpx.Response(200, text="<html>"),
        httpx.Response(302, headers={"Location": "http://169.254.169.254/"}), httpx.Response(200, text="[" * 100_000),
    ],
)  # fmt: skip
def test_a_provider_that_does_not_work(
    oidc: OidcSettings, stand_in: StandInProvider, name: str, answer: httpx.Response
) -> None:
    stand_in.answers[f"/realm/{name}"] = answer
    with pytest.raises(Problem) as caught:
        sign_in(oidc, stand_in)
    assert caught.value.status == 502
    assert "169.254" not in stand_in.asked


def test_a_provider_is_reached_privately(oidc: OidcSettings, stand_in: StandInProvider) -> None:
    for issuer in ("http://login.example", "ftp://x", "https://", "https://u:p@login.example", ""):
        with pytest.raises(ConfigError, match=r"oidc.issuer"):
            provider(oidc.model_copy(update={"issuer": issuer}), stand_in)
    described = {"issuer": ISSUER, "authorization_endpoint": "http://login.example/auth"}
    stand_in.answers["/realm/.well-known/openid-configuration"] = httpx.Response(200, json=described)
    with pytest.raises(Problem, match="authorization_endpoint"):
        sign_in(oidc, stand_in)
    described["issuer"] = "https://evil.example"
    stand_in.answers["/realm/.well-known/openid-configuration"] = httpx.Response(200, json=described)
    with pytest.raises(Problem, match="another name"):
        sign_in(oidc, stand_in)


@pytest.fixture
def browser(settings: ServiceSettings, oidc: OidcSettings, stand_in: StandInProvider) -> Iterator[TestClient]:
    with_oidc = settings.model_copy(update={"oidc": oidc, "allowed_hosts": ("train.example",)})
    database = open_database(with_oidc)
    app = make_app(with_oidc, database)
    app.state.oidc_provider = provider(oidc, stand_in)
    yield TestClient(app, base_url="https://train.example", follow_redirects=False)
    database.close()


def test_a_browser_goes_there_and_comes_back(browser: TestClient, stand_in: StandInProvider) -> None:
    there = browser.get("/sign-in/oidc", params={"next": '/runs?a="><b>'})
    assert there.headers["Location"].startswith(f"{ISSUER}/auth?")
    assert "SameSite=lax" in there.headers["Set-Cookie"]
    query = stand_in.sign_in(there.headers["Location"])
    back = browser.get(f"/sign-in/oidc/callback?{query}")
    assert back.status_code == 200
    assert "url=/runs?a=&quot;&gt;&lt;b&gt;" in back.text
    assert browser.get("/v1/runs").status_code == 200
    accounts = state_of(browser).accounts
    assert [(entry.actor, entry.action) for entry in accounts.audit_log()] == [("ada", "sign-in")]
    token = accounts.tokens()[0]
    assert token.owner == "ada"
    assert token.scopes == ("run",)
    assert token.expires < time.time() + 86_400
    sessions = state_of(browser).sessions
    text = sessions.csrf_token(sessions.read(browser.cookies["__Host-kdscale"]))
    assert browser.post("/sign-out", headers={"X-CSRF-Token": text}).status_code == 303
    assert accounts.by_id(token.id) is None


@pytest.mark.parametrize(
    "there", ["https://evil.example", "//evil.example", "/\\evil.example", "/\tx", "javascript:alert(1)", ""]
)
def test_no_way_to_another_site(browser: TestClient, stand_in: StandInProvider, there: str) -> None:
    query = stand_in.sign_in(browser.get("/sign-in/oidc", params={"next": there}).headers["Location"])
    assert 'href="/runs"' in browser.get(f"/sign-in/oidc/callback?{query}").text


def test_nobody_is_signed_in_by_a_link_of_another(browser: TestClient, stand_in: StandInProvider) -> None:
    query = stand_in.sign_in(browser.get("/sign-in/oidc").headers["Location"])
    victim = TestClient(browser.app, base_url="https://train.example")
    sessions = state_of(browser).sessions
    for cookie in ("", "x", sessions.signed("t"), sessions.sealed("oidc", ["a"])):
        victim.cookies.set("kdscale-oidc", cookie)
        answer = victim.get(f"/sign-in/oidc/callback?{query}")
        assert answer.status_code == 401
        assert "this sign-in was not begun here" in answer.text
    assert state_of(browser).accounts.tokens() == []


def state_of(browser: TestClient) -> Any:
    return browser.app.state  # type: ignore[attr-defined]


def test_a_service_without_a_provider(settings: ServiceSettings) -> None:
    database = open_database(settings)
    client = TestClient(make_app(settings, database), base_url="http://localhost")
    assert client.get("/sign-in/oidc").status_code == 404
    assert client.get("/sign-in/oidc/callback?code=x&state=x").status_code == 404
    database.close()
