"""A fork begins with what its parent has finished, and does the rest otherwise; the parent stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kdscale.config.load import load_config
from kdscale.pipeline import taking_over
from kdscale.pipeline.runner import run_until
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.service.app import make_app
from kdscale.service.database.connection import open_database
from kdscale.service.database.runs import NewRun
from kdscale.service.ids import new_run_id
from kdscale.service.settings import ServiceSettings

QUIET = Reporter(quiet=True)


def begun(folder: Path) -> list[str]:
    """The stages that a run has really begun."""
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["stage"] for row in rows if row["event"] == "running"]


def test_a_fork_goes_on_from_what_is_the_same(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServiceSettings(home=str(tmp_path / "home"))
    database = open_database(settings)
    app, parent = make_app(settings, database), settings.runs / new_run_id()
    config = load_config(tiny_config, [f"run_dir={parent}"])
    run_until(config, "plan", QUIET)
    before = digest_tree(parent)
    run = app.state.runs.add(NewRun(name="tiny", owner="ada", config=config.resolved(), folder=parent, id=parent.name))
    _, token = app.state.accounts.new_token("t", "root", ["admin"])
    client = TestClient(app, "http://localhost", headers={"authorization": f"Bearer {token}"})

    made = client.post(f"/v1/runs/{run.id}/fork", json={"set": ["prune.tolerance=0.04"], "name": "looser"})
    assert made.status_code == 201, made.text
    states = {stage["name"]: stage["state"] for stage in made.json()["stages"]}
    assert (states["data"], states["importance"], states["plan"]) == ("done", "done", "waiting")
    folder = settings.runs / made.json()["id"]
    assert run_until(load_config(folder / "config.yaml"), "plan", QUIET)
    assert begun(folder) == ["plan"]

    same, new = client.post(f"/v1/runs/{run.id}/rerun", json={}).json(), RunFolder(tmp_path / "linked")
    assert {stage["state"] for stage in same["stages"]} == {"waiting"}, "from the beginning"
    monkeypatch.setattr(taking_over, "_COPIED_BYTES", 0)
    new.path.mkdir()
    assert taking_over.take_over(RunFolder(parent), new, config) == ["data", "importance", "plan"]
    tokens = [path / "data/train/tokens.bin" for path in (parent, new.path)]
    assert tokens[0].samefile(tokens[1]), "large files are there once"
    assert digest_tree(parent) == before

    tokens[0].write_bytes(b"damage")
    assert taking_over.take_over(RunFolder(parent), RunFolder(tmp_path / "third"), config) == []
    database.close()
