"""`kdscale login`: keep the token of a service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kdscale.cli.service.options import HERE, InsecureOption, ServerOption, connect
from kdscale.errors import ConfigError
from kdscale.escaping import for_terminal

_MOST_BYTES = 4096


def login_command(
    server: ServerOption = HERE,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the token from here instead of asking for it.")
    ] = None,
    insecure_http: InsecureOption = False,
) -> None:
    """Keep the token of a service for the commands that talk to it.

    It is checked, and written into a file of yours that nobody else can read. It never is an argument, which other
    users of the machine would see.
    """
    from kdscale.files import read_text

    if token_file is None:
        token = typer.prompt(f"token for {server}", hide_input=True)
    else:
        token = read_text(token_file, ConfigError, _MOST_BYTES)
    with connect(server, insecure_http, token.strip()) as client:
        from kdscale.client.tokens import keep_token

        client.machine()  # the service says whether it knows the token
        typer.echo(for_terminal(f"the token for {client.url} is in {keep_token(client.url, token.strip())}"))
        if client.url != HERE and not os.environ.get("KDSCALE_SERVER"):
            typer.echo(for_terminal(f"for the other commands: --server {client.url}, or the variable KDSCALE_SERVER"))
