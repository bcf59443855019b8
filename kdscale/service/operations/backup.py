"""A copy of a service from which it can be started again, made while it runs.

What is there: the database (SQLite's own online backup, so that the copy is whole), keys, settings, and of every run
folder all that is not made anew from other files. A database in Postgres has tools of its own; run folders say enough
for `--rebuild` without it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from kdscale.errors import ConfigError, ServiceError
from kdscale.files import atomic_dir, explain_os_errors
from kdscale.service.settings import SETTINGS_FILE, ServiceSettings

DATABASE = "service.db"
# Beside the folders of runs and jobs. Everything else in the home folder is a log, a lock or trash.
KEPT_FILES = (SETTINGS_FILE, "secret.key", "webhook.key")
# In a run folder: large, and made again by the same command, or only needed to go on with a run.
LEFT_OUT = ("work", "checkpoints", "targets", "data", ".lock", "logs/tensorboard", "logs/profile")


@dataclass
class Backup:
    """What was copied."""

    files: int = 0
    size: int = 0
    runs: int = 0
    left_out: list[str] = field(default_factory=list)  # why something is not there


def back_up(
    settings: ServiceSettings, to: Path, *, everything: bool = False, say: Callable[[str], None] = lambda line: None
) -> Backup:
    """Copy the service's home folder to the new folder `to`, which appears when it is complete.

    `everything`: with checkpoints, stored targets, text and logs too. Raises ConfigError for a place that is taken or
    within the home folder, and RunFolderError where it cannot be written.
    """
    home, to = settings.folder.resolve(), to.absolute()
    if not home.is_dir():
        raise ConfigError(f"--home {settings.home}", expected="the folder of a service", got="no such folder")
    if os.path.lexists(to):
        raise ConfigError(f"{to}", expected="a new folder", got="there is something")
    if to.resolve().is_relative_to(home):
        raise ConfigError(f"{to}", expected="a folder outside of the service's own")
    done = Backup()
    with atomic_dir(to) as folder:
        folder.chmod(0o700)  # it holds keys
        _copy_database(settings, folder, done)
        for name in KEPT_FILES:
            if (home / name).is_file():
                _copy(home / name, folder / name, done)
        # before the run folders: what an attempt says that it has finished is then in the copy of its folder
        for job in sorted(_folders(settings.jobs)):
            _copy_tree(job, folder / "jobs" / job.name, (), done)
        for run in sorted(path for path in _folders(settings.runs) if path.is_dir() and not path.is_symlink()):
            say(f"run {run.name}")
            _copy_tree(run, folder / "runs" / run.name, () if everything else LEFT_OUT, done)
            done.runs += 1
    return done


def _copy_database(settings: ServiceSettings, folder: Path, done: Backup) -> None:
    path = settings.folder / DATABASE
    if settings.database is not None:
        done.left_out.append("the database, which the settings name: copy it with its own tools (pg_dump)")
        return
    if not path.is_file():
        done.left_out.append("the database: there is none yet")
        return
    copy = folder / DATABASE
    try:
        with (
            closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target, pages=1024, sleep=0.01)  # in parts, so that nobody who writes waits for long
            target.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it
            sound = target.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        raise ServiceError(f"{path} cannot be copied", got=str(error)) from error
    if sound != "ok":
        raise ServiceError(f"{path} is damaged", got=str(sound)[:500], hint="kdscale serve --rebuild makes a new one")
    copy.chmod(0o600)
    done.files, done.size = done.files + 1, done.size + copy.stat().st_size


def _folders(path: Path) -> Iterator[Path]:
    return iter(path.iterdir()) if path.is_dir() else iter(())


def _copy_tree(source: Path, target: Path, left_out: tuple[str, ...], done: Backup) -> None:
    """Copy a folder while others write in it: what vanishes meanwhile is not there, links are copied as links."""
    for name, folders, files in os.walk(source):
        place = Path(name)
        inner = place.relative_to(source)
        folders[:] = [item for item in folders if not _is_left_out(inner / item, left_out)]
        (target / inner).mkdir(parents=True, exist_ok=True)
        for item in (*files, *(item for item in folders if (place / item).is_symlink())):
            if not (_is_left_out(inner / item, left_out) or item.startswith(".partial-")):
                _copy(place / item, target / inner / item, done)


def _is_left_out(path: Path, left_out: tuple[str, ...]) -> bool:
    """Whether a path of a run folder, or of one of its steps, is in the list."""
    parts = path.parts[2:] if path.parts[:1] == ("steps",) and len(path.parts) > 2 else path.parts
    return "/".join(parts) in left_out


def _copy(source: Path, target: Path, done: Backup) -> None:
    try:
        info = source.lstat()
        if stat.S_ISLNK(info.st_mode):
            target.symlink_to(source.readlink())
            return
        if not stat.S_ISREG(info.st_mode):
            return
        with explain_os_errors(target):
            shutil.copy2(source, target, follow_symlinks=False)
    except FileNotFoundError:
        return
    done.files, done.size = done.files + 1, done.size + info.st_size
