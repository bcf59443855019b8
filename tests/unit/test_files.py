"""Files are whole or absent, and names from a manifest stay inside their folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.errors import CheckpointError, FileError, RunFolderError
from kdscale.files import atomic_dir, atomic_path, explain_os_errors, read_json, remove_leftovers, safe_join, write_json


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


def test_json_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(FileError, match="missing"):
        read_json(tmp_path / "none.json")
