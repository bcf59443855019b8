"""What the database knows of a run, kept in its folder too, so that a lost database can be made anew."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from kdscale.config.load import build_config, dump_config, find_config, parse_yaml
from kdscale.errors import ConfigError
from kdscale.files import explain_os_errors, read_own_json, read_text, write_json, write_text
from kdscale.runs.folder import RunFolder
from kdscale.service.database.runs import NewRun, Run
from kdscale.service.ids import is_run_id

SERVICE_FILE = "service.json"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str, "name": str, "owner": str, "priority": int, "target": dict, "config_name": str, "overrides": list,
    "created": (int, float), "parent": (str, type(None)), "slots": int,
}  # fmt: skip


def write_run_folder(run: Run | NewRun) -> Path:
    """Make the run folder, with service.json and config.yaml, where they are missing; returns the path of the latter.

    Raises ConfigError for a config that cannot be used, and RunFolderError.
    """
    folder = RunFolder(run.folder)
    with explain_os_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / SERVICE_FILE).exists():
        write_json(run.folder / SERVICE_FILE, {name: getattr(run, name) for name in _TYPES})
    if not folder.config.exists():
        write_text(folder.config, _resolved(run))
    return folder.config


def _resolved(run: Run | NewRun) -> str:
    """The whole config of a run, whose run folder is its own."""
    tree, origin = copy.deepcopy(run.config), run.config_name or "config"
    if not tree:
        path = find_config(run.config_name)
        tree = parse_yaml(read_text(path, ConfigError), str(path))
    return dump_config(build_config(tree, origin, [*run.overrides, f"run_dir={json.dumps(str(run.folder))}"]))


def read_run_folder(folder: Path, config: dict[str, Any]) -> NewRun | None:
    """The run that the service began in this folder; None where there is no sound service.json."""
    spec = read_own_json(folder / SERVICE_FILE, _is_spec)
    if spec is None:
        return None
    return NewRun(**{name: spec[name] for name in _TYPES}, config=config, folder=folder)


def _is_spec(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(name in value and isinstance(value[name], kind) for name, kind in _TYPES.items())
        and is_run_id(value["id"])
        and all(isinstance(item, str) for item in value["overrides"])
    )
