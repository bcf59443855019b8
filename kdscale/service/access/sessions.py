"""The signed cookie of people who signed in, and what a request with a cookie must show to change anything.

The cookie names a token, so it dies with it. A page of another site could make a browser send it (SameSite=Strict is
the first hurdle), so a request that changes something also shows a text that only our own pages know.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kdscale.errors import ServiceError
from kdscale.files import read_bytes, write_private

CSRF_HEADER, CSRF_FIELD = "X-CSRF-Token", "csrf_token"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_KEY_BYTES = 32
_SECONDS = 7 * 86_400  # for which a cookie is worth something; a token may end sooner
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_PORTS = {"http": 80, "https": 443}
_making = threading.Lock()


@dataclass(frozen=True)
class Session:
    """What a cookie says: the token that was signed in with, and a number of this sign-in's own."""

    token_id: str
    nonce: str


class Sessions:
    """Signs and reads cookies. `key`: bytes that nobody else knows."""

    def __init__(self, key: bytes):
        self._key = key

    def signed(self, token_id: str) -> str:
        """The value of a new cookie for this token."""
        return self.sealed("session", [token_id, secrets.token_hex(16)])

    def read(self, value: str) -> Session | None:
        """What a cookie says; None where it is not one of ours, or too old."""
        content = self.opened("session", value, _SECONDS)
        return Session(*content) if content is not None and len(content) == 2 else None

    def sealed(self, purpose: str, content: list[str]) -> str:
        """Signed text for a cookie, worth nothing for another purpose."""
        return str(self._serializer(purpose).dumps(content))

    def opened(self, purpose: str, value: str, seconds: int) -> list[str] | None:
        """What was sealed at most so many seconds ago; None for anything else."""
        try:
            content: Any = self._serializer(purpose).loads(value, max_age=seconds)
        except BadData:
            return None
        return content if isinstance(content, list) else None

    def _serializer(self, purpose: str) -> URLSafeTimedSerializer:
        options = {"key_derivation": "hmac", "digest_method": sha256}
        return URLSafeTimedSerializer(self._key, salt=f"kdscale {purpose}", signer_kwargs=options)

    def csrf_token(self, session: Session) -> str:
        """What the pages of this session send with every request that changes something."""
        text = f"kdscale csrf {session.token_id} {session.nonce}"
        return hmac.new(self._key, text.encode(), sha256).hexdigest()

    def of(self, request: Request) -> Session | None:
        """The session of a request; None where it has no cookie of ours."""
        value = request.cookies.get(cookie_name(request))
        return self.read(value) if value else None


def sessions_of(request: Request) -> Sessions:
    """The Sessions of the request's service, made when they are first asked for."""
    state = request.app.state
    with _making:
        if getattr(state, "sessions", None) is None:
            state.sessions = Sessions(secret_key(state.settings.folder))
    found: Sessions = state.sessions
    return found


def secret_key(home: Path) -> bytes:
    """The key of a service in `home`, made when there is none. Raises ServiceError when it is too short."""
    path = home / "secret.key"
    if not path.exists():
        write_private(path, secrets.token_bytes(_KEY_BYTES))
    key = read_bytes(path, ServiceError, limit=4096)
    if len(key) < _KEY_BYTES:
        raise ServiceError(
            f"{path} is too short", expected=f"at least {_KEY_BYTES} bytes", got=f"{len(key)}",
            hint="move it away: a new one is made, and everybody signs in again",
        )  # fmt: skip
    return key


def cookie_name(request: Request) -> str:
    """Under TLS a name with which browsers refuse a cookie that another host of the domain sets."""
    return "__Host-kdscale" if request.url.scheme == "https" else "kdscale"


def set_cookie(response: Response, request: Request, value: str, seconds: float | None = None) -> None:
    """Give the browser the cookie; it forgets it after `seconds`, a week at most."""
    response.set_cookie(
        cookie_name(request), value, max_age=int(min(_SECONDS, _SECONDS if seconds is None else seconds)), path="/",
        secure=request.url.scheme == "https", httponly=True, samesite="strict",
    )  # fmt: skip


def delete_cookie(response: Response, request: Request) -> None:
    """Make the browser forget the cookie."""
    response.delete_cookie(
        cookie_name(request), path="/", secure=request.url.scheme == "https", httponly=True, samesite="strict"
    )


def own_path(address: str, start: str = "/") -> str:
    """A path of this service, to go on with after a sign-in; `start` in place of any other address."""
    odd = not address.isprintable() or "\\" in address or len(address) > 2000
    return address if address.startswith("/") and not address.startswith("//") and not odd else start


def csrf_token(request: Request) -> str:
    """For the pages of a signed-in person: goes into X-CSRF-Token, or the form field csrf_token; empty without one."""
    sessions = sessions_of(request)
    session = sessions.of(request)
    return "" if session is None else sessions.csrf_token(session)


async def check_csrf(request: Request, sessions: Sessions, session: Session) -> None:
    """Raise HTTPException (403) unless a request that changes something comes from a page of ours of this session."""
    check_same_origin(request)
    given = request.headers.get(CSRF_HEADER, "")
    if not given and request.headers.get("content-type", "").partition(";")[0].strip().lower() in _FORMS:
        field = (await request.form()).get(CSRF_FIELD, "")
        given = field if isinstance(field, str) else ""
    if not hmac.compare_digest(given.encode(errors="replace"), sessions.csrf_token(session).encode()):
        raise HTTPException(
            403, f"a request by cookie that changes something needs the header {CSRF_HEADER}, or the form field"
            f" {CSRF_FIELD}, of the page; reload the page, or send a token as Authorization: Bearer",
        )  # fmt: skip


def check_same_origin(request: Request) -> None:
    """Raise HTTPException (403) when the browser says that a page of another origin made the request."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site not in (None, "same-origin") or (origin is not None and not _is_own(origin, request)):
        raise HTTPException(403, "the request comes from a page of another site")


def _is_own(origin: str, request: Request) -> bool:
    """Whether an Origin names the host that the request was sent to."""
    try:
        theirs, ours = urlsplit(origin), urlsplit(f"{request.url.scheme}://{request.headers.get('host', '')}")
        return theirs.scheme in _PORTS and (theirs.hostname, theirs.port or _PORTS[theirs.scheme]) == (
            ours.hostname,
            ours.port or _PORTS[theirs.scheme],
        )
    except ValueError:  # a port that is none
        return False
