"""A compiler of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty program that CC names; a test writes what it does."""
    path = tmp_path / "cc"
    path.touch(mode=0o755)
    monkeypatch.setenv("CC", str(path))
    return path
