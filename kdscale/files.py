"""Files that are either complete or absent, and paths that stay inside their folder.

Everything that kdscale leaves on disk is written under a temporary name in the same folder, flushed to the disk and
renamed. A reader can trust any file that has its final name, whatever was killed and when.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from kdscale.errors import CheckpointError, FileError, KdscaleError, RunFolderError
from kdscale_launch.watchdog import beat

_TMP_MARK = ".partial-"
_HINT_BY_ERRNO = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, finished work is kept",
    errno.EROFS: "the file system is read-only: choose another folder with --set run_dir=...",
    errno.EACCES: "permission denied: choose another folder with --set run_dir=... or change its permissions",
    errno.EPERM: "operation not permitted: choose another folder with --set run_dir=... or change its permissions",
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),
        "a file is in the place of a folder, or a folder in the place of a file: move it away",
    ),
    errno.EFBIG: "the file would be larger than `ulimit -f` or the file system allows: raise it, or choose another "
    "folder with --set run_dir=...",
}
# How numpy and safetensors report a failed write, each without an errno of its own.
_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_SAFETENSORS_CODE = re.compile(r"\b(?:code:|os error) (\d+)")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_JSON_BYTES, MAX_JSON_DEPTH = 64 << 20, 64
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors (full, read-only, forbidden) while `path` is written into one that says what to do.

    Raises RunFolderError, or FileError when the error names a file that is not under `path` (or beside it, where `path`
    is a file): then it is an input that cannot be read.
    """
    try:
        yield
    except Exception as error:
        code = _errno_of(error)
        hint = _HINT_BY_ERRNO.get(code)
        if hint is None:
            raise
        file = getattr(error, "filename", None)
        if isinstance(file, str) and not _is_under(Path(file), path):
            raise FileError(
                f"cannot read {file}", got=os.strerror(code), hint="change its permissions, or name another file"
            ) from error
        raise RunFolderError(f"cannot write {path}", got=os.strerror(code), hint=hint) from error


def _errno_of(error: Exception) -> int:
    """The system's error number behind an exception, 0 for none."""
    if isinstance(error, OSError):
        if error.errno is None and _NUMPY_SHORT_WRITE.search(str(error)):
            return errno.ENOSPC
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (match := _SAFETENSORS_CODE.search(str(error))):
        return int(match[1])
    return 0


def _is_under(file: Path, path: Path) -> bool:
    base = path if path.is_dir() else path.parent
    return file.absolute().is_relative_to(base.absolute()) or file.resolve().is_relative_to(base.resolve())


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
    beat()


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


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is being written, or was when its writer was killed."""
    return name.startswith(_TMP_MARK)


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


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, from its first byte on; it appears complete or not at all."""
    with atomic_path(path) as tmp:
        tmp.unlink(missing_ok=True)  # a killed process of the same number left it
        # made and closed to others later, it could be opened in between
        handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON: two spaces, a final newline, keys in their order. Raises ValueError for NaN and Infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, error: type[KdscaleError] = FileError, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error`, naming the file, for anything else."""
    try:
        # without O_NONBLOCK the opening of a FIFO waits for somebody who writes to it
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            content = _read_up_to(handle, limit + 1) if regular else b""
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise error(f"{path} is missing", expected="a file") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read", got=getattr(problem, "strerror", None) or str(problem)) from problem
    if not regular:
        raise error(f"{path} is not a regular file", expected="a file")
    if len(content) > limit:
        raise error(f"{path} is too large", expected=f"at most {limit:,} bytes")
    return content


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file to read; raises OSError for anything else, and never waits for the writer of a FIFO."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield stream


def _read_up_to(handle: int, size: int) -> bytes:
    blocks = []
    while size > 0 and (block := os.read(handle, min(size, 1 << 24))):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)


def read_text(path: Path, error: type[KdscaleError] = FileError, limit: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a regular file. Raises `error`, naming the file."""
    try:
        return read_bytes(path, error, limit).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text", got=str(problem)[:200]) from problem


def read_json(
    path: Path,
    error: type[KdscaleError] = FileError,
    *,
    expect: type = object,
    unique: bool = False,
    limit: int = MAX_JSON_BYTES,
) -> Any:
    """The content of a JSON file, whose outermost value must be an `expect`.

    Raises `error`, naming the file, when it is missing, no regular file, too large, too deep, not JSON or another type;
    with `unique` also when an object has a key twice.
    """
    return parse_json(read_text(path, error, limit), str(path), error, expect=expect, unique=unique)


def parse_json(
    text: str, where: str, error: type[KdscaleError] = FileError, *, expect: type = object, unique: bool = False
) -> Any:
    """The value of a JSON text, checked like a file that `read_json` reads; `where` names it in messages."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys if unique else None)
    except (ValueError, RecursionError) as problem:
        got = "too many brackets" if isinstance(problem, RecursionError) else str(problem)[:200]
        raise error(f"{where} is not valid JSON", got=got) from problem
    if not isinstance(value, expect):
        got = _JSON_NAMES.get(type(value), "null")
        raise error(f"{where} holds something else", expected=_JSON_NAMES[expect], got=got)
    if _is_deeper_than(value, MAX_JSON_DEPTH):
        raise error(f"{where} is nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels")
    if _SURROGATE.search(text) and not _is_unicode(value):
        raise error(f"{where} is not valid Unicode", got="half of a surrogate pair")
    return value


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses repeated keys, of whose values all but the last would be lost silently."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} appears twice")
        values[key] = value
    return values


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        containers = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for items in containers for child in items if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def is_plain_or_absent(path: Path) -> bool:
    """Whether `path` can be written as a file: no folder, FIFO or loop of links is in its place."""
    return path.is_file() or not os.path.lexists(path)


def set_aside(path: Path, say: Callable[[str], None] | None = None) -> None:
    """Rename damaged state of our own to `<name>.damaged`, so that it can be made again, and report it."""
    aside = path.with_name(f"{path.name}.damaged")
    with explain_os_errors(path):
        remove_tree(aside)
        path.replace(aside)
    (say or _to_stderr)(f"warning: {path} is damaged; it was renamed to {aside.name} and is made again")


def read_own_json(
    path: Path,
    is_valid: Callable[[Any], bool],
    say: Callable[[str], None] | None = None,
    limit: int = MAX_JSON_BYTES,
) -> Any:
    """JSON that kdscale itself wrote, or None where there is none or it is damaged.

    A damaged file is set aside with a notice through `say` (standard error by default), so that it never stops a run.
    """
    if not os.path.lexists(path):
        return None
    try:
        value = read_json(path, limit=limit)
        if is_valid(value):
            return value
    except FileError:
        pass
    set_aside(path, say)
    return None


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def sha256_file(path: Path, size: int | None = None) -> str:
    """Hex digest of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        while block := stream.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
            beat()
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
