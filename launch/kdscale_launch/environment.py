"""Which environment variables the ranks get, and what may be written or shown: no credentials, no control characters.

Every text that goes into a script, a manifest, a remote shell or a terminal passes through this file.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Iterable, Mapping

from kdscale_launch.job import LaunchError

# Nothing else of the launcher's environment is sent: a login shell on the other host has its own PATH and HOME.
FORWARDED = (
    "GLOO_SOCKET_IFNAME", "NCCL_*", "OMP_*", "MKL_NUM_THREADS", "MALLOC_*", "PYTORCH_*", "TORCH_*", "TORCHINDUCTOR_*",
    "DS_ACCELERATOR", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "WANDB_*", "MLFLOW_*",
)  # fmt: skip
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words anywhere in a name, and short words that must stand alone in it: MY_PW, but not MY_PWM.
_SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
    r"|(?<![A-Z0-9])(?:PW|PWD|PASS|AUTH|AUTHORIZATION|KEY|COOKIE)(?![A-Z0-9])",
    re.IGNORECASE,
)
# In a URL: USER:PASSWORD@ before the host, and the value of a parameter whose name is that of a secret.
_URL_USER = re.compile(r"(?<=://)[^\s/?#@'\"]*(?:@[^\s/?#@'\"]*)*@")
_URL_PARAMETER = re.compile(
    r"(?<=[?&;])([\w.%-]*(?:token|secret|passw|pwd|signature|sig|key|auth|credential)[\w.%-]*=)[^\s&;#'\"]+",
    re.IGNORECASE,
)


def forwarded_variables(environment: Mapping[str, str], extra: Iterable[str] = ()) -> dict[str, str]:
    """The variables of `environment` that FORWARDED or `extra` (names or patterns) lists, sorted by name.

    Raises LaunchError for a name that a shell would not take, or a value with control characters.
    """
    patterns = (*FORWARDED, *extra)
    chosen = {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    check_variables(chosen)
    return chosen


def check_variables(environment: Mapping[str, str]) -> None:
    """Raise LaunchError for a name that a shell would not take as a variable, or a value with control characters."""
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"environment variable {name!r}: expected a name of letters, digits and _; unset it")
        check_text(f"environment variable {name}", value, secret=is_secret(name, value))


def check_text(what: str, *texts: str, secret: bool = False) -> None:
    """Raise LaunchError, naming `what`, for a text with control characters: they end lines and steer terminals."""
    for text in texts:
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
            shown = "" if secret else f", got {without_credentials(text)[:200]!r}"
            raise LaunchError(f"{what}: expected text without line breaks and control characters{shown}")


def has_credentials(text: str) -> bool:
    """Whether a URL in `text` carries a user, a password or a token."""
    return without_credentials(text) != text


def without_credentials(text: str) -> str:
    """`text` with *** in place of the users, passwords and tokens in its URLs."""
    return _URL_PARAMETER.sub(r"\1***", _URL_USER.sub("***@", text))


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable may hold a token, a password or a key, by its name or as part of a URL in its value."""
    return _SECRET.search(name) is not None or has_credentials(value)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that may appear on a command line, in a log or in a generated file."""
    return {name: value for name, value in environment.items() if not is_secret(name, value)}


def masked_lines(environment: Mapping[str, str]) -> list[str]:
    """`NAME=value` lines, with *** in place of secrets."""
    return [f"{name}={'***' if is_secret(name, value) else value}" for name, value in environment.items()]
