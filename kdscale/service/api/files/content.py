"""One file as an answer: ranges, tags and conditions of RFC 9110, all of one open file.

The tag is the SHA-256 of the bytes that are sent. A file that is replaced or that grows meanwhile changes nothing of an
answer that has begun: it is opened once, and has the size that it had then.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kdscale.service.problems import Problem
from kdscale.service.regular_files import open_regular

_BLOCK = 1 << 18
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_KEPT_DIGESTS = 100_000

FileKey = tuple[int, int, int, int]  # device, inode, size, time of the last change


class Digests:
    """SHA-256 by file, size and time: a file is read anew only when it changed. Threads share one."""

    def __init__(self) -> None:
        self._known: OrderedDict[FileKey, str] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, key: FileKey) -> str | None:
        """The digest, if it was computed before."""
        with self._lock:
            return self._known.get(key)

    def of(self, handle: int, found: os.stat_result) -> str:
        """The digest of the bytes that an open file had when `found` was asked for, also if it grows meanwhile."""
        key = key_of(found)
        if (known := self.known(key)) is not None:
            return known
        digest, offset = hashlib.sha256(), 0
        while offset < key[2] and (block := os.pread(handle, min(1 << 22, key[2] - offset), offset)):
            digest.update(block)
            offset += len(block)
        with self._lock:
            self._known[key] = digest.hexdigest()
            if len(self._known) > _KEPT_DIGESTS:
                self._known.popitem(last=False)
        return digest.hexdigest()


def key_of(found: os.stat_result) -> FileKey:
    """What tells one state of a file from another."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_file(path: Path) -> io.FileIO:
    """A file, open for reading, which its last user closes. Raises a Problem where there is none."""
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:
        raise Problem(404, "not-found", "there is no such file", got=path.name[:200]) from error


@dataclass(frozen=True)
class Span:
    """Bytes of a file: the first, and the one behind the last."""

    start: int
    stop: int


def answer(request: Request, path: Path, digests: Digests, headers: Mapping[str, str]) -> Response:
    """The file, the part of it that is asked for, or that it has not changed. Raises a Problem (404, 412, 416)."""
    with ExitStack() as open_files:
        stream = open_files.enter_context(open_file(path))
        found = os.fstat(stream.fileno())
        digest, size = digests.of(stream.fileno(), found), found.st_size
        common = {
            **headers, "etag": f'"{digest}"', "accept-ranges": "bytes", "cache-control": "private, no-cache",
            "last-modified": formatdate(found.st_mtime, usegmt=True),
        }  # fmt: skip
        if (wanted := request.headers.get("if-match")) is not None and not _names(wanted, digest, weak=False):
            raise Problem(412, "precondition", "the file is another one by now", headers={"etag": common["etag"]})
        if (had := request.headers.get("if-none-match")) is not None and _names(had, digest, weak=True):
            return Response(status_code=304, headers=common)
        span, status = _span(request, size, digest), 206
        if span is None:
            span, status = Span(0, size), 200
        else:
            common["content-range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        common["content-length"] = str(span.stop - span.start)
        if request.method == "HEAD":
            return Response(status_code=status, headers=common)
        open_files.pop_all()  # the answer closes it, also where nobody takes the answer
        return StreamingResponse(_blocks(stream, span), status, common)


def _names(header: str, digest: str, *, weak: bool) -> bool:
    """Whether a header of conditions names this tag; `weak`: a weak one will do."""
    if header.strip() == "*":
        return True
    return any(match[1] == digest and (weak or not match[0].startswith("W/")) for match in _TAG.finditer(header))


def _span(request: Request, size: int, digest: str) -> Span | None:
    """The bytes that are asked for; None: all of them. Several ranges at once are answered by all of the file."""
    header = request.headers.get("range")
    condition = request.headers.get("if-range")
    if header is None or (condition is not None and condition != f'"{digest}"'):
        return None
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        span = Span(max(0, size - int(last)), size)
    else:
        span = Span(int(first), min(size, int(last) + 1) if last else size)
        if last and int(last) < int(first):
            return None
    if span.start >= size or span.start >= span.stop:
        raise Problem(
            416, "range", "the file has no such bytes", expected=f"a range within {size} bytes", got=header[:100],
            headers={"content-range": f"bytes */{size}"},
        )  # fmt: skip
    return span


def _blocks(stream: io.FileIO, span: Span) -> Iterator[bytes]:
    with stream:
        offset = span.start
        while offset < span.stop:
            block = os.pread(stream.fileno(), min(_BLOCK, span.stop - offset), offset)
            if not block:
                raise OSError("a file was cut short while it was sent")
            yield block
            offset += len(block)
