"""A copy from which a service starts again, made while others write."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import ConfigError, ServiceError
from kdscale.service.database import connection as connection_module
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import Run, Runs
from kdscale.service.database.subscriptions import Subscription, subscribe, subscriptions_of
from kdscale.service.operations.backup import back_up
from kdscale.service.settings import ServiceSettings


@pytest.fixture
def home(settings: ServiceSettings, database: Database) -> Path:
    for name in ("serve.yaml", "secret.key", "webhook.key", "service.log", "first-token"):
        (settings.folder / name).write_text(name)
    return settings.folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_a_service_starts_again_from_its_copy(
    home: Path, settings: ServiceSettings, database: Database, ended: Callable[..., Run], tmp_path: Path
) -> None:
    run = ended()
    done = back_up(settings, tmp_path / "copy")
    assert done.runs == 1 and done.files == len(names(tmp_path / "copy")) and done.left_out == []
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
    database.close()
    shutil.rmtree(home)
    shutil.copytree(tmp_path / "copy", home)
    again = open_database(settings)
    found = Runs(again).get(run.id)
    assert (found.state, found.folder) == ("succeeded", run.folder) and (run.folder / "student").is_dir()
    assert Events(again).last_seq() > 0
    again.close()


def test_what_is_copied_and_what_is_not(
    home: Path, settings: ServiceSettings, ended: Callable[..., Run], tmp_path: Path
) -> None:
    run = ended()
    (run.folder / ".lock").write_text("1")
    (run.folder / ".partial-1-x").write_text("half")
    (run.folder / "targets").symlink_to("/large/disk")
    (run.folder / "logs" / "link").symlink_to("/etc")
    back_up(settings, tmp_path / "copy")
    copied, inside = names(tmp_path / "copy"), f"runs/{run.id}"
    assert {path for path in copied if "/" not in path} == {"service.db", "serve.yaml", "secret.key", "webhook.key"}
    assert {path.removeprefix(inside + "/") for path in copied if path.startswith(inside)} == {
        "config.yaml", "service.json", "student/model.safetensors", "quantized/int8/model.safetensors",
        "steps/one/student/model.safetensors", "logs/metrics.jsonl", "logs/link", "report/index.html",
    }  # fmt: skip
    assert (tmp_path / "copy" / inside / "logs" / "link").is_symlink(), "a link is copied as a link"
    assert {f"jobs/{run.id}/state.json", f"jobs/{run.id}/1/exit.json"} <= copied
    back_up(settings, tmp_path / "all", everything=True)
    assert {f"{inside}/checkpoints/step_10/rank0.bin", f"{inside}/data/tokens.bin", f"{inside}/targets"} <= names(
        tmp_path / "all"
    )


def test_the_copy_is_whole_while_others_write(
    home: Path, settings: ServiceSettings, database: Database, ended: Callable[..., Run], tmp_path: Path
) -> None:
    run, stop, events = ended(), threading.Event(), Events(database)

    def write() -> None:
        while not stop.is_set():
            events.append(run.id, "note", {"text": "x" * 2000})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(3):
            back_up(settings, tmp_path / f"copy{number}")
    finally:
        stop.set()
        thread.join()
    for number in range(3):
        with sqlite3.connect(tmp_path / f"copy{number}" / "service.db") as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            count, last = copy.execute("SELECT count(*), max(seq) FROM events").fetchone()
            assert count == last, "no event is missing in the middle"


def test_what_an_attempt_says_that_it_has_finished_is_in_the_copy(
    home: Path, settings: ServiceSettings, ended: Callable[..., Run], tmp_path: Path
) -> None:
    run = ended()
    exit_file = settings.jobs / run.id / "1" / "exit.json"
    exit_file.unlink()

    def ends_now(_line: str) -> None:
        """The run makes its last file and leaves, while its folder is about to be copied."""
        (run.folder / "student" / "last").write_text("x")
        exit_file.write_text('{"exit_code": 0}')

    copy = tmp_path / "copy"
    back_up(settings, copy, say=ends_now)
    (run.folder / "student" / "later").write_text("x")
    inside = names(copy)
    assert f"runs/{run.id}/student/last" in inside
    assert f"jobs/{run.id}/1/exit.json" not in inside, "attempts are copied before the folders of runs"


def test_places_that_are_refused(home: Path, settings: ServiceSettings, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for place, words in ((tmp_path / "taken", "there is something"), (home / "copy", "outside")):
        with pytest.raises(ConfigError, match=words):
            back_up(settings, place)
    with pytest.raises(ConfigError, match="no such folder"):
        back_up(settings.model_copy(update={"home": str(tmp_path / "missing")}), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_damaged_database_is_told_and_no_copy_is_left(
    home: Path, settings: ServiceSettings, database: Database, tmp_path: Path
) -> None:
    database.close()
    for name in ("service.db-wal", "service.db-shm"):
        (home / name).unlink(missing_ok=True)
    (home / "service.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(ServiceError, match=r"service\.db"):
        back_up(settings, tmp_path / "copy")
    assert list(tmp_path.glob("*copy*")) == []


def test_another_database_is_left_to_its_own_tools(home: Path, settings: ServiceSettings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"database": "postgresql://db.example/kdscale"})
    done: Any = back_up(elsewhere, tmp_path / "copy")
    assert "pg_dump" in done.left_out[0] and not (tmp_path / "copy" / "service.db").exists()


def test_the_file_and_those_beside_it_are_their_owners_alone(settings: ServiceSettings) -> None:
    before = os.umask(0o022)
    try:
        opened = open_database(settings)
        Accounts(opened).audit("ada", "looks")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in settings.folder.glob("service.db*")}
        opened.close()
    finally:
        os.umask(before)
    assert "service.db-wal" in modes and set(modes.values()) == {0o600}


_CHANGE = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "9999", "{last}"


def upgrade():
    with op.batch_alter_table("runs") as runs:
        runs.alter_column("name", type_=sa.String(300))
"""


def test_a_table_that_is_changed_in_sqlite_keeps_the_rows_that_refer_to_it(
    settings: ServiceSettings, database: Database, ended: Callable[..., Run], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, wanted = ended(), [Subscription("https://hooks.example/", ("failed",))]
    with database.begin() as connection:
        subscribe(connection, run.id, wanted)
    database.close()
    shutil.copytree(connection_module._MIGRATIONS, tmp_path / "migrations")
    versions = tmp_path / "migrations" / "versions"
    last = max(path.name[:4] for path in versions.glob("*.py"))
    (versions / "9999_change.py").write_text(_CHANGE.format(last=last))
    monkeypatch.setattr(connection_module, "_MIGRATIONS", tmp_path / "migrations")
    again = open_database(settings)
    with again.begin() as connection:
        assert subscriptions_of(connection, run.id) == wanted
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "9999"
    Runs(again).remove(run.id)
    with again.begin() as connection:
        assert subscriptions_of(connection, run.id) == [], "and they go with the run as before"
    again.close()
