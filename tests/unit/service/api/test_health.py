"""The two questions that need no token."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from kdscale.service.app import make_app
from kdscale.service.database.connection import Database
from kdscale.service.settings import ServiceSettings


@pytest.mark.parametrize("works", [True, False])
def test_a_service_is_ready_while_its_scheduler_works(
    settings: ServiceSettings, database: Database, works: bool
) -> None:
    client = TestClient(make_app(settings, database, is_scheduling=lambda: works), "http://127.0.0.1")
    assert client.get("/healthz").json()["status"] == "ok"
    answer = client.get("/readyz")
    assert answer.status_code == (200 if works else 503)
    if not works:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"] == "the scheduler has stopped"
