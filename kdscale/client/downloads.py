"""Files of a run, brought here whole or not at all: a broken download goes on where it stopped, and is checked.

A file appears under its name once its SHA-256 is the one that the service told. Names come from the service and are
not trusted: none leads out of the folder, also not through a link.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import httpx

from kdscale.client.connection import Connection, Tries
from kdscale.client.problems import BusyError, RefusedError, UnreachableError
from kdscale.errors import FileError, ServiceError
from kdscale.escaping import for_terminal

_BLOCK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SILENCE = 60.0  # seconds without a byte


def place_in(folder: Path, name: str) -> Path:
    """Where the artifact `name` belongs under `folder`. Raises FileError for a name that leads out of it."""
    parts = PurePosixPath(name).parts
    strange = not parts or name.startswith("/") or ".." in parts or "\\" in name or for_terminal(name) != name
    if strange or "\n" in name or "\t" in name or ":" in parts[0] or any(len(part.encode()) > 255 for part in parts):
        raise FileError("a file of the run", expected="a name inside the folder", got=repr(name)[:200])
    path, root = folder.joinpath(*parts), folder.resolve()
    if not path.parent.resolve().is_relative_to(root) or path.is_symlink():
        raise FileError(
            f"{path} cannot be written", expected=f"a path inside {folder}", got="a link that leads elsewhere"
        )
    return path


def download(
    connection: Connection,
    url_path: str,
    target: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    said: Callable[[int], None] = lambda _bytes: None,
) -> Path:
    """Fetch one file to `target` and return it; `said` is told how many bytes have come. Raises ServiceError.

    A file with the right content that is there already is kept; bytes of an earlier try are not asked for again.
    `sha256` None: the service tells it with the file.
    """
    if sha256 is not None and target.is_file() and _digest(target) == sha256:
        said(target.stat().st_size)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}"[:200])
    tries = Tries(connection.patience)
    while True:
        had = partial.stat().st_size if partial.exists() else 0
        try:
            told = _fetch(connection, url_path, partial, sha256, size, said)
            break
        except RefusedError as error:
            if error.status == 416 and had:  # more than there is: of another file
                partial.unlink()
                continue
            if not isinstance(error, BusyError):
                raise
            tries.wait(error)
        except UnreachableError as error:
            if error.for_good:
                raise
            if partial.exists() and partial.stat().st_size > had:
                tries.begin_again()
            tries.wait(error)
    expected, found = sha256 or told, _digest(partial)
    if expected is not None and found != expected:
        partial.unlink()
        raise ServiceError(
            f"the download of {target.name}", expected=f"SHA-256 {expected}", got=found,
            hint="the file was deleted; download it again",
        )  # fmt: skip
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(target)
    return target


def _fetch(
    connection: Connection, url_path: str, partial: Path, sha256: str | None, size: int | None,
    said: Callable[[int], None],
) -> str | None:  # fmt: skip
    """Append what is missing to `partial`; returns the SHA-256 in the answer's ETag."""
    had = _usable(partial, size)
    if sha256 is None:  # nothing tells whether they are of the same file
        had = 0
    if had and had == size:
        return sha256
    headers = {"accept-encoding": "identity"}
    if had:  # with If-Range, since the rest of a file that changed must not follow the beginning of the old one
        headers |= {"range": f"bytes={had}-", "if-range": f'"{sha256}"'}
    with connection.open("GET", url_path, headers=headers, silence=_SILENCE) as response:
        starts = _start(response)
        if starts not in (0, had):
            raise ServiceError("the download", expected=f"bytes from {had:,} on", got=f"bytes from {starts:,} on")
        said(starts)
        with partial.open("ab" if starts else "wb") as stream:
            came = starts
            for block in response.iter_raw():  # as it comes: blocks of a size would be lost with a connection
                stream.write(block)
                came += len(block)
                if size is not None and came > size:
                    raise ServiceError("the download", expected=f"{size:,} bytes", got="more")
                said(came)
        etag = response.headers.get("etag", "").removeprefix("W/").strip('"')
        return etag if _DIGEST.fullmatch(etag) else None


def _usable(partial: Path, size: int | None) -> int:
    """How many bytes of an earlier try may be kept; what is no file of ours, or too long, is removed."""
    if partial.is_symlink() or (partial.exists() and size is not None and partial.stat().st_size > size):
        partial.unlink()
    return partial.stat().st_size if partial.exists() else 0


def _start(response: httpx.Response) -> int:
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("content-range", ""))
    return int(match[1]) if match else -1


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
