"""An application with an owner, an admin and a reader, and runs whose folders are as `kdscale run` leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from kdscale.config.load import build_config, dump_config
from kdscale.service.app import make_app
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import NewRun, Run
from kdscale.service.ids import new_run_id
from kdscale.service.settings import ServiceSettings

Caller = Callable[[str], TestClient]


@pytest.fixture
def app(settings: ServiceSettings, database: Database) -> FastAPI:
    settings.runs.mkdir(parents=True)
    return make_app(settings, database)


@pytest.fixture
def as_(app: FastAPI) -> Iterator[Caller]:
    """A client with a token: `as_("ada")` may submit, `as_("reader")` may read, `as_("admin")` may everything."""
    scopes = {"reader": ["read"], "admin": ["admin"]}
    clients: dict[str, TestClient] = {}

    def caller(owner: str) -> TestClient:
        if owner not in clients:
            _, secret = app.state.accounts.new_token(owner, owner, scopes.get(owner, ["run"]))
            headers = {"authorization": f"Bearer {secret}"}
            clients[owner] = TestClient(app, "http://localhost", headers=headers, raise_server_exceptions=False)
        return clients[owner]

    yield caller
    for client in clients.values():
        client.close()


@pytest.fixture
def make_run(app: FastAPI) -> Callable[..., Run]:
    """Adds a run with a folder; `files` are texts by path."""

    def make(number: int = 0, files: dict[str, str] | None = None, **fields: Any) -> Run:
        run_id = new_run_id(1_700_000_000 + number)
        folder: Path = app.state.settings.runs / run_id
        tree = {"name": "tiny", "run_dir": str(folder), "teacher": {"path": "t"}, "prune": {"target_params": "50%"}}
        config = build_config(tree, "test")
        for name, text in {"config.yaml": dump_config(config), **(files or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        values = {"name": f"run {number}", "owner": "ada", "config": config.resolved(), "folder": folder}
        return app.state.runs.add(NewRun(**{**values, "id": run_id, **fields}))  # type: ignore[arg-type]

    return make


def metrics_log(steps: int, **figures: Callable[[int], float]) -> str:
    """A training log of that many steps."""
    rows = ({"kind": "train", "step": step, **{k: f(step) for k, f in figures.items()}} for step in range(1, steps + 1))
    return "".join(f"{json.dumps(row)}\n" for row in rows)
