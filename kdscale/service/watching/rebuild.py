"""Makes a lost database anew from the run folders, service.json and the states beside the jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdscale.errors import KdscaleError
from kdscale.pipeline.progress import config_of
from kdscale.runs.folder import RunFolder
from kdscale.service.database.connection import Database
from kdscale.service.database.folders import read_run_folder
from kdscale.service.database.runs import NewRun, Runs
from kdscale.service.database.subscriptions import read_subscriptions, subscribe
from kdscale.service.ids import is_run_id
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import RunState
from kdscale.service.watching.state_files import read_state
from kdscale.service.watching.watcher import Watcher

_UNKNOWN = "found when the database was made anew; resume it to go on"


def rebuild(settings: ServiceSettings, database: Database) -> list[str]:
    """Add every run of the home folder and the roots that the database does not know; returns their ids.

    A run that was running is found by its engine: it is `starting` again, and its engine, asked for the same attempt,
    starts nothing twice. What cannot be known does not start by itself.
    """
    runs, added = Runs(database), list[str]()
    for folder in sorted(settings.runs.glob("*")):
        if not is_run_id(folder.name) or runs.find(folder.name) is not None:
            continue
        new = _new_run(settings, folder)
        if new is None:
            continue
        state = read_state(settings, folder.name) or {}
        with database.begin() as connection:
            runs.add_in(connection, new)
            subscribe(connection, new.id, read_subscriptions(settings, new.id))
        if state.get("devices"):
            runs.update(new.id, devices=state["devices"])
        added.append(new.id)
    Watcher(settings, database).step()
    return added


def _new_run(settings: ServiceSettings, folder: Path) -> NewRun | None:
    config = config_of(RunFolder(folder))
    try:
        new = read_run_folder(folder, config.resolved() if config is not None else {})
    except KdscaleError:
        return None
    if new is None or new.id != folder.name:
        return None
    return NewRun(**{**vars(new), **_state(settings, new.id)})


def _state(settings: ServiceSettings, run_id: str) -> dict[str, Any]:
    """In which state a run comes back."""
    kept = read_state(settings, run_id)
    attempts = [int(path.name) for path in (settings.jobs / run_id).glob("[0-9]*") if path.name.isdecimal()]
    last = max(attempts, default=0)
    if kept is None:
        return {"state": "paused" if last else "queued", "reason": _UNKNOWN if last else "", "attempt": last}
    state: RunState = kept["state"]
    # the handle is not known: for a run that is `starting`, its engine is asked for the same attempt. A folder of a
    # later attempt was made after the state was kept
    if state in ("running", "recovering") or last > kept["attempt"]:
        state = "starting"
    attempt = max(last, kept["attempt"])
    return {"state": state, "reason": kept["reason"], "attempt": attempt, "exit_code": kept["exit_code"]}
