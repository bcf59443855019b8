"""The id of the request that is being answered: in every line of the log, in every problem, and in X-Request-ID."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

HEADER = "x-request-id"
_GIVEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # nothing that a log or a header reads as more than a word
CURRENT: ContextVar[str] = ContextVar("kdscale_request_id", default="")


def request_id() -> str:
    """The id of the request that this code works for; empty outside of one."""
    return CURRENT.get()


def chosen_id(given: str) -> str:
    """The id that a client or a proxy gave, if it is a plain word, and otherwise a new one."""
    return given if _GIVEN.fullmatch(given) else secrets.token_hex(8)
