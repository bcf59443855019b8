"""Which addresses may get a notice: nothing that a submitter of runs can name reaches this machine's own network."""

from __future__ import annotations

import ipaddress

import pytest

from kdscale.errors import ConfigError
from kdscale.service.notices.recipients import (
    Recipient,
    RefusedAddressError,
    addresses_to_connect,
    is_public,
    parse_recipient,
)
from kdscale.service.settings import NoticeSettings

MAIL = NoticeSettings(smtp_host="mail.example", sender="kd@example.org", mail_domains=("example.org",))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::127.0.0.1",
        "64:ff9b::169.254.169.254", "2002:7f00:1::", "2002:a00:1::1", "fec0::1", "2001:db8::1", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_addresses_of_a_network_of_our_own_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:8.8.8.8"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "text",
    [
        "https://127.0.0.1/", "https://127.1/", "https://0x7f000001/", "https://2130706433/", "https://0177.0.0.1/",
        "https://[::1]/", "https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest/meta-data",
        "http://hooks.example/x", "ftp://hooks.example/", "file:///etc/passwd", "gopher://x/", "//hooks.example/",
        "https://", "https:///path", "https://user:pw@hooks.example/", "https://hooks.example/#part",
        "https://hooks.example/a b", "https://hooks.example/\r\nhost: other", "https://hooks.example:99999/",
        "https://hööks.example/", "https://exa mple/", "https://-x-/", "javascript:alert(1)", "", "x" * 3000,
        "mailto:", "mailto:ada", "mailto:ada@", "mailto:@example.org", "mailto:ada@example.org,eve@evil.example",
        "mailto:ada@example.org\r\nBcc: eve@evil.example", "mailto:ada@example.org?bcc=eve@evil.example",
        "mailto:ada@evil.example", "mailto:\"a b\"@example.org", "mailto:ada@example..org", "mailto:<ada@example.org>",
    ],
)  # fmt: skip
def test_what_no_notice_may_go_to_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"notify\.to"):
        parse_recipient(text, MAIL)


def test_what_a_notice_may_go_to() -> None:
    assert parse_recipient("https://hooks.example:8443/a/b?c=d", MAIL).channel == "webhook"
    assert parse_recipient("mailto:ada.l+runs@example.org", MAIL) == Recipient("email", "ada.l+runs@example.org")
    assert parse_recipient("mailto:ada@elsewhere.example", MAIL, trusted=True).channel == "email"
    inside = NoticeSettings(webhook_hosts=("10.0.0.7", "hooks.internal"))
    assert parse_recipient("http://10.0.0.7:8000/", inside).address == "http://10.0.0.7:8000/"
    assert parse_recipient("http://hooks.internal/x", inside).channel == "webhook"
    with pytest.raises(ConfigError, match="sends no e-mail"):
        parse_recipient("mailto:ada@example.org", inside)


def test_a_name_is_refused_when_one_of_its_addresses_is_not_public() -> None:
    addresses = {"good.example": ["1.1.1.1"], "trick.example": ["1.1.1.1", "127.0.0.1"], "nobody.example": []}

    def look_up(host: str, port: int) -> list[str]:
        return addresses[host]

    assert addresses_to_connect("good.example", 443, (), look_up) == ["1.1.1.1"]
    with pytest.raises(RefusedAddressError, match=r"trick\.example"):
        addresses_to_connect("trick.example", 443, (), look_up)
    assert addresses_to_connect("trick.example", 443, ("trick.example",), look_up) == ["1.1.1.1", "127.0.0.1"]
    with pytest.raises(OSError, match="no address"):
        addresses_to_connect("nobody.example", 443, (), look_up)


def test_what_is_shown_of_an_address_holds_no_key() -> None:
    assert Recipient("webhook", "https://hooks.example/T00/B00/secret").shown == "https://hooks.example/…"
    assert Recipient("webhook", "https://hooks.example/").shown == "https://hooks.example/"
