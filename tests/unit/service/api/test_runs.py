"""Runs over HTTP: made once, listed, looked at, asked to stop."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from kdscale.config.load import load_config
from kdscale.service.api import submitting
from kdscale.service.database.folders import read_run_folder
from kdscale.service.database.runs import Run
from kdscale.service.database.subscriptions import subscriptions_of
from kdscale.service.ids import new_run_id
from kdscale.service.notices.occasions import DEFAULT_KINDS
from kdscale.service.watching.rebuild import rebuild
from tests.unit.service.api.conftest import Caller

CONFIG = {"teacher": {"path": "hf:org/model"}, "prune": {"target_params": "50%"}}


def test_a_submission_is_a_folder_and_a_row(as_: Caller, app: FastAPI) -> None:
    body = {"config": CONFIG, "set": ["distill.tokens=1M"], "name": "half", "priority": 3}
    answer = as_("ada").post("/v1/runs", json=body)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert answer.headers["location"] == f"/v1/runs/{made['id']}"
    folder = app.state.settings.runs / made["id"]
    config = load_config(folder / "config.yaml")
    assert (config.run_dir, config.name, config.distill.tokens) == (str(folder), "half", 1_000_000)
    spec = read_run_folder(folder, config.resolved())
    assert spec is not None and (spec.id, spec.owner, spec.priority) == (made["id"], "ada", 3)
    assert (made["state"], made["config"]) == ("queued", config.resolved())
    assert [stage["state"] for stage in made["stages"]] == ["waiting"] * len(made["stages"])
    assert as_("reader").get(answer.headers["location"]).json() == made, "whoever may read sees the same"


def test_a_config_is_named_by_its_name_or_by_a_run(as_: Caller, make_run: Callable[..., Run]) -> None:
    ada = as_("ada")
    run = make_run()
    for name in ("quick", run.id):
        made = ada.post("/v1/runs", json={"config_name": name, "set": ["teacher.path=hf:org/model"]}).json()
        assert made["config_name"] == name, made
    for name in ("../quick", "configs/quick.yaml", "/etc/passwd", "qick", new_run_id()):
        refused = ada.post("/v1/runs", json={"config_name": name})
        assert refused.status_code in (404, 422) and "id" not in refused.json(), name


def test_the_same_key_makes_no_second_run(as_: Caller, app: FastAPI) -> None:
    ada, headers = as_("ada"), {"Idempotency-Key": "k1"}
    first, second = (ada.post("/v1/runs", json={"config": CONFIG}, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"] and second.headers["idempotency-replayed"] == "true"
    other = ada.post("/v1/runs", json={"config": CONFIG, "priority": 1}, headers=headers)
    assert (other.status_code, other.json()["type"]) == (422, "urn:kdscale:problem:key")
    bob = as_("bob").post("/v1/runs", json={"config": CONFIG}, headers=headers)
    assert bob.status_code == 201 and bob.json()["id"] != first.json()["id"], "a key is its owner's"
    assert len(app.state.runs.page().items) == 2


def test_a_refused_request_leaves_its_key_free(as_: Caller, app: FastAPI) -> None:
    ada, headers = as_("ada"), {"Idempotency-Key": "k1"}
    assert ada.post("/v1/runs", json={"config": {"prune": 3}}, headers=headers).status_code == 422
    assert ada.post("/v1/runs", json={"config": CONFIG}, headers=headers).status_code == 201
    assert len(list(app.state.settings.runs.iterdir())) == 1


def test_who_is_told_of_a_run_is_its_owners_secret(as_: Caller, app: FastAPI) -> None:
    to = "https://hooks.example/T0/secret-key"
    body = {"config": CONFIG, "notify": [{"to": to, "on": ["failed"]}, {"to": "https://other.example/"}]}
    made = as_("ada").post("/v1/runs", json=body)
    assert made.status_code == 201 and "secret-key" not in made.text
    state, run_id = app.state, made.json()["id"]

    def subscriptions() -> list[tuple[str, tuple[str, ...]]]:
        with state.database.read() as connection:
            return [(item.to, item.on) for item in subscriptions_of(connection, run_id)]

    wanted = [(to, ("failed",)), ("https://other.example/", DEFAULT_KINDS)]
    assert subscriptions() == wanted
    file = state.settings.jobs / run_id / "notify.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for path in (state.settings.runs / run_id).rglob("*"):
        assert path.is_dir() or "secret-key" not in path.read_text(), "run folders are shown to every reader"
    state.runs.move(run_id, "cancelled")
    state.runs.remove(run_id)
    assert subscriptions() == []
    rebuild(state.settings, state.database)
    assert subscriptions() == wanted, "a database that is made anew has them again"


def test_addresses_that_no_notice_may_go_to_are_refused_together(as_: Caller, app: FastAPI) -> None:
    wrong = [{"to": to} for to in ("https://127.0.0.1/", "mailto:ada@example.org", "ftp://x/", "https://fine.example/")]
    refused = as_("ada").post("/v1/runs", json={"config": CONFIG, "notify": wrong})
    assert refused.status_code == 422
    assert [error["field"] for error in refused.json()["errors"]] == ["notify.0.to", "notify.1.to", "notify.2.to"]
    for notify in ([{"to": "https://fine.example/", "on": ["lunch"]}], [{"to": "https://fine.example/"}] * 11, [{}]):
        assert as_("ada").post("/v1/runs", json={"config": CONFIG, "notify": notify}).status_code == 422
    assert app.state.runs.counts() == {}


class Killed(BaseException):
    """What a kill -9 at this line looks like to the next request."""


@pytest.mark.parametrize(
    "line", ["write_subscriptions", "atomic_dir", "dump_config", "write_run_folder", "row", "answer"]
)
def test_a_kill_at_any_line_of_a_submission_loses_nothing(
    line: str, as_: Caller, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise Killed

    ada, headers, state = as_("ada"), {"Idempotency-Key": "k1"}, app.state
    with monkeypatch.context() as patch:
        places = {"row": (state.runs, "add_in"), "answer": (state.answers, "finish")}
        patch.setattr(*places.get(line, (submitting, line)), kill)
        ada.post("/v1/runs", json={"config": CONFIG}, headers=headers)  # nobody hears of it
    folders = [path for path in state.settings.runs.iterdir() if not path.name.startswith(".")]
    for folder in folders:  # what a start of the service would find is whole
        assert read_run_folder(folder, {}) is not None and load_config(folder / "config.yaml")
    made = ada.post("/v1/runs", json={"config": CONFIG}, headers=headers)
    assert made.status_code == 201, made.text
    assert [run.id for run in state.runs.page().items] == [made.json()["id"]]
    assert [path.name for path in state.settings.runs.iterdir() if not path.name.startswith(".")] == [made.json()["id"]]


def test_a_database_that_fails_within_a_submission_makes_no_second_run(
    as_: Caller, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    ada, headers, state = as_("ada"), {"Idempotency-Key": "k1"}, app.state
    with monkeypatch.context() as patch:
        patch.setattr(state.runs, "add_in", fail)
        failed = ada.post("/v1/runs", json={"config": CONFIG}, headers=headers)
        assert failed.status_code == 503 and failed.headers["retry-after"], "by which a client tries again"
    made = ada.post("/v1/runs", json={"config": CONFIG}, headers=headers)
    assert made.status_code == 201, made.text
    assert rebuild(state.settings, state.database) == [], "no folder is left that a start of the service would run"
    assert len(state.runs.page().items) == 1


def test_settings_that_take_long_to_read_are_not_read(as_: Caller) -> None:
    """Each is YAML: a megabyte of them kept a thread for 38 seconds, also with a token that only reads."""
    settings = ["seed=[" + "1," * 8000 + "]"] * 3
    answer = as_("reader").post("/v1/runs:validate", json={"config": {}, "set": settings})
    assert (answer.status_code, "32,768 characters together" in answer.text) == (422, True), answer.text


def test_what_a_config_cannot_say_is_told_by_field(as_: Caller) -> None:
    config = {"teacher": {"path": "hf:a/b"}, "prune": {"target_params": "50%"}, "distill": {"tokns": 3, "seq_len": -1}}
    problem = as_("ada").post("/v1/runs", json={"config": config}).json()
    assert {entry["field"]: entry["detail"] for entry in problem["errors"]}["distill.tokns"].startswith(
        "unknown key (did"
    )
    assert "distill.seq_len" in {entry["field"] for entry in problem["errors"]}


@pytest.mark.parametrize(
    "field", ["teacher.trust_remote_code=true", "teacher.path=/etc", "data.chat_template=/etc/passwd"]
)
def test_code_and_paths_are_for_admins(as_: Caller, field: str) -> None:
    body = {"config": CONFIG, "set": [field]}
    refused = as_("ada").post("/v1/runs", json=body)
    assert refused.status_code == 403 and refused.json()["errors"][0]["field"] == field.partition("=")[0]
    assert as_("admin").post("/v1/runs", json=body).status_code == 201
    assert as_("reader").post("/v1/runs", json=body).status_code == 403


@pytest.mark.parametrize("entry", ["run_dir=/tmp/x", "run_dir =/tmp/x"])
def test_nobody_chooses_the_run_folder(as_: Caller, entry: str) -> None:
    refused = as_("admin").post("/v1/runs", json={"config": CONFIG, "set": [entry]})
    assert refused.status_code == 422, refused.text


def test_a_list_is_read_page_by_page(as_: Caller, make_run: Callable[..., Run]) -> None:
    ids = [make_run(number, owner="ada" if number % 2 else "bob").id for number in range(7)]
    reader, found, after = as_("reader"), [], None
    while True:
        page = reader.get("/v1/runs", params={"limit": 3} | ({"after": after} if after else {})).json()
        found += [item["id"] for item in page["items"]]
        if (after := page["next"]) is None:
            break
    assert found == ids[::-1]
    assert len(reader.get("/v1/runs?owner=bob").json()["items"]) == 4
    assert len(reader.get("/v1/runs?state=queued&state=failed&search=run 3").json()["items"]) == 1
    assert reader.get("/v1/runs?state=gone").status_code == 422
    assert reader.get("/v1/runs?after=../x").status_code == 422


def test_requests_move_a_run_or_say_why_not(as_: Caller, make_run: Callable[..., Run]) -> None:
    run, ada = make_run(), as_("ada")
    for ask, state in (("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = ada.post(f"/v1/runs/{run.id}/{ask}")
        assert (answer.status_code, answer.json()["state"]) == (200, state)
    refused = ada.post(f"/v1/runs/{run.id}/pause")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:kdscale:problem:state")
    assert refused.json()["got"] == "it is cancelled"
    assert as_("bob").post(f"/v1/runs/{run.id}/resume").status_code == 403, "another's run"
    assert as_("admin").post(f"/v1/runs/{run.id}/resume").status_code == 200
    assert ada.post(f"/v1/runs/{new_run_id()}/cancel").status_code == 404
    assert ada.post(f"/v1/runs/{run.id}/explode").status_code == 404


def test_a_rerun_is_a_new_run_of_the_same_config(as_: Caller, make_run: Callable[..., Run], app: FastAPI) -> None:
    run = make_run(overrides=["prune.target_params=50%"])
    app.state.runs.update(run.id, config={**run.config, "teacher": {**run.config["teacher"], "path": "hf:a/b"}})
    made = as_("bob").post(f"/v1/runs/{run.id}/rerun", json={"set": ["distill.tokens=2M"]})
    assert made.status_code == 201, made.text
    new = made.json()
    assert (new["parent"], new["owner"], new["name"]) == (run.id, "bob", "tiny")
    assert new["config"]["distill"]["tokens"] == 2_000_000
    assert new["overrides"] == ["prune.target_params=50%", "distill.tokens=2M"]
    assert Path(new["config"]["run_dir"]).name == new["id"]


def test_a_run_that_could_never_start_is_refused(as_: Caller, app: FastAPI) -> None:
    processes = ["distill.processes=64", "runtime.device=cuda", "distill.global_batch=256"]
    refused = as_("ada").post("/v1/runs", json={"config": CONFIG, "set": processes})
    assert refused.status_code == 422 and refused.json()["got"] == "64 processes", refused.text
    elsewhere = {"config": CONFIG, "set": processes, "target": {"engine": "slurm", "nodes": 8, "gpus_per_node": 8}}
    for changes in ({"quotas": {"ada": 63}}, {"engines": {"slurm": {"slots": 63}}}):
        before, app.state.settings = app.state.settings, app.state.settings.model_copy(update=changes)
        refused = as_("ada").post("/v1/runs", json=elsewhere)
        assert refused.status_code == 422 and "at most 63 slots" in refused.json()["expected"], refused.text
        app.state.settings = before
    assert as_("ada").post("/v1/runs", json=elsewhere).status_code == 201
    assert len(list(app.state.settings.runs.iterdir())) == 1
