"""A service's parts in a folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale.service.database import connection
from kdscale.service.database.connection import Database, open_database
from kdscale.service.settings import ServiceSettings


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    return ServiceSettings(home=str(tmp_path / "home"), roots=(str(tmp_path / "models"),))


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a database with all tables and nothing in them."""
    settings = ServiceSettings(home=str(tmp_path_factory.mktemp("new")))
    open_database(settings).close()
    return settings.folder / "service.db"


@pytest.fixture
def database(settings: ServiceSettings, new_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    settings.folder.mkdir(parents=True)
    shutil.copyfile(new_database, settings.folder / "service.db")
    with monkeypatch.context() as patch:
        patch.setattr(connection, "migrate", lambda _database: None)  # which takes longer than most tests
        opened = open_database(settings)
    yield opened
    opened.close()
