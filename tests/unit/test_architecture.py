"""The shape of the tree: small folders, files that do one thing, names that say what is inside.

Layers, circles and who imports deepspeed are contracts of import-linter (pyproject.toml).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("kdscale", "kernels/kdscale_kernels", "launch/kdscale_launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
SAY_NOTHING = {
    "work", "member", "pieces", "parts", "fragments", "shell", "narrow", "others", "gaps", "choose", "names", "state",
    "utils", "helpers", "misc", "common_utils",
}  # fmt: skip


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_does_one_thing_and_says_what(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in SAY_NOTHING


def test_folders_are_small() -> None:
    sizes = Counter(_name(path.parent) for path in SOURCES if path.name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > 14} == {}
    assert sizes["kdscale"] <= 4


def test_kernels_and_launch_stay_plain_source_roots() -> None:
    """An `__init__.py` there would make an importable `kernels`, which transformers takes for another library."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "launch" / "__init__.py").exists()
