"""How the server listens: TLS, whose word counts for a client's address, and how long it waits for headers."""

from __future__ import annotations

import asyncio
import resource
import ssl
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from kdscale.errors import ConfigError
from kdscale.service.settings import LimitSettings, ServiceSettings

_HEADER_SECONDS = 15.0  # in which the headers of a request must have come
_FILES = resource.RLIMIT_NOFILE
_OTHER_FILES = 256  # that the service needs besides connections: its database, logs, run folders, processes


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which a request has begun, or should have, and its headers do not end."""

    header_seconds = _HEADER_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _check_certificate(certificate: str, key: str) -> None:
    """Raises ConfigError for files that are none, or do not belong together; a password is not asked for."""

    def no_password() -> str:
        raise ConfigError("tls_key", expected="a key without a password", got=key, hint="openssl pkey removes it")

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, no_password)
    except OSError as error:  # also what OpenSSL says
        raise ConfigError(
            "tls_certificate, tls_key",
            expected="a certificate and its key, in PEM",
            got=f"{certificate}, {key}: {error}",
        ) from error


def _most_connections(limits: LimitSettings) -> int:
    """Connections that are answered: twice as many as requests, and never all of the files that a process may open."""
    wanted, most = (
        2 * (limits.concurrent_requests + limits.event_streams),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )
    return wanted if most == resource.RLIM_INFINITY else max(16, min(wanted, most - _OTHER_FILES))


def server_options(settings: ServiceSettings) -> dict[str, Any]:
    """The arguments of `uvicorn.Config` beside the app, its address and its logs.

    Raises ConfigError for a certificate that cannot be used.
    """
    limits = settings.limits
    if settings.tls_certificate is not None:
        _check_certificate(settings.tls_certificate, str(settings.tls_key))
    return {
        "http": PatientProtocol,
        "ws": "none",
        "server_header": False,
        "h11_max_incomplete_event_size": limits.header_bytes + (8 << 10),  # with the line of the request
        "limit_concurrency": _most_connections(limits),
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "ssl_certfile": settings.tls_certificate,
        "ssl_keyfile": settings.tls_key,
        "ssl_ciphers": "ECDHE+AESGCM:ECDHE+CHACHA20",  # of TLS 1.2; those of 1.3 are all good
    }
