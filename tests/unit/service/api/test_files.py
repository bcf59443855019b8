"""Artifacts: listed, read in parts, packed; and nothing else of the machine."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kdscale.service.api.files import content
from kdscale.service.api.files.archives import Format, archive
from kdscale.service.api.files.folder import files_under
from kdscale.service.database.runs import Run
from tests.unit.service.api.conftest import Caller

WEIGHTS = "0123456789"
DIGEST = hashlib.sha256(WEIGHTS.encode()).hexdigest()
FILES = {
    "student/model.safetensors": WEIGHTS, "student/a b/ü.json": "{}", "report/report.html": "<p>done</p>",
    "teacher.token": "secret", "student/x.key": "secret", ".lock": "1", "student/.partial-3-model": "half",
}  # fmt: skip


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run(1, FILES)


def test_files_are_listed_with_sizes_and_digests(as_: Caller, run: Run) -> None:
    reader, paths, after = as_("reader"), [], None
    while True:
        query = {"limit": 2} | ({"after": after} if after else {})
        page = reader.get(f"/v1/runs/{run.id}/artifacts", params=query).json()
        paths += [item["path"] for item in page["items"]]
        if (after := page["next"]) is None:
            break
    assert paths == ["config.yaml", "report/report.html", "student/a b/ü.json", "student/model.safetensors"]
    student = reader.get(f"/v1/runs/{run.id}/artifacts/student").json()["items"]
    assert [(item["path"], item["bytes"], item["sha256"]) for item in student][1] == (paths[3], 10, DIGEST)


def test_a_digest_follows_its_file(as_: Caller, run: Run) -> None:
    reader, path = as_("reader"), run.folder / "student/model.safetensors"
    address = f"/v1/runs/{run.id}/artifacts/student/model.safetensors"
    first = reader.get(address)
    assert first.headers["etag"] == f'"{DIGEST}"'
    path.write_text("9876543210")
    assert reader.get(address).headers["etag"] == f'"{hashlib.sha256(b"9876543210").hexdigest()}"'


RANGES = {
    "bytes=0-3": (206, "0123", "0-3"), "bytes=4-": (206, "456789", "4-9"), "bytes=-3": (206, "789", "7-9"),
    "bytes=-99": (206, WEIGHTS, "0-9"), "bytes=8-99": (206, "89", "8-9"), "bytes=0-0": (206, "0", "0-0"),
    "bytes=10-": (416, "", ""), "bytes=-0": (416, "", ""), "bytes=99-100": (416, "", ""),
    "bytes=3-2": (200, WEIGHTS, ""), "bytes=0-1,4-5": (200, WEIGHTS, ""), "lines=1-2": (200, WEIGHTS, ""),
    "bytes=-": (200, WEIGHTS, ""), "bytes=a-b": (200, WEIGHTS, ""),
}  # fmt: skip


@pytest.mark.parametrize("asked", RANGES)
def test_parts_of_a_file(as_: Caller, run: Run, asked: str) -> None:
    status, text, part = RANGES[asked]
    reader, address = as_("reader"), f"/v1/runs/{run.id}/artifacts/student/model.safetensors"
    answer, head = (reader.request(method, address, headers={"range": asked}) for method in ("GET", "HEAD"))
    assert (answer.status_code, head.status_code) == (status, status)
    if status == 416:
        assert answer.headers["content-range"] == "bytes */10"
        return
    assert answer.text == text and head.content == b""
    assert answer.headers["content-length"] == head.headers["content-length"] == str(len(text))
    assert answer.headers.get("content-range") == (f"bytes {part}/10" if part else None)


CONDITIONS = {
    "if-none-match": {f'"{DIGEST}"': 304, f'W/"{DIGEST}"': 304, "*": 304, '"other"': 200, f'"x", "{DIGEST}"': 304},
    "if-match": {f'"{DIGEST}"': 200, "*": 200, '"other"': 412, f'W/"{DIGEST}"': 412},
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "value"), [(header, value) for header in CONDITIONS for value in CONDITIONS[header]]
)
def test_conditions(as_: Caller, run: Run, header: str, value: str) -> None:
    address = f"/v1/runs/{run.id}/artifacts/student/model.safetensors"
    answer = as_("reader").get(address, headers={header: value})
    assert answer.status_code == CONDITIONS[header][value]
    assert answer.headers["etag"] == f'"{DIGEST}"'


def test_the_rest_of_another_file_is_never_sent(as_: Caller, run: Run) -> None:
    address = f"/v1/runs/{run.id}/artifacts/student/model.safetensors"
    for tag, status in ((f'"{DIGEST}"', 206), ('"old"', 200), (f'W/"{DIGEST}"', 200)):
        answer = as_("reader").get(address, headers={"range": "bytes=5-", "if-range": tag})
        assert answer.status_code == status, tag


OUTSIDE = [
    "../" * 8 + "etc/passwd", "student/../../../service.db", "/etc/passwd", "..%2f..%2fservice.db", "%2e%2e/x",
    "student%00", "student/\\..\\..\\x", "teacher.token", "student/x.key", ".lock", "student/.partial-3-model",
    "link-out", "link-out/passwd", "folder-out/service.db", "pipe", "link-to-token", "loop", "a" * 5000, "student/none",
    "work/../teacher.token", "./teacher.token", "student//../teacher.token",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_and_no_secret_is_had(as_: Caller, run: Run, path: str) -> None:
    (run.folder / "link-out").symlink_to("/etc/passwd")
    (run.folder / "folder-out").symlink_to(run.folder.parent.parent)
    (run.folder / "link-to-token").symlink_to("teacher.token")
    (run.folder / "loop").symlink_to("loop")
    os.mkfifo(run.folder / "pipe")
    for query in ("", "?download=tar"):
        answer = as_("reader").get(f"/v1/runs/{run.id}/artifacts/{path}{query}")
        assert answer.status_code in (404, 414), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
    listed = as_("reader").get(f"/v1/runs/{run.id}/artifacts", params={"under": path})
    assert listed.status_code in (404, 414, 422)


def test_links_inside_the_run_lead_somewhere(as_: Caller, run: Run) -> None:
    (run.folder / "steps").mkdir()
    (run.folder / "steps/data").symlink_to("../student")
    answer = as_("reader").get(f"/v1/runs/{run.id}/artifacts/steps/data/model.safetensors")
    assert (answer.status_code, answer.text) == (200, WEIGHTS)
    listed = as_("reader").get(f"/v1/runs/{run.id}/artifacts").json()["items"]
    assert not any(item["path"].startswith("steps") for item in listed), "listed once, where it is"


@pytest.mark.parametrize("format_", ["tar", "zip"])
def test_a_folder_is_one_download(as_: Caller, run: Run, format_: str, tmp_path: Path) -> None:
    long = run.folder / "student" / ("n" * 120) / ("m" * 120)
    long.mkdir(parents=True)
    (long / "f").write_bytes(bytes(range(256)) * 5000)
    answer = as_("reader").get(f"/v1/runs/{run.id}/artifacts/student?download={format_}")
    assert f"{run.id}-student.{format_}" in answer.headers["content-disposition"]
    if format_ == "tar":
        assert int(answer.headers["content-length"]) == len(answer.content)
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            archive.extractall(tmp_path, filter="data")
    else:
        with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
            assert packed.testzip() is None
            packed.extractall(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    expected = [f"student/{name}" for name in ("a b/ü.json", "model.safetensors", f"{'n' * 120}/{'m' * 120}/f")]
    assert [name for name in found if name.startswith("student/")] == sorted(expected)
    assert (tmp_path / expected[2]).read_bytes() == (long / "f").read_bytes()


@pytest.mark.parametrize("format_", ["tar", "zip"])
def test_a_file_that_is_replaced_before_it_is_sent_is_not_cut(run: Run, format_: Format) -> None:
    files = files_under(run.folder, "student")
    new = run.folder / "new"
    new.write_text(WEIGHTS * 2)
    new.replace(run.folder / "student/model.safetensors")
    with pytest.raises(OSError, match="replaced"):
        list(archive(files, "student", format_))


def test_digests_are_those_of_the_bytes_that_are_told(as_: Caller, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reader = run.folder / "student/model.safetensors", as_("reader")
    opened = content.open_regular

    def grows(place: Path) -> io.FileIO:
        stream = opened(place)
        if place == path:
            with path.open("a") as more:
                more.write("x")
        return stream

    monkeypatch.setattr(content, "open_regular", grows)
    item = reader.get(f"/v1/runs/{run.id}/artifacts/student").json()["items"][1]
    assert (item["bytes"], item["sha256"]) == (10, None)
    answer = reader.get(f"/v1/runs/{run.id}/artifacts/student/model.safetensors")
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'


def test_names_that_are_not_utf_8_end_no_list(as_: Caller, run: Run) -> None:
    (run.folder / os.fsdecode(b"a\xff")).write_text("x")
    page = as_("reader").get(f"/v1/runs/{run.id}/artifacts?limit=1")
    assert page.status_code == 200 and page.json()["next"] == "a?"


def test_what_a_run_made_is_saved_and_never_shown(as_: Caller, make_run: Callable[..., Run]) -> None:
    run = make_run(2, {"student/<script>.html": "<script>alert(1)</script>", "report/report.html": "<p>done</p>"})
    page = as_("reader").get(f"/v1/runs/{run.id}/artifacts/student/<script>.html")
    assert page.headers["content-type"] == "application/octet-stream"
    assert page.headers["content-disposition"] == "attachment; filename*=UTF-8''%3Cscript%3E.html"
    report = as_("reader").get(f"/v1/runs/{run.id}/report")
    assert (report.text, report.headers["content-type"]) == ("<p>done</p>", "text/html; charset=utf-8")
    for answer in (page, report):
        policy = answer.headers["content-security-policy"]
        assert "sandbox" in policy and "script-src" not in policy and "default-src 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_run_without_a_report_or_a_folder_says_so(as_: Caller, make_run: Callable[..., Run]) -> None:
    run, reader = make_run(3), as_("reader")
    assert reader.get(f"/v1/runs/{run.id}/report").json()["detail"] == "the run has no report yet"
    (run.folder / "config.yaml").unlink()
    run.folder.rmdir()
    assert reader.get(f"/v1/runs/{run.id}/artifacts").json() == {"items": [], "next": None}
    assert reader.get(f"/v1/runs/{run.id}").json()["stages"][0]["state"] == "waiting"
