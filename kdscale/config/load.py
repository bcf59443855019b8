"""Reading a config: the YAML file, `--set` overrides, the shipped configs, and how two configs differ."""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

import kdscale
from kdscale.config.distill import FREE_SETTINGS, QUANTIZED
from kdscale.config.fields import explain_error
from kdscale.config.root import Config
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides. Raises ConfigError (exit code 2)."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist", expected="a YAML file", hint="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text", got=str(error)) from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no settings", expected="a mapping", got=type(tree).__name__)
    return build_config(tree, str(path), overrides)


def build_config(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Apply overrides to a plain mapping and validate it. Raises ConfigError listing every field that is wrong."""
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {explain_error(item, Config)}" for item in error.errors())
        raise ConfigError(f"{origin} cannot be used:\n{problems}") from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config.resolved(), stream)
    return stream.getvalue()


@dataclass(frozen=True)
class Difference:
    """A dotted field in which two trees of plain values differ."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old} → {self.new}"


def config_differences(old: Any, new: Any, prefix: str = "") -> list[Difference]:
    """The fields in which two resolved configs, or other trees of plain values, differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[Difference] = []
        for key in sorted({*old, *new}):
            out += config_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return out
    return [] if old == new else [Difference(prefix, old, new)]


def may_change(field: str) -> bool:
    """Whether a run may go on with another value of this dotted field: the student does not depend on it."""
    section, *names = field.split(".")
    return section == "distill" and bool(names) and names[0] in FREE_SETTINGS and names[-1] not in QUANTIZED


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{origin} is not valid YAML{where}", got=error.problem) from error
    except YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML", got=str(error)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}", expected="dotted.key=value, e.g. prune.target_params=4B")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}", expected="a key inside a section", got=f"{parent} is a plain value")
    node[leaf] = _parse_yaml(raw, f"--set {key}")
