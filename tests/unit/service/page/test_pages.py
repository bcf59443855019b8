"""Every page, for a service without runs, with one and with many, and for names that are meant to break it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kdscale.service.database.runs import Runs
from kdscale.service.page.actions import actions_for
from tests.unit.service.page.conftest import ADDRESS, add_run, sign_in
from tests.unit.service.page.document import Document

HOSTILE = "<script>alert(1)</script>\"' onload=x \u202egnp.exe {{ 7*7 }} </pre>&amp;"
PAGES = ("/runs", "/runs/new", "/compare", "/machine", "/runs/live", "/machine/live")


def read(client: TestClient, path: str, status: int = 200) -> Document:
    """A page without a fault."""
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    document = Document(answer.text)
    assert document.faults == [], path
    return document


@pytest.mark.parametrize("path", PAGES)
def test_pages_of_a_service_without_runs(client: TestClient, path: str) -> None:
    assert read(client, path).said


def test_an_address_with_nothing_behind_it_is_a_page_in_a_browser(client: TestClient) -> None:
    answer = client.get("/new<script>", headers={"Accept": "text/html,*/*"})
    document = Document(answer.text)
    assert (answer.status_code, document.faults) == (404, [])
    assert "There is nothing at /new" in document.said and "/runs" in answer.text
    assert client.get("/new").headers["content-type"] == "application/problem+json"


def test_a_stranger_is_asked_to_sign_in_and_comes_back(app: Any) -> None:
    stranger = TestClient(app, ADDRESS, follow_redirects=False)
    asked = stranger.get("/runs?state=failed")
    assert (asked.status_code, asked.headers["location"]) == (303, "/sign-in?next=%2Fruns%3Fstate%3Dfailed")
    assert read(stranger, asked.headers["location"]).fields["next"] == "/runs?state=failed"
    # a part of a page sends the whole page there
    assert stranger.get("/runs/live", headers={"HX-Request": "true"}).headers["hx-redirect"] == "/sign-in"


@pytest.mark.parametrize("there", ["https://elsewhere.example/", "//elsewhere.example", "/\\elsewhere", "javascript:x"])
def test_a_sign_in_leads_nowhere_else(app: Any, there: str) -> None:
    _, secret = app.state.accounts.new_token("test", "alice", ["read"])
    answer = TestClient(app, ADDRESS).post("/sign-in", data={"token": secret, "next": there}, follow_redirects=False)
    assert answer.headers["location"] == "/runs"


def test_a_wrong_token_signs_nobody_in(app: Any) -> None:
    stranger = TestClient(app, ADDRESS)
    answer = stranger.post("/sign-in", data={"token": "kds_no"})
    assert answer.status_code == 401
    assert "opens nothing" in Document(answer.text).said
    assert not stranger.cookies
    elsewhere = stranger.post("/sign-in", data={"token": "kds_no"}, headers={"Origin": "https://evil.example"})
    assert elsewhere.status_code == 403


def test_a_hostile_name_is_text_on_every_page(client: TestClient, runs: Runs, tmp_path: Path) -> None:
    first, second = (add_run(runs, tmp_path, HOSTILE, HOSTILE, "failed") for _ in range(2))
    first.folder.mkdir()
    second.folder.mkdir()
    (first.folder / "config.yaml").write_text(json.dumps({"name": HOSTILE}))
    paths = [
        "/runs", f"/runs?owner={HOSTILE}&search=%3Cscript", f"/runs/{first.id}", f"/runs/{first.id}/live",
        f"/runs/{first.id}/fork", f"/compare?run={first.id}&run={second.id}", "/machine",
    ]  # fmt: skip
    for path in paths:
        document = read(client, path)
        assert "\u202e" not in document.text
        if not path.endswith(("/machine", "/live")):
            assert "<script>alert(1)</script>" in document.said, path
    # a file that is named to break out of its link
    (first.folder / 'a"><img src=x onerror=y>.txt').write_text("x")
    assert read(client, f"/runs/{first.id}").said.count("<img src=x onerror=y>") == 1


def test_a_run_that_trains_shows_its_curves_and_what_is_not_as_by_default(
    client: TestClient, runs: Runs, tmp_path: Path
) -> None:
    run = add_run(runs, tmp_path, state="running")
    (run.folder / "logs").mkdir(parents=True)
    rows = [{"kind": "validation", "step": 0, "tokens": 0, "loss": 5.0, "perplexity": 140.0}]
    rows += [
        {"kind": "train", "step": n, "tokens": 100 * n, "loss": 5 / n, "tokens_per_second": 250.0} for n in range(1, 9)
    ]
    rows += [{"kind": "validation", "step": 8, "tokens": 0, "loss": 4.0, "perplexity": 54.0}]
    log = run.folder / "logs" / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.set_progress(run.id, {"stage": "distill", "share": 0.5, "losses": [3.0, 2.0, "x"], "tokens_per_second": 250.4})
    document = read(client, f"/runs/{run.id}")
    assert document.text.count("<figure") == 3
    assert "Line chart of validation perplexity over training tokens" in document.text
    assert "distill.tokens" in document.said
    assert "importance.calibration_tokens" not in document.said.partition("The whole config")[0]
    assert "kdscale run demo" in document.said
    assert 'aria-label="Loss from 3 to 2"' in read(client, "/runs?state=running").text
    with log.open("a") as stream:
        stream.write(json.dumps({"kind": "train", "step": 9, "tokens": 900, "loss": 0.1, "tokens_per_second": 1}))
        stream.write("\n")
    assert "now at 900" in read(client, f"/runs/{run.id}/live").text
    shutil.rmtree(run.folder)


def test_a_thousand_runs_come_in_pages(app: Any, client: TestClient, runs: Runs, tmp_path: Path) -> None:
    with app.state.database.begin() as connection:
        from kdscale.service.database.runs import NewRun

        for number in range(1000):
            new = NewRun(name=f"run {number}", owner="carol", config={}, folder=tmp_path / str(number))
            runs.add_in(connection, new)
    seen: set[str] = set()
    path = "/runs?owner=carol"
    while path:
        document = read(client, path)
        found = {link for link in document.links if link.startswith("/runs/1")}
        assert len(found) == 50
        assert not seen & found
        seen |= found
        path = next((link for link in document.links if "after=" in link), "")
    assert len(seen) == 1000
    assert "queued 1,0" in read(client, "/runs").said
    urgent = add_run(runs, tmp_path, "urgent")
    runs.update(urgent.id, priority=9)
    machine = read(client, "/machine")
    assert machine.said.count(" carol ") == 49
    assert machine.said.index("urgent") < machine.said.index(" carol ")
    assert read(client, "/runs?search=run+999&owner=carol").said.count("run 999") == 1


def test_buttons_fit_the_state_and_the_reader(app: Any, runs: Runs, tmp_path: Path) -> None:
    from kdscale.service.access.identity import Actor

    def names(state: str, owner: str, scope: str) -> list[str]:
        run = add_run(runs, tmp_path, owner="dora", state=state)
        return [action.name for action in actions_for(run, Actor(owner, [scope], "t"))]

    assert names("running", "dora", "run") == ["pause", "cancel", "rerun", "fork"]
    assert names("paused", "dora", "run") == ["resume", "cancel", "rerun", "fork"]
    assert names("succeeded", "dora", "run") == ["rerun", "fork"]
    assert names("running", "erik", "run") == ["rerun", "fork"]
    assert names("running", "erik", "admin") == ["pause", "cancel", "rerun", "fork"]
    assert names("running", "dora", "read") == []


def test_a_run_is_paused_and_resumed_by_plain_forms(client: TestClient, runs: Runs, tmp_path: Path) -> None:
    run = add_run(runs, tmp_path)
    asked = read(client, f"/runs/{run.id}/pause")
    assert runs.get(run.id).state == "queued"  # asking changes nothing
    answer = client.post(f"/runs/{run.id}/pause", data=asked.fields, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{run.id}")
    assert runs.get(run.id).state == "paused"
    client.post(f"/runs/{run.id}/resume", data=asked.fields)
    assert runs.get(run.id).state == "queued"
    refused = client.post(f"/runs/{run.id}/resume", data={"key": "x"})
    assert refused.status_code == 403  # without the text that only the page knows
    runs.move(run.id, "starting")
    runs.move(run.id, "succeeded")
    late = client.post(f"/runs/{run.id}/pause", data=asked.fields)
    assert late.status_code == 409
    assert "it is succeeded" in Document(late.text).said


def test_a_reader_and_somebody_else_cannot_press_buttons(app: Any, runs: Runs, tmp_path: Path) -> None:
    run = add_run(runs, tmp_path, owner="alice")
    other = sign_in(app, "mallory", "run")
    token = read(other, f"/runs/{run.id}/pause").fields["csrf_token"]
    assert other.post(f"/runs/{run.id}/pause", data={"csrf_token": token}).status_code == 403
    reader = sign_in(app, "alice", "read")
    assert read(reader, f"/runs/{run.id}/pause", 403).said
    assert runs.get(run.id).state == "queued"


def test_signing_out_ends_it(app: Any) -> None:
    client = sign_in(app)
    token = read(client, "/runs").fields["csrf_token"]
    assert client.post("/sign-out", data={"csrf_token": token}, follow_redirects=False).status_code == 303
    assert client.get("/runs", follow_redirects=False).status_code == 303


def test_static_files_are_kept_by_browsers_and_nothing_else_is_served(client: TestClient) -> None:
    page = client.get("/runs").text
    address = page.partition('href="')[2] and page.split('rel="stylesheet" href="')[1].split('"')[0]
    answer = client.get(address)
    assert answer.headers["content-type"].startswith("text/css")
    assert "immutable" in answer.headers["cache-control"]
    for path in ("/static/..%2frendering.py", "/static/base.html.j2", "/static/"):
        assert client.get(path).status_code == 404


def test_secrets_are_not_shown(client: TestClient, runs: Runs, tmp_path: Path) -> None:
    run = add_run(runs, tmp_path)
    runs.move(run.id, "starting", reason="from https://user:hunter22@host/x")
    assert "hunter22" not in read(client, f"/runs/{run.id}").text


def test_a_part_that_fails_is_a_part(client: TestClient) -> None:
    answer = client.get("/runs/1hc9xqv3z-7m2k0ft/live", headers={"HX-Request": "true"})
    assert (answer.status_code, "<html" in answer.text, "there is no run" in answer.text) == (404, False, True)


def test_pages_that_are_not_there_say_so(client: TestClient) -> None:
    for path in ("/runs/1hc9xqv3z-7m2k0ft", "/runs/zzz", "/runs/new%00", "/compare?run=1hc9xqv3z-7m2k0ft"):
        assert "there is no run" in read(client, path, 404).said
