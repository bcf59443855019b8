"""The trash: what was deleted lies there for some days under a name that says when, from which run and what it was."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kdscale.errors import RunFolderError
from kdscale.files import explain_os_errors, fsync_dir
from kdscale.service.ids import RUN_ID, is_run_id
from kdscale.service.settings import ServiceSettings

_STAMP = "%Y%m%dT%H%M%SZ"
_NAME = re.compile(rf"(\d{{8}}T\d{{6}}Z)\.({RUN_ID.pattern})\.([a-z0-9_-]+)\.[0-9a-f]{{6}}")


@dataclass(frozen=True)
class Discarded:
    """Something in the trash: since when (seconds since 1970), of which run, and what it was."""

    path: Path
    since: float
    run_id: str
    what: str


def place_in_trash(settings: ServiceSettings, run_id: str, what: str, now: float) -> Path:
    """Where `what` (words of a-z, 0-9, - and _) of a run goes."""
    if not is_run_id(run_id):
        raise ValueError(f"{run_id!r} is no run id")
    stamp = datetime.fromtimestamp(now, UTC).strftime(_STAMP)
    return settings.trash / f"{stamp}.{run_id}.{what}.{secrets.token_hex(3)}"


def move_to_trash(settings: ServiceSettings, path: Path, place: Path) -> None:
    """Rename a file, a folder or a link (never what it leads to) to its place. Raises RunFolderError."""
    if not path.parent.resolve().is_relative_to(settings.folder.resolve()):
        raise RunFolderError(
            f"{path} is not deleted", expected="something in the service's own folder", got="a link leads out of it"
        )
    with explain_os_errors(settings.trash):
        settings.trash.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        fsync_dir(settings.trash)
        fsync_dir(path.parent)


def in_trash(settings: ServiceSettings) -> list[Discarded]:
    """What the service put into the trash, the oldest first. What somebody else put there is not its to delete."""
    found = []
    try:
        entries = sorted(settings.trash.iterdir())
    except OSError:  # none yet
        return []
    for path in entries:
        if match := _NAME.fullmatch(path.name):
            since = datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC).timestamp()
            found.append(Discarded(path, since, match[2], match[3]))
    return found
