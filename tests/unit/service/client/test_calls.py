"""Every call of the client, answered by the real application."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI

from kdscale.client import Client, ScopeError, SpecError, StateError, TokenError, UnknownError
from kdscale.runs.folder import METRICS
from tests.unit.service.client.conftest import SPEC, URL, InProcess


def test_a_run_from_its_submission_to_its_files(client: Client, app: FastAPI, tmp_path: Path) -> None:
    run = client.submit(SPEC, set=["distill.tokens=10k"], name="first", priority=3)
    assert (run.name, run.owner, run.state, run.priority) == ("first", "ada", "queued", 3)
    assert run.created.tzinfo is not None and abs((datetime.now(UTC) - run.created).total_seconds()) < 600
    detail = client.run(run.id)
    assert detail.config["distill"]["tokens"] == 10_000
    assert detail.overrides == ["distill.tokens=10k"]
    assert detail.stages[0].name == "data"

    assert client.pause(run.id).state == "paused"
    assert client.pause(run.id).state == "paused"  # asking twice is like asking once
    assert client.resume(run.id).state == "queued"
    assert client.cancel(run.id).state == "cancelled"
    found = list(client.events(run.id, follow=False))
    assert [event.data["state"] for event in found] == ["queued", "paused", "queued", "cancelled"]
    assert [event.seq for event in client.events(run.id, after=found[1].seq, follow=False)] == [
        event.seq for event in found[2:]
    ]
    assert client.wait(run.id).state == "cancelled"

    again = client.rerun(run.id, name="second", set=["distill.tokens=20k"])
    assert (again.parent, again.name) == (run.id, "second")
    assert client.run(again.id).config["distill"]["tokens"] == 20_000

    folder = app.state.settings.runs / run.id
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text("{}")
    (folder / METRICS.path).parent.mkdir(exist_ok=True)
    (folder / METRICS.path).write_text('{"kind": "train", "step": 1, "loss": 2.5}\n')
    assert client.metrics(run.id, names=["train/loss"]).series[0].values == [2.5]
    assert [file.path for file in client.artifacts(run.id, "student")] == ["student/config.json"]
    assert client.download(run.id, "student/config.json", tmp_path / "here").read_text() == "{}"
    assert list(client.logs(run.id)) == []
    assert client.machine()["counts"] == {"cancelled": 1, "queued": 1}
    assert [entry["id"] for entry in client.compare([run.id, again.id])["runs"]] == [run.id, again.id]
    with pytest.raises(SpecError, match=r"teacher\.path"):  # a fork looks at once at what it takes over
        client.fork(run.id, name="third")


def test_lists_are_complete_whatever_the_size_of_a_page(client: Client) -> None:
    made = [client.submit(SPEC, name=f"run-{number}").id for number in range(5)]
    for page in (1, 2, 5, 100):
        assert [run.id for run in client.runs(page=page)] == sorted(made, reverse=True)
    assert [run.name for run in client.runs(states=["queued"], owner="ada", search="run-3")] == ["run-3"]


def test_a_submission_that_is_sent_again_makes_no_second_run(client: Client) -> None:
    first = client.submit(SPEC, key="one")
    assert client.submit(SPEC, key="one").id == first.id
    assert len(list(client.runs())) == 1


def test_refusals_are_told_apart(client: Client, app: FastAPI) -> None:
    run = client.submit(SPEC)
    client.cancel(run.id)
    with pytest.raises(StateError, match="it is cancelled"):
        client.pause(run.id)
    with pytest.raises(UnknownError):
        client.run("1hc9xqv3z-7m2k0ft")
    with pytest.raises(SpecError, match=r"prune\.foo"):
        client.submit({**SPEC, "prune": {"foo": 1}})
    with pytest.raises(ScopeError, match="teacher"):
        client.submit({**SPEC, "teacher": {"path": "/etc"}})
    verdict = client.validate({**SPEC, "teacher": {"path": "/etc"}})
    assert not verdict.valid and verdict.refused[0].field == "teacher.path"
    reader = app.state.accounts.new_token("reader", "eve", ["read"])[1]
    with Client(URL, reader, transport=InProcess(app)) as other:
        assert [found.id for found in other.runs()] == [run.id]
        with pytest.raises(ScopeError, match="scope run"):
            other.submit(SPEC)
    with Client(URL, "kds_nothing", transport=InProcess(app)) as nobody, pytest.raises(TokenError, match="login"):
        list(nobody.runs())
