"""Optional packages: a missing one is a message that says how to install it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from kdscale.errors import ConfigError


def require_packages(what: str, names: Sequence[str], extra: str, otherwise: str = "") -> None:
    """Raises ConfigError when one of these packages is not installed; imports none of them.

    `what` needs them, the extra `extra` of kdscale brings them, and `otherwise` says how to do without.
    """
    missing = [name for name in names if not _is_there(name)]
    if missing:
        raise ConfigError(
            what, expected=f"the package {' and '.join(missing)}", got="not installed",
            hint=", or ".join([f"pip install 'kdscale[{extra}]'", *([otherwise] if otherwise else [])]),
        )  # fmt: skip


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it is loaded, and does not say from where
        return True
