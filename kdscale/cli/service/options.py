"""Arguments that the commands which talk to a service share, and the client they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdscale.client import Client

HERE = "http://127.0.0.1:8765"  # where kdscale serve answers unless told otherwise

ServerOption = Annotated[
    str,
    typer.Option("--server", metavar="URL", envvar="KDSCALE_SERVER", help="The service's address.", show_envvar=True),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure-http", help="Send the token over plain HTTP to another machine.")
]
RunIdArgument = Annotated[str, typer.Argument(metavar="RUN", help="The id of a run; kdscale runs lists them.")]

_QUICK, _LONG = 10.0, 600.0  # seconds that a service may be away


def connect(url: str, insecure_http: bool, token: str | None = None, *, waits: bool = False) -> Client:
    """A client of the service. `waits`: it follows a run, and bears that the service is away for longer.

    Raises ConfigError when httpx is not installed, or there is no token.
    """
    from kdscale.errors import ConfigError
    from kdscale.runtime.packages import require_packages

    require_packages("commands that talk to a service", ("httpx",), "client")
    from kdscale.client import Client, Patience

    client = Client(url, token, allow_http=insecure_http, patience=Patience(_LONG if waits else _QUICK))
    if not client.has_token:
        raise ConfigError(
            f"a token for {client.url}", expected="one that kdscale login kept, or the variable KDSCALE_TOKEN",
            got="neither", hint=f"kdscale login --server {client.url}",
        )  # fmt: skip
    return client
