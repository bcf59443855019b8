"""Mails: what they say, and that neither they nor the password go where others can read them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import ConfigError
from kdscale.service.notices import mail
from kdscale.service.notices.webhook import DeliveryError
from kdscale.service.settings import NoticeSettings

PASSWORD = "correct horse"


@pytest.fixture
def settings(mail_server: Any, tmp_path: Path) -> NoticeSettings:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    return NoticeSettings(
        smtp_host="127.0.0.1", smtp_port=mail_server.port, smtp_user="kd", sender="kd@example.org",
        smtp_password_file=str(tmp_path / "password"),
    )  # fmt: skip


@pytest.fixture
def tls(certificate: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client's context, for a server whose certificate is not made out to 127.0.0.1."""
    context = certificate.client
    monkeypatch.setattr(context, "check_hostname", False)
    return context


def letter(settings: NoticeSettings, subject: str = "done", text: str = "It is done.\n") -> Any:
    return mail.message(settings, "ada@example.org", subject, text, "notice-1", 1_000_000.0)


def test_a_mail_is_sent_over_tls_with_the_password_inside(settings: NoticeSettings, mail_server: Any, tls: Any) -> None:
    mail.send(settings, letter(settings), tls)
    assert "Subject: done" in mail_server.mails[0] and "It is done." in mail_server.mails[0]
    assert "Message-ID: <notice-1@example.org>" in mail_server.mails[0]
    sent = [words for words in mail_server.said if "AUTH" in words]
    assert sent[0].startswith("(tls) ") and base64.b64encode(f"\0kd\0{PASSWORD}".encode()).decode() in sent[0]


def test_nothing_is_sent_to_a_server_without_tls(settings: NoticeSettings, mail_server: Any, tls: Any) -> None:
    mail_server.offers_tls = False
    with pytest.raises(DeliveryError, match="STARTTLS"):
        mail.send(settings, letter(settings), tls)
    assert not any(words.split()[0] in ("AUTH", "MAIL", "DATA") for words in mail_server.said)


def test_a_certificate_that_nobody_vouches_for_ends_the_connection(settings: NoticeSettings, mail_server: Any) -> None:
    with pytest.raises(DeliveryError, match=r"(?i)certificate"):
        mail.send(settings, letter(settings))
    assert not any("AUTH" in words for words in mail_server.said)


def test_a_wrong_password_is_told_without_it(settings: NoticeSettings, mail_server: Any, tls: Any) -> None:
    mail_server.refuse["AUTH"] = f"535 no: {PASSWORD}"
    with pytest.raises(DeliveryError, match="does not accept") as caught:
        mail.send(settings, letter(settings), tls)
    assert PASSWORD not in str(caught.value) and not caught.value.final


@pytest.mark.parametrize(("answer", "final"), [("550 nobody", True), ("450 later", False)])
def test_a_refused_mailbox(settings: NoticeSettings, mail_server: Any, tls: Any, answer: str, final: bool) -> None:
    mail_server.refuse["RCPT"] = answer
    with pytest.raises(DeliveryError, match="refuses the mailbox") as caught:
        mail.send(settings, letter(settings), tls)
    assert caught.value.final is final


def test_a_name_with_line_breaks_makes_no_header(settings: NoticeSettings, mail_server: Any, tls: Any) -> None:
    mail.send(settings, letter(settings, "x\r\nBcc: eve@evil.example\r\n\r\n\x1b[2Jy", "\x1b]0;z\x07"), tls)
    head, _, body = mail_server.mails[0].partition("\r\n\r\n")
    assert "\nbcc" not in head.lower() and "\x1b" not in head + body
    assert [words for words in mail_server.said if "rcpt" in words.lower()] == ["(tls) rcpt TO:<ada@example.org>"]


def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"smtp_host": "mail.example", "sender": "kd@example.org", "smtp_user": "kd"}
    monkeypatch.setenv("KD_MAIL", PASSWORD)
    mail.check_settings(NoticeSettings())
    mail.check_settings(NoticeSettings(**good, smtp_password_variable="KD_MAIL"))
    for wrong, field in (
        ({**good, "sender": None, "smtp_password_variable": "KD_MAIL"}, "sender"),
        ({**good, "smtp_security": "none", "smtp_password_variable": "KD_MAIL"}, "smtp_security"),
        ({**good, "smtp_password_variable": "KD_NOT_THERE"}, "smtp_password_variable"),
        ({**good, "smtp_password_file": str(tmp_path / "missing")}, "smtp_password_file"),
        (good, "smtp_password_variable"),
    ):
        with pytest.raises(ConfigError, match=field):
            mail.check_settings(NoticeSettings(**wrong))
