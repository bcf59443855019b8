"""Every route has a scope, its refusals are problems, and nothing that a client sends makes the service fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from kdscale.service.api.files import artifacts
from kdscale.service.app import ROUTERS
from kdscale.service.database.runs import Run
from kdscale.service.problems import MEDIA_TYPE
from tests.unit.service.api.conftest import Caller

ROUTES = [
    (method, route)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and route.path.startswith("/v1")
    for method in sorted(route.methods or ())
]
HOSTILE = {
    "traversal": "../../etc/passwd", "nul": "\x00", "sql": "'; DROP TABLE runs; --", "html": "<script>x()</script>",
    "long": "9" * 400, "format": "%s%n", "digit": "٣", "surrogate": "\ud800",
}  # fmt: skip


def address(route: APIRoute, value: str = "1hf7yatz8-0000000") -> str:
    return re.sub(r"\{[^}]*\}", value, route.path)


def is_problem(answer: Any, *statuses: int) -> bool:
    told = answer.json() if answer.headers["content-type"] == MEDIA_TYPE else {}
    return (
        answer.status_code in statuses and told.get("status") == answer.status_code and "Traceback" not in answer.text
    )


@pytest.mark.parametrize(("method", "route"), ROUTES, ids=lambda value: getattr(value, "path", value))
def test_a_route_lets_in_whoever_has_its_scope(method: str, route: APIRoute, app: FastAPI, as_: Caller) -> None:
    body: dict[str, Any] = {"json": {}} if method == "POST" else {}
    stranger = TestClient(app, "http://localhost", raise_server_exceptions=False)
    answer = stranger.request(method, address(route), **body)
    assert answer.status_code == 401 and (method == "HEAD" or is_problem(answer, 401))
    reader = as_("reader").request(method, address(route), **body)
    writes = method == "POST" and route.path != "/v1/runs:validate"
    assert (reader.status_code == 403) == (writes or route.path == "/v1/audit"), reader.text


def test_what_there_is_not_is_a_problem(as_: Caller) -> None:
    for path in ("/v1", "/v1/", "/v1/nothing", "/v1/runs/", "/docs", "/redoc", "/v1/runs/x/y/z"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert is_problem(as_("admin").request(method, path), 404, 405, 422), (method, path)


def test_another_method_or_type_is_a_problem(as_: Caller) -> None:
    ada = as_("ada")
    assert is_problem(ada.delete("/v1/runs"), 405) and ada.delete("/v1/runs").headers["allow"]
    for kind in ("text/plain", "application/xml", ""):
        answer = ada.post("/v1/runs", content=b"a: 1", headers={"content-type": kind})
        assert is_problem(answer, 415), answer.text
    assert is_problem(ada.post("/v1/runs", content=b"{" + b" " * (2 << 20) + b"}"), 413)
    for body in (b"[" * 90_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"[]", b'"\\ud800"', b"nul"):
        answer = ada.post("/v1/runs", content=body, headers={"content-type": "application/json"})
        assert is_problem(answer, 400, 422), (body[:20], answer.text)


def test_a_bug_is_told_by_number_alone(as_: Caller, app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("the secret of it")

    app.state.runs.page = broken
    answer = as_("reader").get("/v1/runs")
    assert is_problem(answer, 500) and "secret" not in answer.text
    assert "the secret of it" in caplog.text


def parameters(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """Every parameter of every operation without a body: method, path, name."""
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                if path.startswith("/v1"):
                    yield method, path, parameter["name"]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_no_parameter_breaks_anything(app: FastAPI, as_: Caller, make_run: Callable[..., Run], value: str) -> None:
    run, admin = make_run(1), as_("admin")
    sent = value.encode("utf-8", "surrogatepass")
    for method, path, name in parameters(app):
        place = path.replace("{run_id}", "{id}" if name == "run_id" else run.id)
        quoted = "".join(f"%{byte:02x}" for byte in sent)
        target = re.sub(r"\{[^}]*\}", quoted, place)
        headers = {name: sent} if name == "Idempotency-Key" else {}
        query = "" if "{" in place or headers else f"?{name}={quoted}"
        answer = admin.request(method, target + query, headers=headers, **({"json": {}} if method == "post" else {}))
        assert answer.status_code < 500, (method, path, name, answer.text)
        if answer.status_code >= 400:
            assert is_problem(answer, answer.status_code), (method, path, name, answer.text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=8,
)  # fmt: skip
MEMBERS = ["config", "config_name", "set", "name", "priority", "target", "gpu", "nodes", "extra"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=5), st.sampled_from(["", ":validate", "/ID/rerun"]))
def test_no_body_breaks_anything(as_: Caller, make_run: Callable[..., Run], body: dict[str, Any], where: str) -> None:
    if ":validate" in where and isinstance(body.get("config"), dict):
        body = {**body, "config": {"name": 3}}  # refused before anything is started
    path = "/v1/runs" + where.replace("ID", "1hf7yatz8-0000000")
    answer = as_("admin").post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    assert answer.status_code in (200, 201) or is_problem(answer, answer.status_code), answer.text


def test_the_description_names_everything(app: FastAPI) -> None:
    tree = app.openapi()
    assert tree["paths"].keys() >= {route.path.replace(":path}", "}") for _, route in ROUTES if route.include_in_schema}
    for path, operations in tree["paths"].items():
        for method, operation in operations.items():
            assert operation["description"].endswith("."), path
            assert "security" in operation or not path.startswith("/v1"), (method, path)
            if method == "post" and "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(tree)))
    assert references <= set(tree["components"]["schemas"])
    names = [operation["operationId"] for path in tree["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def test_lists_hash_only_so_much_at_once(
    as_: Caller, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_HASHED_AT_ONCE", 5000)
    run = make_run(1, {"f/a": "x" * 3000, "f/b": "y" * 3000})

    def digests() -> list[str | None]:
        page = as_("reader").get(f"/v1/runs/{run.id}/artifacts/f").json()
        return [item["sha256"] for item in page["items"]]

    first = digests()
    assert first[0] and first[1] is None
    assert all(digests()), "asked again, the rest is there"
