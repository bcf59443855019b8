"""Configs that come with kdscale, by name: `kdscale run demo` works from a checkout and from a wheel alike."""

from __future__ import annotations

import difflib
from pathlib import Path

import kdscale
from kdscale.errors import ConfigError

_PACKAGE = Path(kdscale.__file__).parent


def config_folder() -> Path:
    """`kdscale/configs` in an installed wheel (copied there by setup.py), `configs/` in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_config(name: str) -> Path:
    """A path that exists, or a shipped config's name with or without .yaml. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config {name}", expected="a YAML file", got="a folder")
    known = {item.name.removesuffix(".yaml"): item for item in sorted(config_folder().glob("*.yaml"))}
    wanted = name.removesuffix(".yaml")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    raise ConfigError(
        f"config {name} does not exist",
        expected=f"a YAML file, or one of the shipped configs: {', '.join(known)}",
        hint=f"did you mean {near[0]}?" if near else None,
    )
