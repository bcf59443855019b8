"""Where a client finds the token of a service: an argument, the environment, or a file that only its owner reads."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

from kdscale.errors import ConfigError

TOKEN_VARIABLE = "KDSCALE_TOKEN"
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_MOST_BYTES = 1 << 20


def tokens_file() -> Path:
    """`kdscale/tokens` in the user's folder of settings: JSON, a token by a service's address."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "kdscale" / "tokens"


def find_token(url: str) -> str | None:
    """The token for `url` in KDSCALE_TOKEN or the file of tokens; None where there is none.

    Raises ConfigError for a file that others can read, or a text that is no token.
    """
    if given := os.environ.get(TOKEN_VARIABLE, "").strip():
        return check_token(given, TOKEN_VARIABLE)
    token = _read(tokens_file()).get(url)
    return None if token is None else check_token(token, str(tokens_file()))


def check_token(token: str, origin: str) -> str:
    """`token`, when it can stand in a header. Raises ConfigError, which never shows it."""
    if _TOKEN.fullmatch(token) is None:
        got = "it is empty" if not token else "it holds blanks or control characters, or is too long"
        raise ConfigError(f"the token in {origin}", expected="one word of visible ASCII characters", got=got)
    return token


def keep_token(url: str, token: str) -> Path:
    """Write the token for `url` into the file of tokens, which only its owner can read; returns the file."""
    path = tokens_file()
    known = _read(path) | {url: token}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tmp = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        # 0600 from its first byte on: a file that is made first and closed to others later can be opened in between
        handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(known, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    return path


def _read(path: Path) -> dict[str, str]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", got=error.strerror) from error
    with os.fdopen(handle, "rb") as stream:
        about = os.fstat(stream.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077:
            raise ConfigError(
                f"{path}, which keeps tokens", expected="a file that only its owner can read",
                got=f"mode {stat.S_IMODE(about.st_mode):03o}", hint=f"chmod 600 {path}",
            )  # fmt: skip
        content = stream.read(_MOST_BYTES)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(value, str) for value in tree.values()):
        raise ConfigError(
            f"{path} is damaged", expected="JSON: a token by a service's address",
            hint="delete it, then log in again: kdscale login --server URL",
        )  # fmt: skip
    return tree
