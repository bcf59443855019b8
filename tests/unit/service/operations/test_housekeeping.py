"""`kdscale retention` and `kdscale backup` as whoever runs a service sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import Run
from kdscale.service.settings import ServiceSettings

Call = Callable[..., str]


@pytest.fixture
def call(settings: ServiceSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "120")

    def run(command: str, *arguments: str) -> str:
        make_app()([command, "--home", settings.home, *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_a_look_at_the_retention_deletes_nothing(
    call: Call, settings: ServiceSettings, database: Database, ended: Callable[..., Run]
) -> None:
    run = ended()
    assert "nothing will be deleted" in call("retention")
    (settings.folder / "serve.yaml").write_text("retention: {checkpoints_after: 1, students_after: 30}\n")
    text = call("retention")
    assert run.id in text and "checkpoints" in text and " in " in text
    assert "kept: ada has no address" in " ".join(text.split())
    assert (run.folder / "checkpoints").exists()


def test_what_is_due_is_deleted_on_request(
    call: Call, settings: ServiceSettings, database: Database, ended: Callable[..., Run], clock: object
) -> None:
    clock.now = 1_000_000.0  # type: ignore[attr-defined]
    run = ended()
    (settings.folder / "serve.yaml").write_text("retention: {checkpoints_after: 1}\n")
    assert "now" in call("retention")
    assert "deleted: 2, 10 B" in call("retention", "--delete")
    assert not (run.folder / "checkpoints").exists()
    assert "trash" in call("retention")


def test_a_backup_says_what_it_has(call: Call, database: Database, ended: Callable[..., Run], tmp_path: Path) -> None:
    ended()
    assert "runs: 1, files: 11" in call("backup", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "service.db").is_file()


def test_a_folder_that_is_no_service_is_told(tmp_path: Path) -> None:
    for command in (["retention"], ["backup", str(tmp_path / "copy")]):
        with pytest.raises(ConfigError, match="started once"):
            make_app()([*command, "--home", str(tmp_path)], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []
