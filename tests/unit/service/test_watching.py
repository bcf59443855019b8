"""What the service sees in run folders, and a database that is made anew from them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config, dump_config
from kdscale.errors import RunFolderError
from kdscale.pipeline.stages.registry import stages_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.locks import try_lock
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.ids import new_run_id
from kdscale.service.settings import ServiceSettings
from kdscale.service.watching import watcher
from kdscale.service.watching.folder_progress import look
from kdscale.service.watching.rebuild import rebuild
from kdscale.service.watching.state_files import read_state
from kdscale.service.watching.watcher import Watcher

CONFIG = {
    "name": "some", "teacher": {"path": "somewhere"}, "prune": {"ffn": 64},
    "distill": {"tokens": 25_600, "global_batch": 4, "seq_len": 64},
}  # fmt: skip


class Home:
    """A service's home and its watcher, with a clock that is set by hand."""

    def __init__(self, folder: Path, **options: Any):
        self.time = 1000.0
        self.settings = ServiceSettings(home=str(folder), **options)
        self.open()

    def open(self) -> None:
        self.database: Database = open_database(self.settings)
        self.runs, self.events = Runs(self.database, self.clock), Events(self.database)
        self.watcher = Watcher(self.settings, self.database, self.clock)

    def clock(self) -> float:
        return self.time

    def add(self, number: int = 1, **fields: Any) -> Run:
        run_id = new_run_id(number)
        values = {"name": "some", "owner": "ada", "config": CONFIG, "folder": self.settings.runs / run_id}
        return self.runs.add(NewRun(**{**values, "id": run_id, **fields}))

    def look(self, run: Run) -> dict[str, Any]:
        self.watcher.step()
        return self.runs.get(run.id).progress

    def seen(self, run: Run, type_: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events.since(0, run.id) if event.type == type_]


@pytest.fixture
def home(tmp_path: Path) -> Any:
    made = Home(tmp_path / "home")
    yield made
    made.database.close()


def make_folder(path: Path, **config: Any) -> RunFolder:
    run = RunFolder(path)
    run.logs.mkdir(parents=True, exist_ok=True)
    run.config.write_text(dump_config(build_config({**CONFIG, **config, "run_dir": str(path)}, "test")))
    return run


def train(run: RunFolder, *steps: int, kind: str = "train", **more: float) -> None:
    with run.metrics.open("a") as stream:
        for step in steps:
            row = {"kind": kind, "step": step, "loss": 2.0 / step, "seconds": 3.0, "tokens_per_second": 85.5, **more}
            stream.write(json.dumps(row) + "\n")


def finish(run: RunFolder) -> None:
    for stage in stages_of(build_config({**CONFIG, "run_dir": "x"}, "test")):
        run.set_status(stage.name, "done", seconds=1.0)


def holding(run: RunFolder) -> Callable[[], None]:
    """Hold the run folder as a process does; returns what lets it go."""
    handle = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(handle)
    return lambda: os.close(handle)


def test_progress_and_events_of_a_run(home: Home) -> None:
    run = home.add(state="running", attempt=1)
    folder = make_folder(run.folder)
    folder.set_status("data", "running")
    progress = home.look(run)
    assert (progress["stage"], progress["share"]) == ("data", 0.0)
    assert {"name": "data", "state": "running"}.items() <= progress["stages"][0].items()
    folder.set_status("data", "done", seconds=2.5, facts={"tokens": 7})
    folder.set_status("distill", "running")
    train(folder, 1, kind="validation")
    train(folder, 1, 2, 25)
    progress = home.look(run)
    assert [progress[name] for name in ("stage", "step", "steps", "loss")] == ["distill", 25, 100, 0.08]
    assert progress["losses"] == [2.0, 1.0, 0.08] and progress["seconds_left"] == 75 * 3.0
    others = len(progress["stages"]) - 1
    assert progress["share"] == pytest.approx(0.5 * 0.25 + 0.5 / others, abs=1e-3)
    assert home.seen(run, "stage") == [
        {"stage": "data", "state": "running"},
        {"stage": "data", "state": "done", "seconds": 2.5, "facts": {"tokens": 7}},
        {"stage": "distill", "state": "running"},
    ]
    assert [event["step"] for event in home.seen(run, "validation")] == [1]


