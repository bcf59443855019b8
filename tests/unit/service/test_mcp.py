"""Tools for agents, called by the protocol's own client over the real application."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx2
import pytest
from fastapi import FastAPI
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from kdscale.service.app import make_app
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import NewRun
from kdscale.service.mcp.endpoint import mcp_running
from kdscale.service.settings import ServiceSettings

SPEC = {"name": "tiny", "run_dir": "runs/tiny", "teacher": {"path": "builtin:none"}, "prune": {"target_params": "50%"}}
READING = {"list_runs", "get_run", "get_metrics", "tail_log", "compare_runs", "validate_config"}
WRITING = {"submit_run", "pause_run", "resume_run", "cancel_run"}


@pytest.fixture
def app(settings: ServiceSettings, database: Database, request: pytest.FixtureRequest) -> FastAPI:
    settings.runs.mkdir(parents=True)
    return make_app(settings.model_copy(update={"mcp_write": getattr(request, "param", False)}), database)


writing = pytest.mark.parametrize("app", [True], indirect=True)


def with_client(app: FastAPI, scope: str, ask: Callable[[Client], Awaitable[None]]) -> None:
    """Let `ask` talk to the application through a client with a token of this scope."""
    secret = app.state.accounts.new_token("agent", "ada", [scope])[1]

    async def talk() -> None:
        http = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), headers={"authorization": f"Bearer {secret}"}, timeout=30
        )
        connection = streamable_http_client("http://localhost/mcp", http_client=http)
        async with mcp_running(app), http, Client(connection) as client:
            await ask(client)

    anyio.run(talk)


def run_of(app: FastAPI, name: str, **fields: Any) -> str:
    new = NewRun(name=name, owner="ada", config={"name": name}, folder=app.state.settings.runs / name, **fields)
    return str(app.state.runs.add(new).id)


def told(result: Any) -> Any:
    assert not result.is_error, result.content
    return result.structured_content if result.structured_content is not None else result.content[0].text


def test_without_being_allowed_more_tools_only_read(app: FastAPI) -> None:
    run = run_of(app, "first")

    async def ask(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == READING
        assert all(tool.annotations.read_only_hint and tool.description for tool in tools.values())
        listed = told(await client.call_tool("list_runs", {"states": ["queued"]}))
        assert [item["id"] for item in listed["items"]] == [run]
        assert "config" not in told(await client.call_tool("get_run", {"run_id": run}))
        assert told(await client.call_tool("get_metrics", {"run_id": run}))["series"] == []
        assert "result" in told(await client.call_tool("tail_log", {"run_id": run}))
        refused = await client.call_tool("cancel_run", {"run_id": run})
        assert refused.is_error

    with_client(app, "admin", ask)
    assert app.state.runs.get(run).state == "queued"


@writing
def test_with_the_scope_run_tools_change_runs(app: FastAPI) -> None:
    async def ask(client: Client) -> None:
        assert {tool.name for tool in (await client.list_tools()).tools} == READING | WRITING
        run = told(await client.call_tool("submit_run", {"config": SPEC, "overrides": ["distill.tokens=10k"]}))
        assert (run["name"], run["state"]) == ("tiny", "queued")
        for tool, state in (("pause_run", "paused"), ("resume_run", "queued"), ("cancel_run", "cancelled")):
            assert told(await client.call_tool(tool, {"run_id": run["id"]}))["state"] == state
        refused = await client.call_tool("pause_run", {"run_id": run["id"]})
        assert refused.is_error and "it is cancelled" in refused.content[0].text

    with_client(app, "run", ask)
    assert [run.owner for run in app.state.runs.page().items] == ["ada"]


@writing
def test_a_token_that_may_read_changes_nothing_by_a_tool(app: FastAPI) -> None:
    run = run_of(app, "first")

    async def ask(client: Client) -> None:
        for name, arguments in (("cancel_run", {"run_id": run}), ("submit_run", {"config": SPEC})):
            refused = await client.call_tool(name, arguments)
            assert refused.is_error and "scope run" in refused.content[0].text

    with_client(app, "read", ask)
    assert [found.state for found in app.state.runs.page().items] == ["queued"]


def test_wrong_arguments_are_answers_in_words(app: FastAPI) -> None:
    async def ask(client: Client) -> None:
        for name, arguments, words in (
            ("get_run", {"run_id": "1hc9xqv3z-7m2k0ft"}, "there is no run"),
            ("get_run", {"run_id": "../../etc"}, "run_id"),
            ("list_runs", {"states": ["asleep"]}, "states"),
            ("compare_runs", {"run_ids": ["1hc9xqv3z-7m2k0ft"]}, "run_ids"),
            ("validate_config", {}, "config"),
        ):
            refused = await client.call_tool(name, arguments)
            assert refused.is_error and words in refused.content[0].text, refused.content
            assert "Traceback" not in refused.content[0].text

    with_client(app, "read", ask)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401), ({"authorization": "Bearer kds_wrong"}, 401), ({"cookie": "kdscale=x"}, 401),
        ({"authorization": "Basic YTpi"}, 401), ({"authorization": "Bearer {secret}", "host": "evil.example"}, 421),
        ({"authorization": "Bearer {secret}"}, 200),
    ],
)  # fmt: skip
def test_nobody_without_a_token_comes_to_the_protocol(app: FastAPI, headers: dict[str, str], status: int) -> None:
    secret = app.state.accounts.new_token("agent", "ada", ["read"])[1]
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    sent = {name: value.format(secret=secret) for name, value in headers.items()}

    async def ask() -> None:
        transport = httpx2.ASGITransport(app)
        async with mcp_running(app), httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            accept = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
            answer = await http.post("/mcp", content=json.dumps(call), headers={**accept, **sent})
            assert answer.status_code == status, answer.text

    anyio.run(ask)


def test_it_is_not_there_when_it_is_switched_off(settings: ServiceSettings, database: Database) -> None:
    app = make_app(settings.model_copy(update={"mcp": False}), database)
    assert "/mcp" not in [getattr(route, "path", "") for route in app.routes]
