"""Which names the service answers to, and the headers that tell a browser what it may do with an answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdscale.service.problems import Problem
from kdscale.service.settings import ServiceSettings

# Scripts and styles are files of ours; nothing is written inside a page.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# What a run has made, such as its report, is shown as if it came from nowhere: no scripts, no cookie, no requests.
DOCUMENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
)
# for the answers of routes that serve files of a run
DOCUMENT_HEADERS: Mapping[str, str] = {"Content-Security-Policy": DOCUMENT_POLICY}
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # not no-referrer, with which browsers say `Origin: null` when a form is sent
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_UNLESS_SAID = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}


class HeadersMiddleware:
    """Refuses other names in Host (421), and adds headers to every answer.

    A page of another site whose name an attacker points at this machine's address would otherwise be the service's own
    site to a browser (DNS rebinding). Literal addresses cannot be pointed elsewhere.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings):
        self._app = app
        names = ("localhost", settings.host, socket.gethostname(), *settings.allowed_hosts)
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check Host, and let the request through."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers[name] = value
                for name, value in _UNLESS_SAID.items():
                    headers.setdefault(name, value)
            await send(message)

        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if scope["type"] == "http" and (len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1"))):
            problem = Problem(
                421, "host", "this service is not called by this name", headers={"Connection": "close"},
                hint="its settings list its names in allowed_hosts",
            )  # fmt: skip
            await problem.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        if parts.netloc != host or "@" in host or not host.isascii():
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True
