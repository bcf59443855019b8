"""Texts and values without the secrets that they may hold: for answers, events, notices and logs.

A secret has no mark, so this is the second line: configs with a password in an address are refused, and keys come from
variables and files.
"""

from __future__ import annotations

import re
from typing import Any

from kdscale_launch.environment import is_secret, without_credentials

# Tokens of this service, keys of its webhooks and of others' services, and what follows `Authorization: Bearer`.
_SECRETS = re.compile(
    r"\b(kds_|whsec_|hf_|sk-|gh[pousr]_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_+/=-]{12,}"
    r"|\b((?:Bearer|Basic)\s+)[^\s,;'\"]{8,}",
    re.IGNORECASE,
)
# Fields that say where a secret is and hold none, and counts of a text's tokens (`train tokens: 1,623,838`).
_NO_SECRETS = ("_file", "_variable", "_path", "_id", "_claim", "tokens")


def redacted_text(text: str) -> str:
    """`text` with *** in the place of tokens, keys, and the users and passwords in addresses."""
    return _SECRETS.sub(lambda match: f"{match[1] or match[2]}***", without_credentials(text))


def redacted(value: Any) -> Any:
    """A JSON value with *** in the place of secrets: by what texts look like, and by the names of their fields."""
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, dict):
        return {redacted(key): "***" if _is_secret(key, item) else redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _is_secret(name: Any, value: Any) -> bool:
    if not isinstance(value, str) or value == "" or str(name).endswith(_NO_SECRETS):
        return False
    return name != "key" and is_secret(str(name))  # a comparison's columns have keys
