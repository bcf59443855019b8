"""Reading a config: the YAML file, `--set` overrides, the shipped configs, and how two configs differ."""

from __future__ import annotations

import difflib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionStartEvent, Event, ScalarEvent

import kdscale
from kdscale.config import target_store
from kdscale.config.distill.objectives import OWN_TEXT
from kdscale.config.distill.on_policy import FREE_ON_POLICY
from kdscale.config.distill.settings import DECISIVE_ZERO, FREE_SETTINGS
from kdscale.config.fields import explain_errors
from kdscale.config.responses.settings import FREE_RESPONSES
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.files import read_text

_MAX_BYTES, _MAX_DEPTH, _MAX_NODES = 256 << 10, 24, 20_000  # of a YAML text; nodes with every alias written out
_PACKAGE = Path(kdscale.__file__).parent


def config_folder() -> Path:
    """`kdscale/configs` in an installed wheel (copied there by setup.py), `configs/` in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """The configs that come with kdscale, by name."""
    return {item.name.removesuffix(".yaml"): item for item in sorted(config_folder().glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A file, the config.yaml of a run folder, or a shipped config with or without .yaml. Raises ConfigError."""
    path = Path(name)
    try:
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a NUL
        raise ConfigError(f"config {name[:200]} cannot be read", got=str(error)[:200]) from error
    if is_file:
        return path
    if is_dir:
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        raise ConfigError(
            f"config {name}", expected="a YAML file, or the folder of a run", got="a folder without a run"
        )
    known = shipped_configs()
    wanted = name.removesuffix(".yaml")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted[:100], known, n=1)
    raise ConfigError(
        f"config {name[:200]} does not exist",
        expected=f"a YAML file, or one of the shipped configs: {', '.join(known)}",
        hint=f"did you mean {near[0]}?" if near else "kdscale init writes one",
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides. Raises ConfigError (exit code 2)."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist", expected="a YAML file", hint="check the path")
    tree = parse_yaml(read_text(path, ConfigError, _MAX_BYTES), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no settings", expected="a mapping", got=type(tree).__name__)
    return build_config(tree, str(path), overrides)


def build_config(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Apply overrides to a plain mapping and validate it. Raises ConfigError listing every field that is wrong."""
    _check_size(tree, origin)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in explain_errors(error, Config))
        raise ConfigError(f"{origin} cannot be used:\n{problems}") from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML."""
    return dump_yaml(config.resolved())


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that `parse_yaml` reads."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(dict(tree), stream)
    return stream.getvalue()


@dataclass(frozen=True)
class Difference:
    """A dotted field in which two trees of plain values differ."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_in_short(self.old)} → {_in_short(self.new)}"


def _in_short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def config_differences(old: Any, new: Any, prefix: str = "") -> list[Difference]:
    """The fields in which two resolved configs, or other trees of plain values, differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[Difference] = []
        for key in sorted({*old, *new}):
            out += config_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return out
    return [] if old == new else [Difference(prefix, old, new)]


# By section: the fields that may change, and what below them may not.
_MAY_CHANGE: dict[str, tuple[Collection[str], Collection[str]]] = {
    "distill": (FREE_SETTINGS, DECISIVE_ZERO),
    "targets": (target_store.FREE_SETTINGS, ()),
    "responses": (FREE_RESPONSES, ("model",)),
    "eval": (("downstream",), ()),  # a finished run may be given tasks
}


def may_change(field: str) -> bool:
    """Whether a run may go on with another value of this dotted field: the student does not depend on it."""
    section, *names = field.split(".")
    if section in ("quantize", "bias"):  # of the student, not in it
        return True
    if field == "run_dir":  # a run folder that was moved or renamed goes on where it is now
        return True
    if section == "distill" and names[:1] and names[0] in OWN_TEXT:
        return names[1:] != [] and names[1] in FREE_ON_POLICY
    free, decisive = _MAY_CHANGE.get(section, ((), ()))
    return bool(names) and names[0] in free and names[-1] not in decisive


def parse_yaml(text: str, origin: str) -> Any:
    """The plain data of a YAML text. Raises ConfigError, naming `origin`, for what is too large, too deep or tagged.

    Aliases are counted as if they were written out, so that ten lines cannot stand for a billion values.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{origin} is too large", expected=f"at most {_MAX_BYTES:,} characters")
    try:
        _check_events(YAML(typ="safe", pure=True).parse(text), origin)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{origin} is not valid YAML{where}", got=(error.problem or "")[:200]) from error
    # besides its own errors the library lets through what int(), float(), datetime() and dict() raise
    except (YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid YAML", got=str(error)[:200]) from error


def _check_events(events: Iterator[Event], origin: str) -> None:
    """Raises ConfigError unless a YAML text is plain data of a reasonable size."""
    sizes: dict[str, int] = {}  # nodes under each finished anchor
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    nodes = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{origin} is not valid YAML (line {line})", got="an alias of what is not complete")
            nodes += sizes[event.anchor]
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            if event.tag is not None and str(event.tag) != "!":
                raise ConfigError(
                    f"{origin} (line {line})", expected="plain data", got=f"the tag {str(event.tag)[:80]}"
                )
            if isinstance(event, ScalarEvent) and event.anchor:
                sizes[event.anchor] = 1
            nodes += 1
            if isinstance(event, CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
        elif open_nodes and type(event).__name__ in ("SequenceEndEvent", "MappingEndEvent"):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > _MAX_NODES or len(open_nodes) > _MAX_DEPTH:
            limit = f"at most {_MAX_NODES:,} values, {_MAX_DEPTH} levels deep"
            raise ConfigError(f"{origin} is too large (line {line})", expected=limit)


def _check_size(tree: Any, origin: str) -> None:
    """Raises ConfigError for more values than a YAML text may have: each may be an error, which takes its time."""
    left, nodes = [tree], 0
    while left:
        node = left.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
        nodes += len(inner)
        if nodes > _MAX_NODES:
            raise ConfigError(f"{origin} is too large", expected=f"at most {_MAX_NODES:,} values")
        left.extend(inner)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override[:200]}", expected="dotted.key=value, e.g. prune.target_params=4B")
    *parents, leaf = key.split(".")
    if len(parents) >= _MAX_DEPTH:
        raise ConfigError(f"--set {key[:80]}…", expected=f"a field at most {_MAX_DEPTH} levels deep")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"--set {override[:200]}", expected="a key inside a section", got=f"{parent} is a plain value"
            )
    node[leaf] = parse_yaml(raw, f"--set {key}")
