"""Versions of the packages that decide the numbers."""

from __future__ import annotations

import platform
from importlib import metadata

import kdscale

PACKAGES = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


def version_of(package: str) -> str | None:
    """The installed version; None where there is none to be read. Never raises: it is asked after hours of work."""
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return None


def versions() -> dict[str, str]:
    """kdscale, Python and the packages that decide the numbers; "unknown" where metadata is missing or damaged."""
    packages = {name: version_of(name) or "unknown" for name in PACKAGES}
    return {"kdscale": kdscale.__version__, "python": platform.python_version(), **packages}
