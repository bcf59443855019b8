"""Who gets a notice: an https address that takes webhooks, or a mailto: address; and which of them are allowed.

A webhook makes this machine send a request to an address that somebody else chose. So the host must have a public
address, or be one that the settings name; the connection goes to the very address that was checked, so that a name
which resolves to another one a moment later gains nothing; and redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from kdscale.errors import ConfigError
from kdscale.service.settings import NoticeSettings
from kdscale_launch.environment import without_credentials

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
LONGEST = 2000  # characters of a recipient
# Of a mailbox: what every mail server takes. Quoted names and comments are refused, they hide where a mail goes.
_MAILBOX = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@([A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?)")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,250}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}")
# IPv6 addresses that hold an IPv4 address, by what translates them: NAT64 and 6to4.
_NAT64, _6TO4 = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("2002::/16")


class RefusedAddressError(Exception):
    """A host that notices may not be sent to."""


@dataclass(frozen=True)
class Recipient:
    """Where a notice goes: `address` is a URL, or a mailbox without `mailto:`."""

    channel: Literal["webhook", "email"]
    address: str

    @property
    def shown(self) -> str:
        """The address for people and logs; what a URL keeps secret is left out."""
        if self.channel == "email":
            return self.address
        url = urlsplit(self.address)
        # services that take webhooks often put the key into the path
        return without_credentials(f"{url.scheme}://{url.netloc}/") + ("…" if url.path.strip("/") or url.query else "")


def parse_recipient(text: str, settings: NoticeSettings, *, trusted: bool = False) -> Recipient:
    """The recipient that a text names; `trusted`: it stands in the settings, not in a request.

    Raises ConfigError for a form that no notice can be sent to, and for one that the settings do not allow.
    """
    if len(text) > LONGEST:
        raise ConfigError("notify.to", expected=f"at most {LONGEST} characters", got=f"{len(text):,}")
    if text.lower().startswith("mailto:"):
        return _mailbox(text[len("mailto:") :], settings, trusted)
    expected = "https://HOST/… or mailto:NAME@HOST"
    try:
        url = urlsplit(text)
        host, _ = url.hostname or "", url.port
    except ValueError as error:
        raise ConfigError("notify.to", expected=expected, got=f"{without_credentials(text)[:200]} ({error})") from error
    if not text.isascii() or any(character <= " " for character in text) or not _HOST.fullmatch(host):
        raise ConfigError("notify.to", expected=expected, got=without_credentials(text)[:200])
    allowed = host in settings.webhook_hosts
    if url.scheme != "https" and not (url.scheme == "http" and (allowed or trusted)):
        raise ConfigError(
            "notify.to", expected=expected, got=f"{url.scheme or 'no scheme'}://{host}",
            hint="plain http is for hosts in notices.webhook_hosts only",
        )  # fmt: skip
    if url.username is not None or url.fragment:
        raise ConfigError("notify.to", expected="an address without a user and without a #fragment", got=f"for {host}")
    if (literal := _literal(host)) is not None and not allowed and not is_public(literal):
        raise ConfigError(
            "notify.to", expected="a host with a public address, or one in notices.webhook_hosts", got=host
        )
    return Recipient("webhook", text)


def _mailbox(address: str, settings: NoticeSettings, trusted: bool) -> Recipient:
    match = _MAILBOX.fullmatch(address)
    if match is None or ".." in address or len(address) > 254:
        raise ConfigError("notify.to", expected="mailto:NAME@HOST", got=f"mailto:{address[:200]}")
    if settings.smtp_host is None:
        raise ConfigError(
            "notify.to", expected="a webhook: this service sends no e-mail", got=f"mailto:{address}",
            hint="an administrator sets notices.smtp_host and notices.sender",
        )  # fmt: skip
    domain = match[1].lower()
    if not trusted and domain not in {item.lower() for item in settings.mail_domains}:
        raise ConfigError(
            "notify.to", expected=f"a mailbox at {_either(settings.mail_domains)}", got=f"mailto:{address}",
            hint="an administrator adds the domain to notices.mail_domains",
        )  # fmt: skip
    return Recipient("email", address)


def _either(words: Collection[str]) -> str:
    return " or ".join(words) or "no domain: notices.mail_domains is empty"


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet: nothing of this machine, its networks or a translation of it.

    Shared space of providers, link-local addresses (where clouds answer with a machine's credentials), multicast and
    reserved blocks are not.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif address in _6TO4:
            inner = ipaddress.IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
        elif address.teredo is not None or address.scope_id is not None:
            return False
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, in the order in which the system would try them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def addresses_to_connect(host: str, port: int, allowed: Collection[str], look_up: Resolve = resolve) -> Sequence[str]:
    """The addresses of `host` that a webhook may connect to; hosts in `allowed` may have any.

    Every address of the name must be public: a name with one public and one private address is a trick.
    Raises RefusedAddressError, and OSError where the name has no address now.
    """
    addresses = look_up(host, port)
    if not addresses:
        raise OSError(f"{host} has no address")
    if host not in allowed:
        for text in addresses:
            if not is_public(ipaddress.ip_address(text)):
                raise RefusedAddressError(f"{host} is not a host on the public internet, nor in notices.webhook_hosts")
    return addresses


def _literal(host: str) -> Address | None:
    """The address that a host is, in any form that the system's resolver reads as one: `127.1`, `0x7f000001`."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
