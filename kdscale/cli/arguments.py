"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. prune.target_params=4B. Repeatable."),
]
AcceptOption = Annotated[
    bool,
    typer.Option("--accept-changes", help="The run folder belongs to another config: redo what the changes touch."),
]
