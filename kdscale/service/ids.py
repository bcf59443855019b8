"""Names that the service makes: of runs, safe in paths, addresses and job names, and in the order of their making."""

from __future__ import annotations

import re
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letters that look like digits
_TIME_DIGITS, _RANDOM_DIGITS = 9, 7  # milliseconds until the year 3084, and 35 bits of chance
RUN_ID = re.compile(f"[{_ALPHABET}]{{{_TIME_DIGITS}}}-[{_ALPHABET}]{{{_RANDOM_DIGITS}}}")


def new_run_id(now: float | None = None) -> str:
    """A new id; ids sort by the time they were made (`now`, in seconds since 1970; the present when left out)."""
    milliseconds = round((time.time() if now is None else now) * 1000)
    return f"{_digits(milliseconds, _TIME_DIGITS)}-{_digits(secrets.randbits(5 * _RANDOM_DIGITS), _RANDOM_DIGITS)}"


def is_run_id(text: str) -> bool:
    """Whether a text has the form of an id; nothing else is ever joined to a path."""
    return RUN_ID.fullmatch(text) is not None


def _digits(value: int, count: int) -> str:
    return "".join(_ALPHABET[value >> 5 * place & 31] for place in reversed(range(count)))
