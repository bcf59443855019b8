"""A stand-in for an OpenID Connect provider: it checks what a real one checks, and signs with a key of its own."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

ISSUER = "https://login.example/realm"


class StandInProvider:
    """`claims` are added to every ID token (None takes one away); `answers` replaces answers by path."""

    def __init__(self) -> None:
        self.key: Any = ECKey.generate_key("P-256", {"kid": "1"})
        self.claims: dict[str, Any] = {"preferred_username": "ada", "groups": ["staff", "ml"]}
        self.answers: dict[str, httpx.Response] = {}
        self.codes: dict[str, dict[str, str]] = {}
        self.header = {"alg": "ES256", "kid": "1"}
        self.asked: list[str] = []

    def sign_in(self, url: str) -> str:
        """What a browser does with the address that it is sent to; returns the query it comes back with."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        assert query["response_type"] == "code"
        assert query["code_challenge_method"] == "S256"
        assert "openid" in query["scope"].split()
        code = secrets.token_hex(8)
        self.codes[code] = query
        return f"code={code}&state={query['state']}"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append(path)
        if path in self.answers:
            return self.answers[path]
        if path == "/realm/.well-known/openid-configuration":
            names = {"authorization_endpoint": "auth", "token_endpoint": "token", "jwks_uri": "keys"}
            return httpx.Response(200, json={"issuer": ISSUER, **{k: f"{ISSUER}/{v}" for k, v in names.items()}})
        if path == "/realm/keys":
            return httpx.Response(200, json=KeySet([self.key]).as_dict(private=False))
        assert path == "/realm/token"
        return self._token(request)

    def _token(self, request: httpx.Request) -> httpx.Response:
        form = {name: values[0] for name, values in parse_qs(request.content.decode()).items()}
        query = self.codes.pop(form["code"], None)  # a code works once
        basic = base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")).decode()
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        good = query is not None and basic == "kdscale:a%20secret" and challenge == query["code_challenge"]
        if not good or form["redirect_uri"] != query["redirect_uri"]:  # type: ignore[index]
            return httpx.Response(400, json={"error": "invalid_grant"})
        now = int(time.time())
        claims = {
            "iss": ISSUER, "sub": "1", "aud": "kdscale", "iat": now, "exp": now + 60, "nonce": query["nonce"],  # type: ignore[index]
            **self.claims,
        }  # fmt: skip
        kept = {name: value for name, value in claims.items() if value is not None}
        token = jwt.encode(self.header, kept, self.key, algorithms=[self.header["alg"]])
        return httpx.Response(200, json={"access_token": "a", "token_type": "Bearer", "id_token": token})
