"""SHA256SUMS: what sha256sum writes and reads, and nothing that leads out of the package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kdscale.errors import CheckpointError, FileError
from kdscale.packaging.bundle.checksums import SUMS, verified_files, write_sums

NAMES = ["a", "below/b c.txt", "LICENSE\nof 'x'", "z\u2028z", "ö"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_sums(folder)
    return folder


def test_what_is_written_is_verified(package: Path) -> None:
    assert verified_files(package) == sorted(NAMES)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_reads_the_same(package: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=package, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == len(NAMES), done.stderr


def test_every_file_that_does_not_match_is_named(package: Path) -> None:
    (package / "a").write_text("b")
    (package / "ö").unlink()
    (package / "below" / "b c.txt").unlink()
    (package / "below" / "b c.txt").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match=r"a was changed; below/b c\.txt is a link; ö is missing"):
        verified_files(package)


def test_a_folder_that_is_a_link_is_not_followed(package: Path) -> None:
    (package / "below").rename(package.parent / "elsewhere")
    (package / "below").symlink_to(package.parent / "elsewhere")
    with pytest.raises(FileError, match=r"below/b c\.txt is a link"):
        verified_files(package)


def test_a_name_that_no_list_can_hold_is_refused(package: Path) -> None:
    (package / "LICENSE\udcff").write_text("x")
    with pytest.raises(FileError, match="a name in UTF-8"):
        write_sums(package)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_no_name_leads_out(package: Path, name: str) -> None:
    (package / SUMS).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="outside itself"):
        verified_files(package)


@pytest.mark.parametrize("text", ["", "nonsense\n", f"{'g' * 64}  a\n"])
def test_sums_that_are_none_are_refused(package: Path, text: str) -> None:
    (package / SUMS).write_text(text)
    with pytest.raises(FileError):
        verified_files(package)
