"""`kdscale download`: bring files of a run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli.service.options import HERE, InsecureOption, RunIdArgument, ServerOption, connect
from kdscale.errors import ConfigError
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from kdscale.client import Artifact, Client


def download_command(
    run: RunIdArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or folder of the run.")] = "student",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes; by default a folder with the run's name.")
    ] = None,
    server: ServerOption = HERE,
    insecure_http: InsecureOption = False,
) -> None:
    """Download a run's student, or another file or folder of it.

    What an earlier download brought is kept and gone on with. Every file is checked by its SHA-256.
    """
    from kdscale.runtime.progress import Reporter
    from kdscale.units import format_size

    wanted = path.strip("/")
    with connect(server, insecure_http, waits=True) as client:
        folder, files = out or Path(client.run(run).name), _files(client, run, wanted)
        total = sum(item.bytes for item in files)
        with Reporter().bar("download", total, "B") as bar:
            for item in files:
                client.download(run, item, folder, said=_Increments(bar.advance))
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    typer.echo(for_terminal(f"{count}, {format_size(total)}: {folder / wanted}"))


class _Increments:
    """Tells a bar how many bytes more there are than when it was told last; fewer where a file begins anew."""

    def __init__(self, advance: Callable[[float], None]):
        self._advance, self._told = advance, 0

    def __call__(self, there: int) -> None:
        self._advance(there - self._told)
        self._told = there


def _files(client: Client, run: str, wanted: str) -> list[Artifact]:
    """The files of a folder of the run, or one file. Raises ConfigError that says what there is."""
    from kdscale.client import UnknownError

    try:
        if found := list(client.artifacts(run, wanted)):
            return found
    except UnknownError:  # no folder
        pass
    try:
        return [client.artifact(run, wanted)]
    except UnknownError as error:
        tops = sorted({item.path.partition("/")[0] for item in client.artifacts(run)})
        raise ConfigError(
            f"run {run} has no {wanted}", expected=f"one of {', '.join(tops)}" if tops else None,
            got=None if tops else "no files yet", hint=f"kdscale runs {run} shows how far it is",
        ) from error  # fmt: skip
