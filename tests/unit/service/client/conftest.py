"""The client and the commands on it, talking to the real application inside the process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from kdscale.cli import main
from kdscale.client import Client, Patience
from kdscale.client import client as client_module
from kdscale.client.connection import Connection
from kdscale.service.app import make_app
from kdscale.service.database.connection import Database
from kdscale.service.settings import ServiceSettings

URL = "http://127.0.0.1:8765"
SPEC = {"name": "tiny", "run_dir": "runs/tiny", "teacher": {"path": "builtin:none"}, "prune": {"target_params": "50%"}}


class InProcess(httpx.BaseTransport):
    """Takes the place of the network."""

    def __init__(self, app: FastAPI):
        self._client = TestClient(app, URL, raise_server_exceptions=False, follow_redirects=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._client.request(
            request.method, str(request.url), headers=list(request.headers.items()), content=request.read()
        )
        return httpx.Response(
            answer.status_code, headers=list(answer.headers.items()), stream=httpx.ByteStream(answer.content)
        )


@pytest.fixture
def app(settings: ServiceSettings, database: Database) -> FastAPI:
    settings.runs.mkdir(parents=True)
    return make_app(settings, database)


@pytest.fixture
def secret(app: FastAPI) -> str:
    """A token of somebody who may submit."""
    made: str = app.state.accounts.new_token("laptop", "ada", ["run"])[1]
    return made


@pytest.fixture
def client(app: FastAPI, secret: str) -> Iterator[Client]:
    with Client(URL, secret, patience=Patience(0.0), transport=InProcess(app)) as made:
        yield made


@pytest.fixture
def commands(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`commands("runs")` → exit code and what was printed, by a command line whose network is the application."""

    def connect(*arguments: object, transport: object, **options: object) -> Connection:
        return Connection(*arguments, transport=InProcess(app), **options)  # type: ignore[arg-type]

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["kdscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out + printed.err

    monkeypatch.setattr(client_module, "Connection", connect)
    monkeypatch.setattr(main, "leave", sys.exit)  # it may end the process at once
    for name in ("KDSCALE_TOKEN", "KDSCALE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return call
