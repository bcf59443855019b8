"""Arguments that several commands share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdscale.config.root import Config

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. prune.target_params=4B. Repeatable."),
]

AcceptOption = Annotated[
    bool,
    typer.Option("--accept-changes", help="The run folder belongs to another config: redo what the changes touch."),
]


def load(name: str, overrides: list[str] | None) -> Config:
    """The config of a path or a shipped name, with overrides. Raises ConfigError.

    The config.yaml of a run folder stands for the run where it is now, also when the folder was moved.
    """
    from kdscale.config.load import find_config, load_config

    path, overrides = find_config(name), list(overrides or [])
    if path.name == "config.yaml" and (path.parent / "events.jsonl").is_file():
        overrides = [f"run_dir={json.dumps(str(path.parent))}", *overrides]
    return load_config(path, overrides)
