"""The form of a new run: what it makes, what it says of a config, and the commands that do the same."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from starlette.testclient import TestClient

from kdscale.service.api import submitting
from kdscale.service.api.checking import validating
from kdscale.service.database.runs import Runs
from kdscale.service.page.facts.config_changes import changes, command_line
from tests.unit.service.page.conftest import sign_in
from tests.unit.service.page.document import Document

YAML = "name: small\nrun_dir: x\nteacher:\n  path: teachers/tiny\nprune:\n  target_params: 50%\n"
_ANSWER: dict[str, Any] = {
    "stages": ["data", "distill"], "student": {"hidden": 64, "layers": 2}, "student_parameters": 1_000_000,
    "teacher_parameters": 2_000_000, "notes": ["the text is short <b>"], "refused": [],
    "estimate": {
        "cluster": {"gpu": "NVIDIA H100 SXM 80 GB", "nodes": 1, "gpus_per_node": 8}, "assumed": True, "fits": True,
        "setting": {}, "gpu_bytes": 7e9, "tokens": 20_000, "tokens_per_second": 1_120_597.0, "days": 2.0,
    },
}  # fmt: skip


def fill(client: TestClient, **given: str) -> dict[str, str]:
    """The fields of the form as a browser sends them."""
    answer = client.get("/runs/new")
    document = Document(answer.text)
    assert document.faults == []
    return {**document.fields, "config_name": "", "config": "", "overrides": "", "engine": "local", **given}


def test_a_submitted_form_is_a_run_and_sent_twice_it_is_the_same_run(client: TestClient, runs: Runs) -> None:
    sent = fill(client, config=YAML, name="by-hand", priority="5", overrides="distill.tokens=20k\r\n# no\r\n")
    answers = [client.post("/runs/new", data=sent, follow_redirects=False) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["location"] == answers[1].headers["location"]
    run = runs.get(answers[0].headers["location"].rpartition("/")[2])
    assert (run.name, run.owner, run.priority, run.overrides) == ("by-hand", "alice", 5, ["distill.tokens=20k"])
    assert run.config["distill"]["tokens"] == 20_000
    assert (run.folder / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no config"),
        ({"config": "a: [1"}, "not valid YAML"),
        ({"config": "- 1"}, "YAML with settings"),
        ({"config": YAML + "# x" * 30_000}, "too large"),
        ({"config": YAML, "priority": "high"}, "priority"),
        ({"config": YAML, "priority": "5000"}, "priority"),
        ({"config": YAML, "name": "<img src=x>"}, "name"),
        ({"config": YAML, "overrides": "distill.nothing=1"}, "distill.nothing"),
        ({"config": YAML, "overrides": "run_dir=/etc"}, "the service says where"),
        ({"config": YAML, "engine": "nowhere"}, "nowhere"),
        ({"config_name": "nothing"}, "nothing"),
        ({"config": "x" * 200_001}, "too long"),
    ],
)
def test_what_cannot_run_comes_back_with_the_reason_and_what_was_typed(
    client: TestClient, given: dict[str, str], said: str
) -> None:
    answer = client.post("/runs/new", data=fill(client, **given), follow_redirects=False)
    assert 400 <= answer.status_code < 500
    document = Document(answer.text)
    assert document.faults == []
    assert said in document.said
    if "<" not in given.get("name", "") and len(given.get("config", "")) < 1000:
        assert given.get("config", "").strip() in answer.text


@pytest.mark.parametrize(("button", "forked"), [("rerun", False), ("fork", True)])
def test_a_run_is_made_from_another(
    client: TestClient, runs: Runs, monkeypatch: pytest.MonkeyPatch, button: str, forked: bool
) -> None:
    sent = fill(client, config=YAML, name="parent")
    parent = client.post("/runs/new", data=sent, follow_redirects=False).headers["location"].rpartition("/")[2]
    taken_over: list[tuple[str, ...]] = []  # what a process of its own would bring over
    monkeypatch.setattr(submitting, "ask_child", lambda *asked, seconds: taken_over.append(asked))
    asked = Document(client.get(f"/runs/{parent}/{button}").text)
    assert asked.faults == []
    changed = {"overrides": "distill.seq_len=128"} if forked else {}
    answer = client.post(f"/runs/{parent}/{button}", data={**asked.fields, **changed}, follow_redirects=False)
    assert answer.status_code == 303, Document(answer.text).said
    made = runs.get(answer.headers["location"].rpartition("/")[2])
    assert (made.parent, made.name, len(taken_over)) == (parent, "parent", int(forked))
    assert made.config["distill"]["seq_len"] == (128 if forked else 512)


def test_somebody_who_may_only_look_gets_no_form(app: Any) -> None:
    reader = sign_in(app, "rita", "read")
    assert reader.get("/runs/new").status_code == 403


def test_an_estimate_is_shown_beside_the_form(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_question: Any, _seconds: float) -> dict[str, Any]:
        return dict(_ANSWER)

    monkeypatch.setattr(validating, "_in_child", answer)
    for path in ("/runs/new/estimate", "/runs/new/check"):
        shown = client.post(path, data=fill(client, config_name="quick", overrides="distill.tokens=20k"))
        document = Document(shown.text)
        assert (shown.status_code, document.faults) == (200, [])
        assert "8 × NVIDIA H100 SXM 80 GB, as no GPU of this machine is known" in document.said
        assert "20.0 k tokens at 1.12 M a second" in document.said
        assert "the text is short <b>" in document.said
        assert "kdscale submit quick" in document.said
    refused = client.post("/runs/new/estimate", data=fill(client, config="teacher: 5"))
    assert "This cannot run yet" in Document(refused.text).said


def test_a_command_is_quoted_for_a_shell() -> None:
    hostile = ["data.sources=[{path: 'a b'}]", "name=$(reboot)`x`;'", "--help"]
    text = command_line("submit", "quick", hostile, ("--server", "http://127.0.0.1:1"))
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:5] == ["kdscale", "submit", "quick", "--server", "http://127.0.0.1:1"]
    assert words[6::2] == hostile
    assert command_line("run", "", []) == "kdscale run config.yaml"


def test_only_what_is_not_as_by_default_is_a_change() -> None:
    config = {"name": "n", "run_dir": "r", "seed": 0, "distill": {"seq_len": 128}, "correct": {"tokens": 5}}
    config |= {"targets": None}
    found = {change.field: (change.old, change.new) for change in changes(config)}
    assert found == {"distill.seq_len": ("512", "128"), "correct.tokens": (None, "5")}
