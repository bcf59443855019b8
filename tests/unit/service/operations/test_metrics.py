"""What Prometheus reads, and what is done around every request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.staticfiles import StaticFiles
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from kdscale.service.app import make_app
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import NewRun, Runs
from kdscale.service.operations.metric_table import METRICS
from kdscale.service.problems import Problem
from kdscale.service.settings import ServiceSettings


class FakeScheduler:
    """As much of a scheduler as the application asks for."""

    def __init__(self) -> None:
        self.machine = type("Machine", (), {"slots": 4})()

    def leads(self) -> bool:
        return True


@pytest.fixture
def app(settings: ServiceSettings, database: Database) -> Any:
    made = make_app(settings.model_copy(update={"public_metrics": True}), database, FakeScheduler())
    router = APIRouter()

    @router.get("/things/{name}")
    def thing(name: str) -> str:
        if name == "bad":
            raise ValueError("a bug")
        if name == "none":
            raise Problem(404, "not-found", "no such thing")
        return name

    made.include_router(router)
    return made


@pytest.fixture
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as opened:
        yield opened


def figures(client: TestClient) -> dict[tuple[str, ...], float]:
    """Every sample: its name and the values of its labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_are_counted_by_route_and_never_by_what_a_stranger_writes(client: TestClient, tmp_path: Path) -> None:
    for path in ("/things/1", "/things/2", "/things/none", "/things/bad", "/nowhere/1", "/nowhere/2"):
        client.get(path)
    client.request("BREW", "/things/1")
    found = figures(client)
    counted = {key[1:]: value for key, value in found.items() if key[0] == "kdscale_requests_total"}
    assert counted == {
        ("method=GET", "route=/things/{name}", "status=200"): 2,
        ("method=GET", "route=/things/{name}", "status=404"): 1,
        ("method=GET", "route=/things/{name}", "status=500"): 1,
        ("method=GET", "route=other", "status=404"): 2,
        ("method=other", "route=/things/{name}", "status=405"): 1,
    }
    assert found[("kdscale_request_seconds_count", "method=GET", "route=/things/{name}")] == 4


def test_files_that_are_mounted_count_as_one_route(app: Any, client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    app.mount("/some", StaticFiles(directory=tmp_path))
    assert client.get("/some/a.txt").status_code == 200
    assert len([key for key in figures(client) if key[0] == "kdscale_requests_total"]) == 1


def test_the_queue_the_slots_and_the_speed_of_runs(client: TestClient, database: Database, tmp_path: Path) -> None:
    runs = Runs(database, lambda: 1000.0)
    first, second = (
        runs.add(NewRun(name="r", owner="ada", config={}, folder=tmp_path / str(number), slots=3)) for number in (1, 2)
    )
    runs.move(first.id, "starting")
    runs.move(first.id, "running")
    runs.set_progress(first.id, {"step": 12, "tokens_per_second": 345.5, "stage": "distill"})
    found = figures(client)
    assert found[("kdscale_runs", "state=running")] == found[("kdscale_runs", "state=queued")] == 1
    assert found[("kdscale_runs", "state=failed")] == 0
    assert found[("kdscale_queue_oldest_seconds",)] > 1e9
    assert found[("kdscale_slots", "use=used")] == 3 and found[("kdscale_slots", "use=free")] == 1
    assert found[("kdscale_run_step", f"run={first.id}")] == 12
    assert found[("kdscale_run_tokens_per_second", f"run={first.id}")] == 345.5
    assert found[("kdscale_disk_free_bytes",)] > 0
    assert not any(f"run={second.id}" in key for key in found)


def test_steps_of_the_scheduler_are_counted(app: Any, client: TestClient) -> None:
    assert figures(client)[("kdscale_scheduler_last_step_timestamp_seconds",)] == 0
    app.state.scheduler.on_step(0.2)
    found = figures(client)
    assert found[("kdscale_scheduler_step_seconds_count",)] == 1
    assert found[("kdscale_scheduler_last_step_timestamp_seconds",)] > 1e9


def test_a_database_that_is_down_is_a_figure_and_no_error(app: Any, client: TestClient, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Runs, "counts", fail)
    found = figures(client)
    assert found[("kdscale_collect_failed",)] == 1 and ("kdscale_disk_free_bytes",) in found


def test_every_metric_is_in_the_table_and_the_other_way_round(client: TestClient) -> None:
    client.get("/things/1")
    families = text_string_to_metric_families(client.get("/metrics").text)
    names = {family.name for family in families if not family.name.endswith("_created")}
    assert {name.removesuffix("_total") for name in METRICS} == {name.removesuffix("_total") for name in names}


def test_metrics_need_a_token_unless_the_settings_say_otherwise(settings: ServiceSettings, database: Database) -> None:
    app = make_app(settings, database)
    with TestClient(app, "http://localhost") as client:
        assert client.get("/metrics").status_code == 401
        _, secret = app.state.accounts.new_token("prometheus", "ops", ["read"])
        assert client.get("/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


def test_every_answer_has_an_id_and_every_problem_tells_it(client: TestClient, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kdscale.service.requests")
    answer = client.get("/things/none", headers={"X-Request-ID": "trace-7"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "trace-7"
    assert [record.fields["route"] for record in caplog.records if hasattr(record, "fields")] == ["/things/{name}"]
    for given in ("", "a b", "x" * 65, "-x", "<script>"):
        chosen = client.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"]
        assert chosen != given and len(chosen) == 16
    answer = client.get("/things/bad", headers={"X-Request-ID": "trace-8"})
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "trace-8"
    assert "content-security-policy" in answer.headers, "an answer for a bug passes all layers too"
    assert "a bug" not in answer.text and "ValueError: a bug" in caplog.text


def test_two_requests_at_once_keep_their_own_ids(client: TestClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> bool:
        return bool(
            client.get("/things/none", headers={"X-Request-ID": f"r{number}"}).json()["request_id"] == f"r{number}"
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(20)))
