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
from kdscale.client.problems import BusyError, ChangedError, RefusedError, UnreachableError
from kdscale.errors import FileError, ServiceError
from kdscale.escaping import for_terminal

_BLOCK = 1 << 20
_SILENCE = 300.0  # seconds without a byte; the service may have to compute a digest first


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
    sha256: str,
    size: int,
    said: Callable[[int], None] = lambda _bytes: None,
) -> Path:
    """Fetch one file to `target` and return it; `said` is told how many bytes are there. Raises ServiceError.

    A file with the right content that is there already is kept; bytes of an earlier try are not asked for again.
    """
    if target.is_file() and _digest(target) == sha256:
        said(target.stat().st_size)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}"[:200])
    tries = Tries(connection.patience)
    while True:
        had = partial.stat().st_size if partial.exists() else 0
        try:
            _fetch(connection, url_path, partial, sha256, size, said)
            break
        except ChangedError:
            partial.unlink(missing_ok=True)  # the beginning of a file that is no more
            raise
        except RefusedError as error:
            if not isinstance(error, BusyError):
                raise
            tries.wait(error)
        except UnreachableError as error:
            if error.for_good:
                raise
            if partial.exists() and partial.stat().st_size > had:
                tries.begin_again()
            tries.wait(error)
    if (found := _digest(partial)) != sha256:
        partial.unlink()
        raise ServiceError(
            f"the download of {target.name}", expected=f"SHA-256 {sha256}", got=found,
            hint="the file was deleted; download it again",
        )  # fmt: skip
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(target)
    return target


def _fetch(
    connection: Connection, url_path: str, partial: Path, sha256: str, size: int, said: Callable[[int], None]
) -> None:
    """Append what is missing to `partial`."""
    had = _usable(partial, size)
    if partial.exists() and had == size:
        return
    headers = {"accept-encoding": "identity", "if-match": f'"{sha256}"'}
    if had:  # with If-Range, since the rest of a file that changed must not follow the beginning of the old one
        headers |= {"range": f"bytes={had}-", "if-range": f'"{sha256}"'}
    with connection.open("GET", url_path, headers=headers, silence=_SILENCE) as response:
        came = _start(response)
        if came not in (0, had):
            raise ServiceError("the download", expected=f"bytes from {had:,} on", got=f"bytes from {came:,} on")
        said(came)
        with partial.open("ab" if came else "wb") as stream:
            for block in response.iter_raw():  # as it comes: blocks of a size would be lost with a connection
                came += len(block)
                if came > size:
                    raise ServiceError("the download", expected=f"{size:,} bytes", got="more")
                stream.write(block)
                said(came)


def _usable(partial: Path, size: int) -> int:
    """How many bytes of an earlier try may be kept; what is no file of ours, or too long, is removed."""
    if partial.is_symlink() or (partial.exists() and partial.stat().st_size > size):
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
