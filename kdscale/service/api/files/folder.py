"""The files of a run folder that may be had: none outside of it, none with a secret, none that is half written."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.errors import CheckpointError
from kdscale.files import is_unfinished, safe_join
from kdscale.service.problems import Problem

_SECRET_NAMES = {TEACHER_TOKEN, ".lock"}
_SECRET_ENDS = (".token", ".key", ".pem", ".env")
_MOST_FILES = 200_000  # that are looked at for one list or archive


@dataclass(frozen=True)
class RunFile:
    """A file that may be had, by its path in the run folder."""

    path: str
    place: Path
    found: os.stat_result


def resolved(folder: Path, name: str) -> Path:
    """The file or folder `name` of a run folder, all links followed. Raises a Problem for anything outside of it."""
    try:
        path = safe_join(folder, name).resolve(strict=True)
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise _nothing(name) from error
    root = folder.resolve()
    if not path.is_relative_to(root) or not all(map(is_shown, (*path.relative_to(root).parts, *Path(name).parts))):
        raise _nothing(name)
    return path


def is_shown(name: str) -> bool:
    """Whether a file or folder of this name is anybody's business."""
    return name not in _SECRET_NAMES and not name.endswith(_SECRET_ENDS) and not is_unfinished(name)


def files_under(folder: Path, under: str = "") -> list[RunFile]:
    """The files of a run folder, sorted by their paths; links are not followed, but may be asked for by name."""
    start, files = resolved(folder, under) if under else folder.resolve(), list[RunFile]()
    if not start.is_dir():
        raise _nothing(under)
    for here, folders, names in os.walk(start):
        folders[:] = filter(is_shown, folders)
        for path in (Path(here) / name for name in names if is_shown(name)):
            try:
                found = path.stat(follow_symlinks=False)
            except OSError:  # removed meanwhile
                continue
            if stat.S_ISREG(found.st_mode):
                files.append(RunFile((Path(under) / path.relative_to(start)).as_posix(), path, found))
        if len(files) >= _MOST_FILES:
            break
    return sorted(files, key=lambda file: file.path)


def _nothing(name: str) -> Problem:
    return Problem(404, "not-found", f"the run has no file {name[:200]!r}")
