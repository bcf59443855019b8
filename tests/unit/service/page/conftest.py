"""A service with its page, and somebody who is signed in to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kdscale.service.app import make_app
from kdscale.service.database.connection import open_database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import RunState

ADDRESS = "http://127.0.0.1:8765"
_WAYS: dict[str, tuple[RunState, ...]] = {
    "queued": (), "running": ("starting", "running"), "paused": ("paused",), "cancelled": ("cancelled",),
    "succeeded": ("starting", "succeeded"), "failed": ("starting", "failed"),
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "name": "small", "run_dir": "runs/small", "teacher": {"path": "teachers/tiny"},
    "prune": {"target_params": "50%"}, "distill": {"tokens": 50_000},
}  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("service")
    settings = ServiceSettings(home=str(home))
    database = open_database(settings)
    yield make_app(settings, database)
    database.close()


@pytest.fixture(scope="module")
def runs(app: Any) -> Runs:
    found: Runs = app.state.runs
    return found


def sign_in(app: Any, owner: str = "alice", scope: str = "admin") -> TestClient:
    """A browser after its sign-in."""
    _, secret = app.state.accounts.new_token("test", owner, [scope])
    client = TestClient(app, ADDRESS)
    answer = client.post("/sign-in", data={"token": secret, "next": "/runs"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs")
    return client


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    return sign_in(app)


def add_run(runs: Runs, folder: Path, name: str = "small", owner: str = "alice", state: str = "queued") -> Run:
    """A run in this state; its folder is `folder`/its id."""
    new = NewRun(name=name, owner=owner, config=CONFIG, folder=folder, config_name="demo")
    new = NewRun(**{**vars(new), "folder": folder / new.id})
    run = runs.add(new)
    for step in _WAYS[state]:
        run = runs.move(run.id, step, reason="told <b>why</b>")
    return run
