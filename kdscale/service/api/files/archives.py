"""A folder as one download: tar or zip without compression, made while it is sent; weights do not compress anyway."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Literal

from kdscale.service.api.files.content import open_file
from kdscale.service.api.files.folder import RunFile

Format = Literal["tar", "zip"]
MEDIA_TYPES: dict[Format, str] = {"tar": "application/x-tar", "zip": "application/zip"}
_BLOCK = 1 << 18
_EARLIEST = 315_532_800  # 1980, before which a zip has no time


def archive(files: Sequence[RunFile], inside: str, format_: Format) -> Iterator[bytes]:
    """The bytes of an archive of these files; names in it begin with the last part of `inside`.

    A file that is cut short, or replaced by another one, before it is sent ends the download as broken; what is added
    to one meanwhile is left out.
    """
    names = {file.path: _name_in(file.path, inside) for file in files}
    makers: dict[Format, Callable[[Sequence[RunFile], dict[str, str]], Iterator[bytes]]] = {"tar": _tar, "zip": _zip}
    return makers[format_](files, names)


def _name_in(path: str, inside: str) -> str:
    root = PurePosixPath(inside)
    return str(PurePosixPath(root.name) / PurePosixPath(path).relative_to(root))


def _tar(files: Sequence[RunFile], names: dict[str, str]) -> Iterator[bytes]:
    for file in files:
        yield _tar_header(file, names[file.path])
        yield from _content(file)
        yield b"\0" * (-file.found.st_size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def tar_bytes(files: Sequence[RunFile], inside: str) -> int:
    """How large the tar is."""
    block = tarfile.BLOCKSIZE
    headers = sum(len(_tar_header(file, _name_in(file.path, inside))) for file in files)
    return headers + sum(-(-file.found.st_size // block) * block for file in files) + 2 * block


def _tar_header(file: RunFile, name: str) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = file.found.st_size, int(file.found.st_mtime), 0o644
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _content(file: RunFile) -> Iterator[bytes]:
    """The bytes that a file had when the list was made."""
    with open_file(file.place) as stream:
        now = os.fstat(stream.fileno())
        if (now.st_dev, now.st_ino) != (file.found.st_dev, file.found.st_ino) and now.st_size != file.found.st_size:
            raise OSError(f"{file.path} was replaced before it was sent")  # its beginning alone would look whole
        offset, size = 0, file.found.st_size
        while offset < size:
            block = os.pread(stream.fileno(), min(_BLOCK, size - offset), offset)
            if not block:
                raise OSError(f"{file.path} was cut short while it was sent")
            yield block
            offset += len(block)


class _Drain(io.RawIOBase):
    """A file that can only be written on, and gives away what was written."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, block: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Keep the bytes until they are taken."""
        self._blocks.append(bytes(block))
        return len(self._blocks[-1])

    def take(self) -> bytes:
        """What was written since the last time."""
        blocks, self._blocks = self._blocks, []
        return b"".join(blocks)


def _zip(files: Sequence[RunFile], names: dict[str, str]) -> Iterator[bytes]:
    drain = _Drain()
    with zipfile.ZipFile(drain, "w", zipfile.ZIP_STORED) as out:
        for file in files:
            # a name that is not UTF-8 cannot stand in a zip as it is
            name = names[file.path].encode("utf-8", "replace").decode()
            entry = zipfile.ZipInfo(name)
            entry.file_size, entry.external_attr = file.found.st_size, 0o644 << 16
            entry.date_time = _date(file.found.st_mtime)
            with out.open(entry, "w", force_zip64=True) as member:
                for block in _content(file):
                    member.write(block)
                    yield drain.take()
            yield drain.take()
    yield drain.take()


def _date(seconds: float) -> tuple[int, int, int, int, int, int]:
    from datetime import UTC, datetime

    time = datetime.fromtimestamp(max(seconds, _EARLIEST), UTC)
    return time.year, time.month, time.day, time.hour, time.minute, time.second
