"""Notices by e-mail, over a server that the settings name."""

from __future__ import annotations

import os
import smtplib
import ssl
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path

from kdscale.errors import ConfigError, FileError
from kdscale.escaping import for_terminal
from kdscale.files import read_text
from kdscale.service.notices.webhook import DeliveryError
from kdscale.service.settings import NoticeSettings

_SECONDS = 20.0  # for every answer of the server
_LONGEST_SUBJECT = 200
# A refusal for good (RFC 5321): this mailbox, or this mail, will not be taken at another try either.
_FOR_GOOD = range(500, 600)


def check_settings(settings: NoticeSettings) -> None:
    """Raises ConfigError for settings with which no e-mail can be sent; reads the password once."""
    if settings.smtp_host is None:
        return
    if settings.sender is None:
        raise ConfigError("notices.sender", expected="the address that notices come from", got="none")
    if settings.smtp_user is not None:
        if settings.smtp_security == "none":
            raise ConfigError(
                "notices.smtp_security", expected="starttls or tls where smtp_user is set", got="none",
                hint="a password is never sent over a connection that others can read",
            )  # fmt: skip
        password_of(settings)


def password_of(settings: NoticeSettings) -> str:
    """The password of `smtp_user`, from a file or an environment variable. Raises ConfigError without showing it."""
    if settings.smtp_password_file is not None:
        try:
            words = read_text(Path(settings.smtp_password_file), FileError, 4096).rstrip("\r\n")
        except FileError as error:
            raise ConfigError("notices.smtp_password_file", got=str(error)) from error
        field = "notices.smtp_password_file"
    else:
        words = os.environ.get(settings.smtp_password_variable or "", "")
        field = "notices.smtp_password_variable"
    if not words or "\0" in words or "\n" in words:
        raise ConfigError(field, expected="a file or a variable that holds the password", got="none, or several lines")
    return words


def message(settings: NoticeSettings, to: str, subject: str, text: str, notice_id: str, now: float) -> EmailMessage:
    """The mail. `notice_id` makes its Message-ID, so that a mailbox shows a repetition once."""
    sender = str(settings.sender)
    mail = EmailMessage()
    mail["From"], mail["To"] = Address(addr_spec=sender), Address(addr_spec=to)
    mail["Subject"] = for_terminal(" ".join(subject.split()))[:_LONGEST_SUBJECT]
    mail["Date"] = formatdate(now)
    mail["Message-ID"] = f"<{notice_id}@{sender.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
    mail.set_content(for_terminal(text))
    return mail


def send(settings: NoticeSettings, mail: EmailMessage, tls: ssl.SSLContext | None = None) -> None:
    """Hand a mail to the server. Raises DeliveryError, which never holds the password."""
    context = tls or ssl.create_default_context()
    host, port = str(settings.smtp_host), settings.smtp_port
    try:
        if settings.smtp_security == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=_SECONDS, context=context)
        else:
            server = smtplib.SMTP(host, port, timeout=_SECONDS)
        with server:
            if settings.smtp_security == "starttls":
                server.starttls(context=context)  # raises where the server offers none: nothing is sent in the clear
            if settings.smtp_user is not None:
                server.login(settings.smtp_user, password_of(settings))
            server.send_message(mail)
    except smtplib.SMTPAuthenticationError as error:
        # what the server says may repeat what it was sent
        raise DeliveryError(f"{host} does not accept notices.smtp_user and its password ({error.smtp_code})") from None
    except smtplib.SMTPRecipientsRefused as error:
        code = next(code for code, _ in error.recipients.values())  # there is one recipient
        raise DeliveryError(f"{host} refuses the mailbox ({code})", final=code in _FOR_GOOD) from error
    except smtplib.SMTPResponseException as error:
        said = error.smtp_error
        words = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        raise DeliveryError(f"{host} answered {error.smtp_code} {words}") from error
    except (OSError, smtplib.SMTPException) as error:
        raise DeliveryError(f"{host}: {type(error).__name__}: {error}") from error
