"""`kdscale retention` and `kdscale backup`: for whoever runs a service, on its machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kdscale.cli.service.serve import check_packages
from kdscale.cli.tables import note, table
from kdscale.units import compact_duration, format_size

if TYPE_CHECKING:
    from kdscale.service.operations.retention import Removal, Retention
    from kdscale.service.settings import ServiceSettings

HomeOption = Annotated[Path, typer.Option(metavar="DIR", help="The service's folder.")]


def retention_command(
    home: HomeOption = Path("kdscale-service"),
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is due, as the service does hourly.")] = False,
) -> None:
    """Show what a service will delete, and when: nothing unless `retention` in its serve.yaml says so."""
    with _retention(home) as retention:
        if delete:
            gone = retention.step()
            note(f"deleted: {_sum(gone)}", "dim")
        plan, now = retention.plan(), time.time()
    if not plan:
        note("nothing will be deleted", "dim")
        return
    rows = [
        (removal.kind, removal.run_id, removal.name, format_size(removal.size), _when(removal, now)) for removal in plan
    ]
    Console().print(table("", ("what", "run", "name", "size", "deleted"), rows))
    for reason in dict.fromkeys(removal.kept for removal in plan if removal.kept):
        note(f"kept: {reason}")
    note(f"together: {_sum(plan)}", "dim")


def backup_command(
    to: Annotated[Path, typer.Argument(metavar="TO", help="A new folder, which appears when it is complete.")],
    home: HomeOption = Path("kdscale-service"),
    everything: Annotated[
        bool, typer.Option("--everything", help="With checkpoints, targets and text, which are large.")
    ] = False,
) -> None:
    """Copy a service, also while it runs: database, keys, settings and run folders.

    To restore, put the copy in the place of the service's folder, and start the service.
    """
    from kdscale.service.operations.backup import back_up

    done = back_up(_settings("kdscale backup", home), to, everything=everything, say=lambda line: note(line, "dim"))
    for line in done.left_out:
        note(f"not copied: {line}")
    note(f"{to}: runs: {done.runs:,}, files: {done.files:,}, {format_size(done.size)}", "green")


def _when(removal: Removal, now: float) -> str:
    if removal.kept:
        return "kept"
    return "now" if removal.due <= now else f"in {compact_duration(removal.due - now)}"


@contextmanager
def _retention(home: Path) -> Iterator[Retention]:
    settings = _settings("kdscale retention", home)
    from kdscale.service.database.connection import open_database
    from kdscale.service.notices.sender import Notices
    from kdscale.service.operations.retention import Retention

    database = open_database(settings)
    try:
        yield Retention(settings, database, Notices(settings, database))
    finally:
        database.close()


def _settings(command: str, home: Path) -> ServiceSettings:
    """The settings of a service that has been started once. Raises ConfigError where there is none."""
    check_packages(command)
    from kdscale.errors import ConfigError
    from kdscale.service.settings import load_settings

    settings = load_settings(home)
    if not home.is_dir() or (settings.database is None and not (home / "service.db").is_file()):
        raise ConfigError(
            f"--home {home}", expected="the folder of a service that was started once", got="no service.db in it",
            hint="kdscale serve begins one",
        )  # fmt: skip
    return settings


def _sum(removals: Sequence[Removal]) -> str:
    return f"{len(removals):,}, {format_size(sum(removal.size for removal in removals))}"
