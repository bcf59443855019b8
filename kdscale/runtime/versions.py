"""Versions of the packages that decide the numbers."""

from __future__ import annotations

import platform
from importlib import metadata

import kdscale


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"kdscale": kdscale.__version__, "python": platform.python_version(), **found}
