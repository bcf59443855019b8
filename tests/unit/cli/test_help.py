"""What `--help` shows: groups in the order of use, eighty columns, no type behind a flag."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdscale.cli.main import make_app
from kdscale.pipeline.stages.registry import STAGES


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> str:
        make_app()([*arguments, "--help"], standalone_mode=False)
        return capsys.readouterr().out

    return call


def commands(text: str) -> list[str]:
    return re.findall(r"^│ ([a-z][a-z-]+) ", text, re.MULTILINE)


def test_everyday_commands_come_first_and_no_stage_is_missing(shown: Callable[..., str]) -> None:
    text = shown()
    assert commands(text)[:5] == ["init", "plan", "run", "status", "report"]
    assert len(commands(text)) == len(set(commands(text)))
    assert {stage.name for stage in STAGES.values()} - set(commands(text)) == {"data"}
    titles = re.findall(r"^╭─ ([A-Z][^─]+) ─", text, re.MULTILINE)
    assert titles == ["Options", "Every day", "One stage, and what it needs", "Several machines", "A service", "Tools"]


def test_every_page_of_help_fits_eighty_columns(shown: Callable[..., str]) -> None:
    pages = [shown(), *(shown(name) for name in commands(shown()))]
    for page in pages:
        assert max(map(len, page.splitlines())) <= 80
        assert "…" not in page
        assert "<bool>" not in page


def test_help_is_the_same_on_every_machine(shown: Callable[..., str]) -> None:
    """A path of this machine in a default makes the page as wide as the path is long."""
    for name in commands(shown()):
        assert not [value for value in (sys.executable, str(Path.home())) if value in shown(name)]
