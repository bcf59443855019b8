"""A config as the page shows it: what is not as by default, and the command that runs the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from kdscale.config.root import Config
from kdscale.report.compare.settings import dotted_fields
from kdscale.service.page.rendering import in_short

_OF_EVERY_RUN = ("name", "run_dir")
_LINE = 72  # characters of a command that stays on one line


@dataclass(frozen=True)
class Change:
    """A field that is not as by default, in words; `old` is None where there is no default."""

    field: str
    old: str | None
    new: str


def changes(config: Mapping[str, Any]) -> list[Change]:
    """The fields of a resolved config that are not as by default."""
    defaults, own = _defaults(), {name: value for name, value in config.items() if name not in _OF_EVERY_RUN}
    by_default = dict(dotted_fields(defaults))
    found = []
    for field, value in dotted_fields(own):
        old = by_default[field] if field in by_default else _at(defaults, field)
        if old != value:
            found.append(Change(field, None if old is None else in_short(old), in_short(value)))
    return found


def _at(tree: Any, field: str) -> Any:
    """The section at a dotted field of a tree; None where there is none."""
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


@cache
def _defaults() -> dict[str, Any]:
    return _defaults_of(Config)


def _defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    """Every default of a section and of the sections in it; fields that must be given are left out."""
    out: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            out[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out[name] = _defaults_of(field.annotation)
    return out


def command_line(program: str, config_name: str, overrides: Sequence[str], *more: tuple[str, str]) -> str:
    """A command that runs a config, as a shell reads it; `config.yaml` where the config has no name."""
    options = [*more, *(("--set", override) for override in overrides)]
    lines = [shlex.join(["kdscale", program, config_name or "config.yaml"]), *map(shlex.join, options)]
    return (" " if sum(map(len, lines)) < _LINE else " \\\n  ").join(lines)
