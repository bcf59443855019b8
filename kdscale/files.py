"""Files that are either complete or absent, and paths that stay inside their folder.

Everything that kdscale leaves on disk is written under a temporary name in the same folder, flushed to the disk and
renamed. A reader can trust any file that has its final name, whatever was killed and when.
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
    """Turn the operating system's errors (full, read-only, forbidden) into a RunFolderError that says what to do."""
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
    """Make the content of `path` survive a power cut."""
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
    """Rename the finished folder `new` to `path` on the same file system, replacing what is there."""
    with explain_os_errors(path):
        for item in sorted(new.rglob("*")):
            if item.is_file():
                fsync_file(item)
        for folder in [new, *(item for item in new.rglob("*") if item.is_dir())]:
            fsync_dir(folder)
        if path.exists():
            # A folder cannot be replaced in one step: the old one is renamed first, so that `path` is never half new.
            old = path.with_name(f"{_TMP_MARK}{os.getpid()}-old-{path.name}")
            path.replace(old)
            new.replace(path)
            remove_tree(old)
        else:
            new.replace(path)
        fsync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with everything in it; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what killed processes left half written directly under `folder`; returns what was removed."""
    leftovers = list(folder.glob(f"{_TMP_MARK}*"))
    for item in leftovers:
        remove_tree(item)
    return leftovers


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8; the file appears complete or not at all."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON: two spaces, a final newline, keys in their order. Raises ValueError for NaN and Infinity."""
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
    """Hex digest of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        while block := stream.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def safe_join(folder: Path, name: str) -> Path:
    """`folder / name`, refused when `name` (from a manifest we did not write) would leave `folder`.

    Only the name is checked, not where links lead: entries of a hub cache are links to a store beside the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise CheckpointError(
            f"{folder} names a file outside itself", expected="a name inside the folder", got=repr(name)
        )
    return folder / parts
