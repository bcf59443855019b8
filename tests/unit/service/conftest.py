"""A service's parts in a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale.service.database.connection import Database, open_database
from kdscale.service.settings import ServiceSettings


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    return ServiceSettings(home=str(tmp_path / "home"), roots=(str(tmp_path / "models"),))


@pytest.fixture
def database(settings: ServiceSettings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    opened.close()
