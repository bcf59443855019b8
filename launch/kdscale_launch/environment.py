"""Which environment variables the launcher sends to the ranks, and how it shows them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

# Nothing else of the launcher's environment is sent: a login shell on the other host has its own PATH and HOME.
FORWARDED = (
    "GLOO_SOCKET_IFNAME", "NCCL_*", "OMP_*", "MKL_NUM_THREADS", "MALLOC_*", "PYTORCH_*", "TORCH_*", "TORCHINDUCTOR_*",
    "DS_ACCELERATOR", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "WANDB_*", "MLFLOW_*",
)  # fmt: skip
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)


def forwarded_variables(environment: Mapping[str, str], extra: Iterable[str] = ()) -> dict[str, str]:
    """The variables of `environment` that FORWARDED or `extra` (names or patterns) lists, sorted by name."""
    patterns = (*FORWARDED, *extra)
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def is_secret(name: str) -> bool:
    """Whether a variable of this name may hold a token, a password or a key."""
    return _SECRET.search(name) is not None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that may appear on a command line, in a log or in a generated file."""
    return {name: value for name, value in environment.items() if not is_secret(name)}


def masked_lines(environment: Mapping[str, str]) -> list[str]:
    """`NAME=value` lines, with *** in place of secrets."""
    return [f"{name}={'***' if is_secret(name) else value}" for name, value in environment.items()]
