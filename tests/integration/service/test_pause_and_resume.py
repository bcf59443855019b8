"""A real run under the scheduler, the local engine and the watcher: paused in its training, resumed, and the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import parse_yaml
from kdscale.files import sha256_file
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.service.database.connection import open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.engines.engine import Engines
from kdscale.service.ids import new_run_id
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import FINAL
from kdscale.service.watching.watcher import Watcher

_SECONDS = 240.0
# Small steps, so many that a signal comes long before the last one, and nothing else that takes time.
_STEPS = 150
SMALL = [
    f"distill.tokens={64 * _STEPS}", "distill.seq_len=32", "distill.global_batch=2", "distill.checkpoint_every=1000",
    "distill.validate_every=1000", "eval.efficiency=false", "prune.compensate=none", "runtime.threads=1",
]  # fmt: skip


@pytest.fixture
def environment(kdscale_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in kdscale_environment.items():
        monkeypatch.setenv(name, value)
    yield


@pytest.mark.usefixtures("environment")
@pytest.mark.long
def test_a_run_that_is_paused_and_resumed_ends_with_the_same_bytes(
    tmp_path: Path, tiny_config: Path, kdscale: Callable[..., Any]
) -> None:
    unbroken = tmp_path / "unbroken"
    settings_ = [part for override in (*SMALL, f"run_dir={unbroken}") for part in ("--set", override)]
    assert kdscale("run", tiny_config, *settings_).code == 0

    settings = ServiceSettings(home=str(tmp_path / "home"), roots=(str(tmp_path),))
    database = open_database(settings)
    runs, watcher = Runs(database), Watcher(settings, database)
    scheduler = Scheduler(settings, database, Engines(settings), machine=Machine(1))
    run_id = new_run_id()
    config: Any = parse_yaml(tiny_config.read_text(), "tiny")
    run = runs.add(NewRun("tiny", "ada", config, settings.runs / run_id, overrides=SMALL, id=run_id))
    folder = RunFolder(run.folder)

    def step_until(holds: Callable[[Run], bool]) -> Run:
        deadline = time.monotonic() + _SECONDS
        while not holds(now := runs.get(run_id)):
            assert time.monotonic() < deadline and now.state != "failed", (now.state, now.reason)
            scheduler.step()
            watcher.step()
            time.sleep(0.02)
        return now

    try:
        step_until(lambda now: now.state == "running" and now.progress.get("step", 0) >= 2)
        runs.ask(run_id, "pause")
        paused = step_until(lambda now: now.state in {"paused", *FINAL})
        assert (paused.state, paused.reason, paused.exit_code) == ("paused", "", 75)
        assert not folder.in_use() and any(folder.checkpoints.iterdir())
        runs.ask(run_id, "resume")
        done = step_until(lambda now: now.state in FINAL)
    finally:
        if (handle := runs.get(run_id).handle) is not None:
            Engines(settings)["local"].cancel(handle, grace=0.0)
    watcher.step()
    assert (done.state, done.attempt) == ("succeeded", 2)
    assert runs.get(run_id).progress["share"] == 1.0
    for name in ("student/model.safetensors", "pruned/model.safetensors"):
        assert sha256_file(run.folder / name) == sha256_file(unbroken / name)
    steps = [row["step"] for row in read_metrics(folder.metrics) if row["kind"] == "train"]
    assert steps == list(range(1, _STEPS + 1))
    states = [event.data["state"] for event in Events(database).since(0, run_id) if event.type == "stage"]
    assert "interrupted" in states and states[-1] == "done"
    found = {other.folder.name: other.state for other in runs.page().items}
    assert found["unbroken"] == "succeeded"  # the run of the command line, under a root
    database.close()
