"""What a refusal of an HTTP server means: whether to ask again, and which setting of an endpoint is wrong."""

from __future__ import annotations

from kdscale.errors import ConfigError

_MAY_PASS = (408, 409, 425, 429)  # and every status from 500 on


def may_pass(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status >= 500 or status in _MAY_PASS


def without_key(words: str, key: str | None) -> str:
    """What a server says, with `***` where it repeats the key."""
    return words if key is None else words.replace(key, "***")


def wrong_setting(section: str, status: int, words: str, location: str | None) -> ConfigError | None:
    """The error for an endpoint that accepts no such key, or sends requests to another address, `location`.

    `section` of the config has the endpoint. None for a refusal that is about something else.
    """
    if status in (401, 403):
        return ConfigError(
            f"{section}.key_variable", expected="a key that the server accepts", got=f"{status} {words}",
            hint="put a valid key into the variable that it names",
        )  # fmt: skip
    if 300 <= status < 400:
        return ConfigError(
            f"{section}.base_url", expected="the server itself: its key goes nowhere else",
            got=f"a redirect to {location or 'nowhere'}", hint="give the address that it answers at",
        )  # fmt: skip
    return None
