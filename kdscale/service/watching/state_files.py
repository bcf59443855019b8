"""The state of each run beside its jobs: what a lost database is made anew from, with the run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdscale.files import read_own_json, write_json
from kdscale.service.database.runs import Run
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import STATES

_FIELDS = ("state", "reason", "attempt", "exit_code", "devices")


def state_file(settings: ServiceSettings, run_id: str) -> Path:
    """Where a run's state is kept."""
    return settings.jobs / run_id / "state.json"


def write_state(settings: ServiceSettings, run: Run) -> None:
    """Keep a run's state, if it is another one than the file says."""
    path, value = state_file(settings, run.id), {name: getattr(run, name) for name in _FIELDS}
    if read_state(settings, run.id) != value:
        write_json(path, value)


def read_state(settings: ServiceSettings, run_id: str) -> dict[str, Any] | None:
    """What is kept of a run's state, or None."""
    value = read_own_json(state_file(settings, run_id), _is_state)
    return value if isinstance(value, dict) else None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {*value} == {*_FIELDS}
        and value["state"] in STATES
        and isinstance(value["reason"], str)
        and type(value["attempt"]) is int
        and (value["exit_code"] is None or type(value["exit_code"]) is int)
        and isinstance(value["devices"], list)
        and all(isinstance(device, str) for device in value["devices"])
    )
