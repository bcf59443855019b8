"""Requests to one service: the token goes to it alone, and what may pass is tried again.

Plain HTTP to another machine is refused unless it is asked for, redirects are not followed, and answers are bounded.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from kdscale.client.problems import BusyError, RefusedError, UnreachableError, refusal
from kdscale.client.tokens import check_token, find_token
from kdscale.errors import ConfigError, ServiceError

_MOST_BYTES = 64 << 20  # of an answer that is read whole
_ERROR_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0


@dataclass(frozen=True)
class Patience:
    """For how many seconds a call is tried again, and the clock of that; tests hand in their own."""

    seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random


class Tries:
    """Waits between the tries of one call, each about twice as long as the one before."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self.begin_again()

    def begin_again(self) -> None:
        """Something was answered: the next failure is a first one."""
        self._wait, self._end = _FIRST_WAIT, self._patience.clock() + self._patience.seconds

    def wait(self, error: RefusedError | UnreachableError) -> None:
        """Sleep before the next try after `error`, at least as long as the service asks for; raise it when that is too
        long."""
        # clients that lost the same service must not come back in step
        seconds = max(self._wait * (0.5 + self._patience.chance() / 2), getattr(error, "retry_after", None) or 0.0)
        if self._patience.clock() + seconds > self._end:
            raise error
        self._patience.sleep(seconds)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)


@dataclass(frozen=True)
class Answer:
    """An answer that was read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def tree(self, url: str) -> Any:
        """Its JSON. Raises ServiceError when it is none: something else answers at this address."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ServiceError(
                f"the answer of {url}", expected="JSON", got=self.body[:200].decode("utf-8", "replace"),
                hint="check that kdscale serve answers at this address",
            ) from error  # fmt: skip


def check_url(url: str, allow_http: bool = False) -> str:
    """A service's address in the form that tokens are kept under. Raises ConfigError."""
    expected = "an address such as https://kdscale.example.org or http://127.0.0.1:8765"
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError("the service's address", expected=expected, got=url[:200]) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the service's address", expected="no user and no password in it", hint="kdscale login")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError("the service's address", expected=expected, got=url[:200])
    if parts.scheme == "http" and not allow_http and not _is_loopback(host):
        raise ConfigError(
            "the service's address", expected="https:// for another machine: a token would pass in the clear",
            got=url[:200], hint="--insecure-http (allow_http=True) if the network itself is trusted",
        )  # fmt: skip
    named = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, named + (f":{port}" if port else ""), parts.path.rstrip("/"), "", ""))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Connection:
    """The HTTP client of one service. `transport` takes the place of the network in tests."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        allow_http: bool = False,
        timeout: float = 30.0,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        """Raises ConfigError for an address or a token that cannot be used; asks the service nothing yet."""
        self.url = check_url(url, allow_http)
        self.token = find_token(self.url) if token is None else check_token(token, "the argument")
        self.patience = patience or Patience()
        self._timeout = timeout
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            headers={"user-agent": "kdscale"},
            follow_redirects=False,  # the token is for one host
            trust_env=not _is_loopback(urlsplit(self.url).hostname or ""),  # a proxy is for the web
            # SSL_CERT_FILE and SSL_CERT_DIR count for this machine too, where trust_env leaves them out
            verify=httpx.create_ssl_context(trust_env=True) if self.url.startswith("https:") else True,
            transport=transport,
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = True,
    ) -> Answer:
        """An answer, read whole. Raises ServiceError.

        With `repeatable` false, what the service may have received already is not sent again.
        """
        tries = Tries(self.patience)
        while True:
            try:
                with self.open(method, path, params=params, body=body, headers=headers) as response:
                    return Answer(response.status_code, response.headers, _read(response, _MOST_BYTES))
            except BusyError as error:
                if not repeatable and error.status in (502, 504):  # a proxy, which may have passed it on
                    raise
                tries.wait(error)
            except UnreachableError as error:
                if error.for_good or not (repeatable or error.not_received):
                    raise
                tries.wait(error)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        silence: float | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer that is read in the block, of a request that is sent once. Raises ServiceError.

        `silence`: seconds without a byte after which the connection counts as lost.
        """
        sent = {name: value for name, value in (params or {}).items() if value is not None}
        authorization = {"authorization": f"Bearer {self.token}"} if self.token else {}
        timeout = self._http.timeout if silence is None else httpx.Timeout(self._timeout, read=silence)
        try:
            with self._http.stream(
                method, self.url + path, params=sent, json=body, headers={**authorization, **(headers or {})},
                timeout=timeout,
            ) as response:  # fmt: skip
                if response.status_code >= 300:
                    raise self._refused(response)
                yield response
        except httpx.RequestError as error:
            raise self._unreachable(error) from error

    def _refused(self, response: httpx.Response) -> RefusedError:
        if response.status_code < 400:
            return RefusedError(
                f"the service at {self.url}", expected="an answer from it: the token goes nowhere else",
                got=f"a redirect to {response.headers.get('location', 'nowhere')[:200]}",
                hint="give the address that it answers at", status=response.status_code,
            )  # fmt: skip
        error = refusal(response.status_code, _read(response, _ERROR_BYTES), self.url, self.token)
        if isinstance(error, BusyError):
            error.retry_after = _seconds(response.headers.get("retry-after", ""))
        return error

    def _unreachable(self, error: httpx.RequestError) -> UnreachableError:
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        wrong_certificate = "CERTIFICATE_VERIFY_FAILED" in words
        hint = "set SSL_CERT_FILE to the certificate of your own authority" if wrong_certificate else ""
        problem = UnreachableError(
            f"the service at {self.url} does not answer", got=words.replace(self.token or "\0", "***"),
            hint=hint or "check the address, and that kdscale serve runs there",
        )  # fmt: skip
        problem.not_received = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        problem.for_good = wrong_certificate
        return problem


def _read(response: httpx.Response, most_bytes: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most_bytes:
            raise ServiceError("the answer of the service", expected=f"at most {most_bytes:,} bytes", got="more")
    return bytes(body)


def _seconds(text: str) -> float | None:
    """Of a Retry-After header; a date, which the service never sends, counts as none."""
    return min(float(text), 86_400.0) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text.strip()) else None
