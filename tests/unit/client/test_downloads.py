"""Downloads: whole or not at all, taken up where they stopped, and never outside of their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from kdscale.client import Artifact, Client
from kdscale.client.connection import Connection, Patience
from kdscale.client.downloads import download, place_in
from kdscale.errors import FileError, ServiceError
from tests.unit.client.conftest import RUN_ID, TOKEN, URL, Clock

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Files:
    """A service with one file. `cuts`: after how many bytes each answer breaks off; `ranges`: whether it knows them."""

    def __init__(self, content: bytes = CONTENT, cuts: tuple[int, ...] = (), ranges: bool = True):
        self.content, self.cuts, self.ranges = content, list(cuts), ranges
        self.asked: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        asked = request.headers.get("range")
        self.asked.append(asked)
        etag = f'"{hashlib.sha256(self.content).hexdigest()}"'
        start, headers = 0, {"etag": etag}
        if asked and self.ranges and request.headers.get("if-range") == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["content-range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        cut = self.cuts.pop(0) if self.cuts else None
        return httpx.Response(206 if start else 200, headers=headers, stream=_Cut(self.content[start:], cut))


class _Cut(httpx.SyncByteStream):
    def __init__(self, content: bytes, cut: int | None):
        self._content, self._cut = content, cut

    def __iter__(self) -> Iterator[bytes]:
        yield self._content[: self._cut]
        if self._cut is not None:
            raise httpx.ReadError("the connection was lost")


@pytest.fixture
def connection_to(clock: Clock) -> Callable[[Files], Connection]:
    patience = Patience(60.0, clock.time, clock.sleep, lambda: 1.0)
    return lambda files: Connection(URL, TOKEN, patience=patience, transport=httpx.MockTransport(files))


def test_a_broken_download_goes_on_where_it_stopped(connection_to: Callable[..., Connection], tmp_path: Path) -> None:
    files, told = Files(cuts=(1000, 500)), list[int]()
    path = download(
        connection_to(files), "/x", tmp_path / "a" / "x", sha256=DIGEST, size=len(CONTENT), said=told.append
    )
    assert path.read_bytes() == CONTENT
    assert files.asked == [None, "bytes=1000-", "bytes=1500-"]
    assert told == sorted(told) and told[-1] == len(CONTENT)
    assert [item.name for item in path.parent.iterdir()] == ["x"]


def test_another_call_goes_on_too_and_what_is_there_is_not_fetched(
    connection_to: Callable[..., Connection], tmp_path: Path
) -> None:
    target = tmp_path / "x"
    with pytest.raises(ServiceError):
        download(connection_to(Files(cuts=(4000, *(0,) * 20))), "/x", target, sha256=DIGEST, size=len(CONTENT))
    assert not target.exists()
    files = Files()
    for _ in range(2):
        download(connection_to(files), "/x", target, sha256=DIGEST, size=len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert files.asked == ["bytes=4000-"]


def test_a_service_without_ranges_gives_the_file_from_its_beginning(
    connection_to: Callable[..., Connection], tmp_path: Path
) -> None:
    files = Files(cuts=(1000,), ranges=False)
    download(connection_to(files), "/x", tmp_path / "x", sha256=DIGEST, size=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert files.asked == [None, "bytes=1000-"]


def test_a_file_that_changed_is_not_mixed_with_its_old_beginning(
    connection_to: Callable[..., Connection], tmp_path: Path
) -> None:
    (tmp_path / ".partial-x").write_bytes(b"old" * 100)
    with pytest.raises(ServiceError, match="SHA-256"):
        download(connection_to(Files(b"new" * 50)), "/x", tmp_path / "x", sha256=DIGEST, size=len(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_damage_on_the_way_is_found_and_nothing_is_left(
    connection_to: Callable[..., Connection], tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match="SHA-256"):
        download(connection_to(Files(CONTENT[:-1] + b"?")), "/x", tmp_path / "x", sha256=DIGEST, size=len(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_there_should_be_are_refused(connection_to: Callable[..., Connection], tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="more"):
        download(connection_to(Files()), "/x", tmp_path / "x", sha256=DIGEST, size=100)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a\\..\\x",
        "C:/x",
        "a\0",
        "a\n",
        "\x1b[2J",
        "x" * 300,
        "a/" + "é" * 200,
    ],
)
def test_names_that_lead_out_or_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError):
        place_in(tmp_path, name)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    (folder / "student").symlink_to(outside)
    (folder / "x").symlink_to(outside / "x")
    for name in ("student/x", "x"):
        with pytest.raises(FileError, match="link"):
            place_in(folder, name)
    assert place_in(folder, "report/a b.html") == folder / "report" / "a b.html"


def test_a_link_in_the_place_of_an_earlier_try_is_not_written_through(
    connection_to: Callable[..., Connection], tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / ".partial-x").symlink_to(tmp_path / "outside")
    download(connection_to(Files()), "/x", tmp_path / "x", sha256=DIGEST, size=len(CONTENT))
    assert (tmp_path / "outside").read_bytes() == b""
    assert not (tmp_path / "x").is_symlink()


def test_the_client_asks_for_a_digest_that_the_list_has_not_yet(
    client_of: Callable[..., Client], tmp_path: Path
) -> None:
    files, heads = Files(), list[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == f"/v1/runs/{RUN_ID}/artifacts/student/a b.bin"
        if request.method == "HEAD":
            heads.append(request.url.path)
            headers = {
                "etag": f'"{DIGEST}"', "content-length": str(len(CONTENT)),
                "last-modified": "Mon, 30 Nov 2026 22:00:00 GMT",
            }  # fmt: skip
            return httpx.Response(200, headers=headers)
        return files(request)

    file = Artifact(path="student/a b.bin", bytes=len(CONTENT), modified=datetime.now(UTC), sha256=None)
    for given in (file, file.path):
        path = client_of(answer).download(RUN_ID, given, tmp_path)
        assert path == tmp_path / "student" / "a b.bin"
        assert path.read_bytes() == CONTENT
    assert len(heads) == 2
    assert len(files.asked) == 1


def test_a_log_that_grew_since_it_was_listed_comes_as_it_is_now(
    client_of: Callable[..., Client], tmp_path: Path
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        etag = f'"{DIGEST}"'
        if request.headers.get("if-match") not in (None, etag):
            return httpx.Response(412, json={"title": "the file is another one by now"})
        headers = {"etag": etag, "last-modified": "Mon, 30 Nov 2026 22:00:00 GMT"}
        if request.method == "HEAD":
            return httpx.Response(200, headers={**headers, "content-length": str(len(CONTENT))})
        return httpx.Response(200, headers=headers, stream=_Cut(CONTENT, None))

    (tmp_path / ".partial-x").write_bytes(CONTENT[:100])
    before = hashlib.sha256(CONTENT[:200]).hexdigest()
    listed = Artifact(path="x", bytes=200, modified=datetime.now(UTC), sha256=before)
    assert client_of(answer).download(RUN_ID, listed, tmp_path).read_bytes() == CONTENT


def test_an_empty_file_is_a_file(connection_to: Callable[..., Connection], tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    assert download(connection_to(Files(b"")), "/x", tmp_path / "x", sha256=digest, size=0).read_bytes() == b""
