"""Signed webhooks in the form of the Standard Webhooks specification (standardwebhooks.com).

Three headers: `webhook-id` (the same at every try, so that a receiver can tell a repetition), `webhook-timestamp`
(seconds since 1970, so that an old request cannot be sent again by somebody else) and `webhook-signature`: `v1,` and
the base64 of HMAC-SHA256 over `id.timestamp.body`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import kdscale
from kdscale.errors import ConfigError, FileError, ServiceError
from kdscale.files import fsync_dir, fsync_file, read_text
from kdscale.service.notices.recipients import RefusedAddressError, Resolve, addresses_to_connect, resolve

SECRET_FILE = "webhook.key"  # in the home folder, unless the settings name another
_PREFIX, _SECRET_BYTES, _SHORTEST = "whsec_", 32, 16
_CONNECT_SECONDS, _WHOLE_SECONDS = 10.0, 30.0
_MOST_ANSWER = 2048  # bytes of an answer that are read, for the message of a failure


class DeliveryError(Exception):
    """A notice that did not arrive; `final`: another try would end the same way."""

    def __init__(self, words: str, final: bool = False):
        super().__init__(words[:500])
        self.final = final


def load_secret(path: Path, *, make: bool) -> bytes:
    """The key that signs; with `make`, a new one is written where there is none, readable by its owner alone.

    Raises ConfigError for a file that cannot be read or holds fewer than 16 bytes.
    """
    if make and not path.exists():
        _make_secret(path)
    try:
        text = read_text(path, FileError, 4096).strip()
    except FileError as error:
        raise ConfigError(
            "notices.webhook_secret_file", got=str(error), hint="name a file that holds the key"
        ) from error
    key = _decoded(text)
    if len(key) < _SHORTEST:
        raise ConfigError(
            "notices.webhook_secret_file", expected=f"a key of at least {_SHORTEST} bytes", got=f"{len(key)} in {path}"
        )
    return key


def _make_secret(path: Path) -> None:
    """Write a new key; where another process is first, its key stays."""
    text = _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(text + "\n")
        fsync_file(tmp)
        with suppress(FileExistsError):
            os.link(tmp, path)  # a complete file appears, or none
    finally:
        tmp.unlink()
    fsync_dir(path.parent)


def _decoded(text: str) -> bytes:
    if text.startswith(_PREFIX):
        try:
            return base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            return b""
    return text.encode()


def sign(secret: bytes, notice_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.new(secret, f"{notice_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def post(
    url: str,
    body: bytes,
    headers: dict[str, str],
    *,
    allowed: Collection[str] = (),
    look_up: Resolve = resolve,
    whole_seconds: float = _WHOLE_SECONDS,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Send one request; returns when the receiver answered with a status of 200 to 299.

    `whole_seconds` bound everything after the connection, also a receiver that answers a byte at a time.
    Raises DeliveryError, which says what came instead.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    context = (tls or ssl.create_default_context()) if secure else None
    deadline = _Deadline(whole_seconds)
    try:
        connection = _connection(host, port, addresses_to_connect(host, port, allowed, look_up), context)
        try:
            connection.connect()
            with deadline.of(connection.sock):
                connection.request(
                    "POST", path, body,
                    {**headers, "content-type": "application/json", "user-agent": f"kdscale/{kdscale.__version__}"},
                )  # fmt: skip
                answer = connection.getresponse()
                words = answer.read(_MOST_ANSWER)
            if deadline.passed:  # to http.client, the end of what was cut off is the end of the answer
                raise TimeoutError
        finally:
            connection.close()
    except RefusedAddressError as error:
        raise DeliveryError(str(error), final=True) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"no answer within {whole_seconds:g} s" if deadline.passed else f"{type(error).__name__}: {error}"
        raise DeliveryError(f"{host}: {reason}") from error
    _check_status(host, answer.status, words)


def _check_status(host: str, status: int, words: bytes) -> None:
    """Raises DeliveryError unless the status says that the notice was taken."""
    if 200 <= status < 300:
        return
    said = " ".join(words.decode("utf-8", "replace").split())[:200]
    if 300 <= status < 400:
        raise DeliveryError(f"{host} answered {status}: redirects are not followed, give the final address", final=True)
    # 410: the receiver wants no more. Everything else may be a fault of the moment, also a 404 while it is set up.
    raise DeliveryError(f"{host} answered {status} {said}".rstrip(), final=status == 410)


def _connection(
    host: str, port: int, addresses: Sequence[str], tls: ssl.SSLContext | None
) -> http.client.HTTPConnection:
    """A connection to one of `addresses` that names `host` in its Host header and checks the certificate of `host`."""

    class Pinned(http.client.HTTPConnection):
        default_port = 80 if tls is None else 443

        def connect(self) -> None:
            self.sock = _first_that_answers(addresses, port)
            if tls is not None:
                try:
                    self.sock = tls.wrap_socket(self.sock, server_hostname=host)
                except BaseException:
                    self.sock.close()
                    raise

    return Pinned(host, port)


def _first_that_answers(addresses: Sequence[str], port: int) -> socket.socket:
    """A connection to the first address that takes one: this machine may have no way to those of IPv6."""
    error = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), _CONNECT_SECONDS)
        except OSError as problem:
            error = problem
    raise error


class _Deadline:
    """Cuts a connection off when its time is over, whatever the thread that uses it waits for."""

    def __init__(self, seconds: float):
        self.passed = False
        self._seconds = seconds

    @contextmanager
    def of(self, connection: socket.socket) -> Iterator[None]:
        """Watch this connection while the block runs."""

        def cut() -> None:
            self.passed = True
            with suppress(OSError):  # closed already
                # not SSLSocket.shutdown, which takes the TLS state away under the thread that reads
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

        timer = threading.Timer(self._seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def secret_of(home: Path, configured: str | None) -> bytes:
    """The service's key: of the file that the settings name, or the one in the home folder, made at its first use."""
    if configured is not None:
        return load_secret(Path(configured), make=False)
    try:
        return load_secret(home / SECRET_FILE, make=True)
    except OSError as error:
        raise ServiceError(f"{home / SECRET_FILE} cannot be written", got=error.strerror) from error
