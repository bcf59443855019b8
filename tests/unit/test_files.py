"""Files are whole or absent, and names from a manifest stay inside their folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.errors import CheckpointError, FileError, RunFolderError
from kdscale.files import (
    atomic_dir,
    atomic_path,
    explain_os_errors,
    read_json,
    read_own_json,
    remove_leftovers,
    safe_join,
    write_json,
    write_private,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"x": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_dir(target) as tmp:
        (tmp / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(target) as tmp:
        (tmp / "new").write_text("half")
        raise RuntimeError
    assert [item.name for item in target.iterdir()] == ["old"]
    with atomic_dir(target) as tmp:
        (tmp / "new").write_text("whole")
    assert [item.name for item in target.iterdir()] == ["new"]
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-1-out").mkdir()
    (tmp_path / ".partial-1-a.json").write_text("half")
    (tmp_path / "kept").write_text("kept")
    assert len(remove_leftovers(tmp_path)) == 2
    assert [item.name for item in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_refusals_of_the_system_say_what_to_do(tmp_path: Path, code: int, word: str) -> None:
    with pytest.raises(RunFolderError, match=word), explain_os_errors(tmp_path):
        raise OSError(code, os.strerror(code))


def test_a_full_disk_is_recognised_however_a_library_reports_it(tmp_path: Path) -> None:
    """The library's own error, from a real write past the limit of a file's size."""
    code = f"""
import resource, numpy as np
from pathlib import Path
from safetensors.numpy import save_file
from kdscale.errors import RunFolderError
from kdscale.files import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
values = np.zeros(1 << 18, dtype=np.float32)
for write in (lambda path: save_file({{"a": values}}, path), values.tofile, lambda path: path.write_bytes(values)):
    try:
        with atomic_path(Path({str(tmp_path)!r}) / "out") as tmp:
            write(tmp)
    except RunFolderError as error:
        print(error.got)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(done.stdout.splitlines()) == 3, done.stdout + done.stderr


def test_an_unreadable_input_is_no_unwritable_run_folder(tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher" / "config.json", tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileError, match=r"cannot read .*teacher/config\.json"), explain_os_errors(run):
        raise PermissionError(errno.EACCES, "denied", str(teacher))
    with pytest.raises(RunFolderError, match="cannot write"), explain_os_errors(run):
        raise PermissionError(errno.EACCES, "denied", str(run / "data" / "x"))


def test_other_os_errors_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"), explain_os_errors(tmp_path):
        raise OSError(errno.EIO, "I/O")


@given(st.text(alphabet="ab./\\", min_size=0, max_size=12))
def test_joined_names_never_leave_the_folder(name: str) -> None:
    folder = Path("/base/run")
    try:
        joined = safe_join(folder, name)
    except CheckpointError:
        return
    assert Path(os.path.normpath(joined)).is_relative_to(folder)


@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/passwd", "..\\x"])
def test_names_that_would_leave_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        safe_join(Path("/base"), name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply"),
        ("[]", "expected: an object\n  got:      a list"),
        ("null", "got:      null"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (" " * 200, "at most 100 bytes"),
    ],
)
def test_json_that_is_not(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=message) as caught:
        read_json(path, expect=dict, limit=100 if message.endswith("bytes") else 1 << 20)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_json_where_there_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("none", "is missing"),
        ("folder", "regular"),
        ("loop", "cannot be read"),
        ("fifo", "regular"),
    ):
        with pytest.raises(FileError, match=message):
            read_json(tmp_path / name)
    assert read_json_value(tmp_path, '{"a": [1]}') == {"a": [1]}


def read_json_value(folder: Path, text: str) -> Any:
    (folder / "good.json").write_text(text)
    return read_json(folder / "good.json", expect=dict)


def test_damaged_state_of_our_own_is_set_aside(tmp_path: Path) -> None:
    said: list[str] = []
    assert read_own_json(tmp_path / "state.json", lambda value: True, said.append) is None and said == []
    for _ in range(2):  # an older damaged file gives way
        (tmp_path / "state.json").write_text("[]")
        assert read_own_json(tmp_path / "state.json", lambda value: isinstance(value, dict), said.append) is None
    assert [item.name for item in tmp_path.iterdir()] == ["state.json.damaged"]
    assert "damaged" in said[0] and len(said) == 2


def test_a_private_file_is_its_owners_also_where_a_killed_process_left_an_open_one(tmp_path: Path) -> None:
    path = tmp_path / "key"
    leftover = tmp_path / f".partial-{os.getpid()}-key"
    leftover.write_text("half")
    leftover.chmod(0o644)
    write_private(path, b"whole")
    assert path.read_bytes() == b"whole" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
