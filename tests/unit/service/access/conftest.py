"""A small app with the real database behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.requests import Request

from kdscale.service.access.identity import Actor, require
from kdscale.service.access.sessions import csrf_token
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import open_database
from kdscale.service.settings import ServiceSettings
from tests.unit.service.conftest import Clock


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    return ServiceSettings(home=str(tmp_path / "home"))


@pytest.fixture
def app(settings: ServiceSettings, clock: Clock) -> Iterator[FastAPI]:
    database = open_database(settings)
    made = FastAPI()
    made.state.settings, made.state.accounts = settings, Accounts(database, clock)

    @made.get("/read")
    def read(request: Request, actor: Annotated[Actor, Depends(require("read"))]) -> dict[str, Any]:
        return {"owner": actor.owner, "how": actor.how, "csrf": csrf_token(request)}

    @made.post("/v1/runs/{run_id}/cancel")
    def run(run_id: str, actor: Annotated[Actor, Depends(require("run"))]) -> str:
        return actor.owner

    @made.delete("/admin")
    def admin(actor: Annotated[Actor, Depends(require("admin"))]) -> str:
        return actor.owner

    yield made
    database.close()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=True)


@pytest.fixture
def bearer(app: FastAPI) -> Callable[..., dict[str, str]]:
    """Headers with a new token of these scopes."""

    def make(*scopes: str, owner: str = "ada", expires: float | None = None) -> dict[str, str]:
        _, secret = app.state.accounts.new_token("t", owner, scopes, expires)
        return {"Authorization": f"Bearer {secret}"}

    return make