def test_nothing_is_seen_twice_also_by_a_service_that_starts_anew(home: Home) -> None:
    run = home.add(state="running", attempt=1)
    folder = make_folder(run.folder)
    folder.set_status("data", "running")
    with folder.events.open("a") as stream:
        stream.write('damaged\n{"time": "2026-01-01T00:00:00+00:00", "event": "do')  # a kill cut it short
    train(folder, 5, kind="validation")
    for _ in range(2):
        home.look(run)
        home.watcher = Watcher(home.settings, home.database, home.clock)
    with folder.events.open("a") as stream:
        stream.write('ne", "stage": "data"}\n')
    train(folder, 5, 10, kind="validation")  # a run that goes on from a checkpoint
    train(folder, 6, spike=1, spike_limit=0.1)
    home.look(run)
    train(folder, 6, 7, spike=1, spike_limit=0.1)
    home.look(run)
    assert [event["state"] for event in home.seen(run, "stage")] == ["running", "done"]
    assert [event["step"] for event in home.seen(run, "validation")] == [5, 10]
    assert [(event["step"], event["limit"]) for event in home.seen(run, "spike")] == [(6, 0.1), (7, 0.1)]


def test_a_run_is_looked_at_once_more_after_its_end(home: Home) -> None:
    run = home.add(state="running", attempt=1)
    folder = make_folder(run.folder)
    folder.set_status("data", "running")
    assert home.look(run)["stages"][0]["state"] == "running"
    home.runs.move(run.id, "failed")
    assert home.look(run)["stages"][0]["state"] == "stopped"


def test_steps_on_the_way_have_their_own_stages_and_training(home: Home) -> None:
    steps = [{"name": "half", "prune": {"ffn": 96}}]
    run = home.add(state="running", attempt=1)
    folder = make_folder(run.folder, steps=steps)
    inner = make_folder(run.folder / "steps" / "1-half")
    folder.set_status("data", "done", seconds=1.0)
    inner.set_status("distill", "running")
    train(inner, 1, 50)
    progress = home.look(run)
    assert (progress["stage"], progress["step"], progress["trained_in"]) == ("distill", 50, "1-half")
    assert {"stage": "distill", "state": "running", "step": "1-half"} in home.seen(run, "stage")


def test_runs_of_the_command_line_are_found_and_followed(tmp_path: Path) -> None:
    root = tmp_path / "team"
    home = Home(tmp_path / "team" / "home", roots=(str(root),))
    folder = make_folder(root / "runs" / "mine")
    let_go = holding(folder)
    folder.set_status("data", "running")
    make_folder(home.settings.runs / "not-theirs").set_status("data", "done")  # in the service's own home
    (root / "link").symlink_to(root / "runs", target_is_directory=True)

    def found() -> list[Run]:
        home.time += 100.0
        home.watcher.step()
        return [run for run in home.runs.page().items if run.origin == "command line"]

    (run,) = found()
    assert (run.name, run.state, run.folder, run.slots) == ("some", "running", folder.path, 0)
    assert run.progress["stage"] == "data"
    let_go()
    (run,) = found()
    assert (run.state, run.reason) == ("failed", "stopped in the stage data")
    let_go = holding(folder)
    assert found()[0].state == "running"  # it goes on, which no run of the service could from `failed`
    finish(folder)
    let_go()
    (run,) = found()
    assert run.state == "succeeded" and run.progress["share"] == 1.0
    shutil.rmtree(folder.path)
    assert found() == []
    home.database.close()


