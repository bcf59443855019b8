"""Files that are either whole or absent, and paths that stay where they belong.

Everything kdscale leaves on disk goes through here: written under a temporary name in the same folder, flushed to the
disk, renamed. A reader can then trust any file that carries its final name, whatever was killed and when.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from kdscale.errors import CheckpointError, FileError, KdscaleError, RunFolderError

_TMP_MARK = ".partial-"
_HINT_BY_ERRNO = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, finished work is kept",
    errno.EROFS: "the file system is read-only: choose another folder with --set run_dir=...",
    errno.EACCES: "permission denied: choose another folder with --set run_dir=... or change its permissions",
    errno.EPERM: "operation not permitted: choose another folder with --set run_dir=... or change its permissions",
}


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full, read-only, forbidden) into errors that say what to do."""
    try:
        yield
    except OSError as error:
        hint = _HINT_BY_ERRNO.get(error.errno or 0)
        if hint is None:
            raise
        raise RunFolderError(f"cannot write {path}", got=os.strerror(error.errno or 0), hint=hint) from error


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an exception it becomes `path`."""
    tmp = path.with_name(f"{_TMP_MARK}{os.getpid()}-{path.name}")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            fsync_file(tmp)
            tmp.replace(path)
            fsync_dir(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; when the block ends without an exception it replaces `path`."""
    tmp = path.with_name(f"{_TMP_MARK}{os.getpid()}-{path.name}")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(tmp)
        tmp.mkdir()
        try:
            yield tmp
            replace_dir(tmp, path)
        finally:
            remove_tree(tmp)


def replace_dir(new: Path, path: Path) -> None:
    """Give the finished folder `new` the name `path` on the same file system, in the place of what is there."""
    with explain_os_errors(path):
        for item in sorted(new.rglob("*")):
            if item.is_file():
                fsync_file(item)
        for folder in [new, *(item for item in new.rglob("*") if item.is_dir())]:
            fsync_dir(folder)
        if path.exists():
            # A folder cannot be replaced in one step: the old one steps aside, so that `path` is never half new.
            old = path.with_name(f"{_TMP_MARK}{os.getpid()}-old-{path.name}")
            path.replace(old)
            new.replace(path)
            remove_tree(old)
        else:
            new.replace(path)
        fsync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a file or a folder with all in it; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what killed processes left half-written directly under `folder`; returns what was removed."""
    left = list(folder.glob(f"{_TMP_MARK}*"))
    for item in left:
        remove_tree(item)
    return left


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Two spaces, final newline, keys in the order given (a reader's order); NaN and Infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, error: type[KdscaleError] = FileError) -> Any:
    """The content of a JSON file. Raises `error`, naming the file, when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing", expected="a JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(f"{path} is not valid JSON", got=str(problem)) from problem


def sha256_file(path: Path, size: int | None = None) -> str:
    """Of the whole file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        while block := stream.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def safe_join(folder: Path, name: str) -> Path:
    """`folder / name`, refused when `name` (from a manifest we did not write) would leave `folder`.

    The check is on the name alone: a hub cache's own entries are symbolic links to a blob store beside the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise CheckpointError(
            f"{folder} names a file outside itself", expected="a name inside the folder", got=repr(name)
        )
    return folder / parts
