"""Every file that the service's scheduler and watcher read, damaged in every way: one run's files stop no other run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kdscale.service.database.connection import open_database
from kdscale.service.database.runs import NewRun, Runs
from kdscale.service.engines import supervisor
from kdscale.service.engines.local import LocalEngine
from kdscale.service.ids import new_run_id
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings
from kdscale.service.watching.rebuild import rebuild
from kdscale.service.watching.watcher import Watcher
from tests.hostile.nasty import HostileCases, damages

CONFIG = {"name": "some", "teacher": {"path": "somewhere"}, "prune": {"ffn": 64}}
RUN_ID = new_run_id(1.0)
_ROW = {"kind": "train", "step": 3, "loss": 1.5}
OF_RUN = {
    "status.json": {"stages": {"data": {"state": "done", "seconds": 1.0}, "distill": {"state": "running"}}},
    "events.jsonl": {"time": "2026-01-01T00:00:00+00:00", "event": "running", "stage": "data"},
    "logs/metrics.jsonl": _ROW,
}
OF_ATTEMPT = {
    supervisor.REQUEST: {"command": ["true"], "folder": "/", "mark": "a mark"},
    supervisor.STARTED: {"supervisor": 1, "started": 1.0},
    supervisor.STOP: {"deadline": 1.0},
    supervisor.EXIT: {"exit_code": 8, "ended": 1.0},
    supervisor.OUTPUT: "error: something",
}
FILES = [
    *(f"runs/{RUN_ID}/{name}" for name in ("config.yaml", "service.json", ".lock", *OF_RUN)),
    f"jobs/{RUN_ID}/state.json",
    *(f"jobs/{RUN_ID}/1/{name}" for name in (supervisor.LOCK, *OF_ATTEMPT)),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a run whose attempt has ended, and its database."""
    home = tmp_path_factory.mktemp("pristine")
    settings = ServiceSettings(home=str(home))
    database = open_database(settings)
    folder, work = settings.runs / RUN_ID, settings.jobs / RUN_ID / "1"
    work.mkdir(parents=True)
    (folder / "logs").mkdir(parents=True)
    for place, files in ((folder, OF_RUN), (work, OF_ATTEMPT)):
        for name, value in files.items():
            (place / name).write_text(json.dumps(value) + "\n")
    (folder / ".lock").touch()
    (work / supervisor.LOCK).touch()
    Runs(database).add(NewRun("some", "ada", CONFIG, folder, state="running", attempt=1, id=RUN_ID, created=1.0))
    Runs(database).update(RUN_ID, handle=str(work))
    Watcher(settings, database).step()
    database.close()
    return home


def watch(settings: ServiceSettings) -> None:
    database = open_database(settings)
    Watcher(settings, database).step()
    database.close()


def schedule(settings: ServiceSettings) -> None:
    database, engine = open_database(settings), LocalEngine()
    Scheduler(settings, database, {"local": engine}, machine=Machine(0)).step()
    assert Runs(database).get(RUN_ID).state in ("running", "recovering", "succeeded", "failed")
    handle = str(settings.jobs / RUN_ID / "1")
    engine.logs(handle, 1000)
    engine.cancel(handle, grace=1.0)
    database.close()


def make_anew(settings: ServiceSettings) -> None:
    for path in settings.folder.glob("service.db*"):
        path.unlink()
    database = open_database(settings)
    rebuild(settings, database)
    database.close()


def actions(file: str) -> dict[str, tuple[Callable[[ServiceSettings], Any], str]]:
    """What reads the file, and whether it must go on whatever has become of it."""
    if file.startswith(f"jobs/{RUN_ID}/1/"):
        return {"schedule": (schedule, "")}
    return {"watch": (watch, "accept"), "make anew": (make_anew, "accept")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.split("/", 2)[2])
def test_every_file(
    hostile: HostileCases, pristine: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdscale.files.os.fsync", lambda handle: None)
    home, every = tmp_path / "home", list(damages())
    for name, damage in every[FILES.index(file) % 3 :: 3]:  # files are read alike, so each has a third
        for action, (call, must) in actions(file).items():
            shutil.copytree(pristine, home)
            config = home / "runs" / RUN_ID / "config.yaml"
            config.write_text(config.read_text().replace(str(pristine), str(home)))
            damage(home / file)
            settings = ServiceSettings(home=str(home))
            hostile.run(f"{file} {name}, {action}", partial(call, settings), must=must)
            shutil.rmtree(home)