def test_a_state_that_could_not_be_written_is_written_later(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.add(state="running", attempt=1)
    home.watcher.step()

    def full(*_: object) -> None:
        raise RunFolderError("cannot write", got="No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "write_state", full)
        home.runs.move(run.id, "pausing")
        home.runs.move(run.id, "paused")
        home.watcher.step()
    home.watcher.step()
    kept = read_state(home.settings, run.id)
    assert kept is not None and kept["state"] == "paused", "or a database made anew would start it again"


def test_a_damaged_folder_stops_nothing(home: Home) -> None:
    broken, sound = home.add(1, state="running", attempt=1), home.add(2, state="running", attempt=1)
    broken.folder.mkdir(parents=True)
    (broken.folder / "config.yaml").write_text("{")
    (broken.folder / "status.json").write_text("[")
    os.mkfifo(broken.folder / "events.jsonl")  # whoever opens it waits for somebody who writes to it
    (broken.folder / "logs").mkdir()
    os.mkfifo(broken.folder / "logs" / "metrics.jsonl")
    make_folder(sound.folder).set_status("data", "running")
    assert home.look(sound)["stage"] == "data"
    assert home.runs.get(broken.id).progress["stage"] is None


def test_a_lost_database_comes_back_from_the_folders(home: Home) -> None:
    states = {
        "queued": "queued",
        "paused": "paused",
        "succeeded": "succeeded",
        "failed": "failed",
        "running": "starting",  # the engine is asked for the same attempt, and finds it
        "recovering": "starting",
        "pausing": "pausing",
    }
    runs = {}
    for number, state in enumerate(states, 1):
        run = home.add(number, state=state, attempt=int(state != "queued"), reason=f"because of {number}")
        runs[state] = home.runs.update(run.id, devices=["a"] if state == "running" else []) or run
        make_folder(run.folder).set_status("data", "done", seconds=1.0)
    home.watcher.step()
    assert read_state(home.settings, runs["running"].id)["devices"] == ["a"]  # type: ignore[index]
    before = {state: home.runs.get(run.id) for state, run in runs.items()}
    home.database.close()
    for path in home.settings.folder.glob("service.db*"):
        path.unlink()
    (home.settings.runs / "strange").mkdir()
    home.open()
    assert rebuild(home.settings, home.database) == [run.id for run in runs.values()]
    assert rebuild(home.settings, home.database) == []
    for state, run in before.items():
        again = home.runs.get(run.id)
        assert again.state == states[state]
        for name in ("name", "owner", "attempt", "reason", "devices", "slots", "folder", "created", "target"):
            assert getattr(again, name) == getattr(run, name), name
        assert again.progress["stage"] == "data" and home.seen(run, "stage")


def test_what_is_not_known_of_a_run_does_not_start_it(home: Home) -> None:
    runs = [home.add(number) for number in (1, 2, 3)]
    home.watcher.step()
    for run, attempts in zip(runs, (0, 2, 1), strict=True):
        if attempts:
            (home.settings.jobs / run.id / str(attempts)).mkdir(parents=True)
    for run in runs[:2]:
        (home.settings.jobs / run.id / "state.json").unlink()
    home.database.close()
    for path in home.settings.folder.glob("service.db*"):
        path.unlink()
    home.open()
    rebuild(home.settings, home.database)
    found = [home.runs.get(run.id) for run in runs]
    # the last one was started after its state was kept
    assert [(run.state, run.attempt) for run in found] == [("queued", 0), ("paused", 2), ("starting", 1)]


def test_an_ended_run_is_not_read_again_by_the_next_service(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, other = home.add(1, state="succeeded"), home.add(2, state="succeeded")
    for run in (ended, other):
        make_folder(run.folder).set_status("data", "done", seconds=1.0)
    home.watcher.step()
    make_folder(other.folder).set_status("data", "running")
    looked = list[Path]()
    monkeypatch.setattr(watcher, "look", lambda folder, *more: looked.append(folder) or look(folder, *more))
    home.open()
    home.watcher.step()
    assert looked == [other.folder], "only what has changed since the last look"


def test_a_service_that_stops_does_not_look_at_all_runs_first(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, looked = threading.Event(), list[Path]()
    for number in range(5):
        make_folder(home.add(number, state="succeeded").folder)

    def look_and_stop(folder: Path, *more: Any) -> Any:
        looked.append(folder)
        stop.set()
        return look(folder, *more)

    monkeypatch.setattr(watcher, "look", look_and_stop)
    home.watcher.run_forever(stop, lambda: True)
    assert len(looked) == 1
