"""Signing in with an OpenID Connect provider: the code flow with PKCE, state and nonce.

Authlib and joserfc (extra `oidc`) check the provider's answer; by the settings, values of a claim give scopes.
Whoever signs in gets a token of their own that nobody sees and that ends after half a day; the cookie is bound to it.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from kdscale.config.endpoint import is_loopback
from kdscale.errors import ConfigError
from kdscale.files import read_text
from kdscale.runtime.packages import require_packages
from kdscale.service.access.identity import SCOPES, Scope
from kdscale.service.problems import Problem, clean
from kdscale.service.settings import OidcSettings

TOKEN_SECONDS = 12 * 3600.0  # after which people sign in again, and their groups are looked at anew
PENDING_SECONDS = 600  # in which the provider must have sent the person back
_DISCOVERY_SECONDS = 3600.0  # for which the provider's description of itself is kept
_TIMEOUT = 10.0
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_LEEWAY = 60  # seconds that two clocks may differ by
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pending:
    """A sign-in under way, which a signed cookie of the browser holds."""

    state: str
    nonce: str
    verifier: str
    there: str  # the page to go on with

    def as_list(self) -> list[str]:
        """What the cookie holds."""
        return list(asdict(self).values())


@dataclass(frozen=True)
class Identity:
    """Who somebody is, by the provider's word, and what they may do, by our settings."""

    owner: str
    scope: Scope


