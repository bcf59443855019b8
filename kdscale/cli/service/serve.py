"""`kdscale serve`: start a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdscale.escaping import for_terminal

_PACKAGES = (
    "fastapi", "uvicorn", "sqlalchemy", "alembic", "sse_starlette", "itsdangerous", "prometheus_client",
    "python_multipart", "httpx",
)  # fmt: skip


def serve_command(
    home: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the service keeps everything, and its settings: serve.yaml.")
    ] = Path("kdscale-service"),
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless set.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, metavar="N", help="8765 unless set; 0 takes a free one.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, max=2**16, metavar="N", help="Runs share N devices; by default all of this machine."),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder that configs may name: teachers, text. Repeatable."),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Answer over TLS (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key.")] = None,
    insecure_http: Annotated[
        bool, typer.Option("--insecure-http", help="Let other machines connect without TLS: a proxy speaks it.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Add the runs of run folders that the database lacks.")
    ] = False,
) -> None:
    """Start a service to which a team submits runs: a queue, a page and an API.

    It listens on this machine alone unless told otherwise. Ctrl-C stops it; its runs go on.
    """
    check_packages("kdscale serve")
    from kdscale.service.settings import load_settings

    given = {
        "host": host, "port": port, "slots": slots, "roots": tuple(str(path.absolute()) for path in root or ()) or None,
        "tls_certificate": _text(tls_certificate), "tls_key": _text(tls_key), "insecure_http": insecure_http or None,
    }  # fmt: skip
    settings = load_settings(home, given)
    from kdscale.service.server import serve

    serve(settings, anew=rebuild, say=lambda line: typer.echo(for_terminal(line)))


def check_packages(command: str) -> None:
    """Raises ConfigError when what a service is made of is not installed; `command` needs it."""
    from kdscale.runtime.packages import require_packages

    require_packages(command, _PACKAGES, "service")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