class Provider:
    """One provider of identities. `transport` and `clock` (seconds since 1970) are for tests.

    Raises ConfigError for packages or a secret that are missing, and for an issuer that is not reached privately.
    """

    def __init__(
        self,
        settings: OidcSettings,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.time,
    ):
        require_packages("oidc", ("authlib", "joserfc"), "oidc")
        self._settings, self._clock = settings, clock
        _check_private("oidc.issuer", settings.issuer)
        self._secret = read_text(Path(settings.client_secret_file).expanduser(), ConfigError, limit=4096).strip()
        self._http = httpx.Client(timeout=_TIMEOUT, transport=transport, follow_redirects=False)
        self._description: tuple[float, dict[str, Any]] | None = None

    def begin(self, redirect_uri: str, there: str) -> tuple[str, Pending]:
        """Where to send the browser, and what its cookie must hold until it is back."""
        from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
        from authlib.oauth2.rfc7636 import create_s256_code_challenge

        pending = Pending(secrets.token_urlsafe(24), secrets.token_urlsafe(24), secrets.token_urlsafe(48), there)
        scopes = ["openid", "profile", *(["email"] if self._settings.owner_claim == "email" else [])]
        url = prepare_grant_uri(
            self._endpoint("authorization_endpoint"), self._settings.client_id, "code", redirect_uri=redirect_uri,
            scope=" ".join(scopes), state=pending.state, nonce=pending.nonce, code_challenge_method="S256",
            code_challenge=create_s256_code_challenge(pending.verifier),
        )  # fmt: skip
        return str(url), pending

    def finish(self, parameters: Mapping[str, str], redirect_uri: str, pending: Pending | None) -> Identity:
        """Who has come back. Raises Problem: 401 for whoever is not let in, 502 for a provider that does not work."""
        given = parameters.get("state", "").encode(errors="replace")
        if pending is None or not hmac.compare_digest(given, pending.state.encode()):
            raise Problem(401, "sign-in", "this sign-in was not begun here, or too long ago", hint="sign in again")
        if parameters.get("error") or not parameters.get("code"):
            words = clean(parameters.get("error_description") or parameters.get("error", ""))[:200]
            raise Problem(401, "sign-in", "the provider did not let you in", got=words, hint="sign in again")
        if "iss" in parameters and parameters["iss"] != self._settings.issuer:  # RFC 9207
            raise Problem(401, "sign-in", "the answer comes from another provider", hint="sign in again")
        return self._identity(self._claims(self._tokens(parameters["code"], redirect_uri, pending), pending))

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        """Who it is by the claims. Raises Problem (401) where they do not say it, or nothing is allowed."""
        name = self._settings.owner_claim
        owner = claims.get(name)
        if not isinstance(owner, str) or not owner.strip() or len(owner) > 200 or not owner.isprintable():
            raise Problem(401, "sign-in", "the provider does not say who you are", expected=f"the claim {name}")
        if name == "email" and claims.get("email_verified") is not True:
            raise Problem(401, "sign-in", "your address is not verified", hint="verify it with the provider")
        held = claims.get(self._settings.scope_claim, [])
        values = held.split() if isinstance(held, str) else held if isinstance(held, list) else []
        known = self._settings.scopes
        allowed = {known[value] for value in values if isinstance(value, str) and value in known}
        if self._settings.default_scope is not None:
            allowed.add(self._settings.default_scope)
        if not allowed:
            raise Problem(
                401,
                "sign-in",
                f"{owner} may not use this service",
                hint="ask whoever runs it to list one of your groups",
            )
        return Identity(owner, max(allowed, key=SCOPES.index))

    def _tokens(self, code: str, redirect_uri: str, pending: Pending) -> dict[str, Any]:
        """What the provider gives for a code."""
        ours = (self._settings.client_id, self._secret)
        form = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri,
            "code_verifier": pending.verifier,
        }  # fmt: skip
        methods = self._describe().get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        basic = "client_secret_basic" in methods
        form |= {} if basic else {"client_id": ours[0], "client_secret": ours[1]}
        auth = httpx.BasicAuth(quote(ours[0], safe=""), quote(ours[1], safe="")) if basic else httpx.Auth()
        url = self._endpoint("token_endpoint")
        return self._json("the provider's tokens", lambda: self._http.post(url, data=form, auth=auth))

    def _claims(self, tokens: Mapping[str, Any], pending: Pending) -> dict[str, Any]:
        """The claims of an ID token that is the provider's, for us, of now and of this sign-in."""
        from authlib.oidc.core import CodeIDToken
        from joserfc import errors, jwt
        from joserfc.jwk import KeySet

        url = self._endpoint("jwks_uri")
        keys: Any = self._json("the provider's keys", lambda: self._http.get(url))
        essential: dict[str, Any] = {
            "iss": {"essential": True, "value": self._settings.issuer},
            "aud": {"essential": True, "value": self._settings.client_id},
            "exp": {"essential": True},
        }
        parameters = {
            "nonce": pending.nonce, "client_id": self._settings.client_id, "access_token": tokens.get("access_token"),
        }  # fmt: skip
        try:
            token = jwt.decode(str(tokens.get("id_token", "")), KeySet.import_key_set(keys), algorithms=_ALGORITHMS)
            claims = CodeIDToken(token.claims, token.header, essential, parameters)
            claims.validate(now=int(self._clock()), leeway=_LEEWAY)
        except (errors.JoseError, ValueError, KeyError, TypeError) as error:
            words = f"{type(error).__name__}: {error}"[:200]
            raise Problem(401, "sign-in", "the provider's ID token cannot be trusted", got=clean(words)) from error
        return dict(claims)

    def _describe(self) -> dict[str, Any]:
        if self._description is None or self._clock() - self._description[0] > _DISCOVERY_SECONDS:
            url = f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration"
            found = self._json("the provider's description", lambda: self._http.get(url))
            if found.get("issuer") != self._settings.issuer:
                raise Problem(
                    502, "sign-in", "the provider calls itself by another name", expected=self._settings.issuer,
                    got=clean(str(found.get("issuer")))[:200], hint="write oidc.issuer as the provider does",
                )  # fmt: skip
            self._description = (self._clock(), found)
        return self._description[1]

    def _endpoint(self, name: str) -> str:
        url = str(self._describe().get(name, ""))
        try:
            _check_private(f"the provider's {name}", url)
        except ConfigError as error:
            raise Problem(502, "sign-in", error.what, expected=error.expected, got=error.got) from error
        return url

    def _json(self, what: str, ask: Callable[[], httpx.Response]) -> dict[str, Any]:
        """The JSON object of an answer. Raises Problem (502) for any other answer, and for none."""
        try:
            answer = ask()
            tree = answer.json()
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            raise Problem(502, "sign-in", f"{what} cannot be fetched", got=clean(str(error))[:200]) from error
        if answer.status_code != 200 or not isinstance(tree, dict):
            words = tree.get("error") if isinstance(tree, dict) else type(tree).__name__
            raise Problem(502, "sign-in", f"{what} cannot be fetched", got=clean(f"{answer.status_code} {words}")[:200])
        return tree


def _check_private(what: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        private = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    except ValueError:
        private = False
    if not private or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(what, expected="https://HOST, or http for this machine alone", got=clean(url)[:200])
