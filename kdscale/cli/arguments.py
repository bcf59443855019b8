"""Arguments that several commands share."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdscale.config.root import Config

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, a shipped config's name, or a run folder.")
]

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the config it was made from.")]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. prune.target_params=4B. Repeatable."),
]

AcceptOption = Annotated[
    bool,
    typer.Option("--accept-changes", help="The run folder belongs to another config: redo what the changes touch."),
]


def load(name: str, overrides: list[str] | None) -> Config:
    """The config of a path or a shipped name, with overrides. Raises ConfigError.

    The config.yaml of a run folder stands for the run where it is now, also when the folder was moved.
    """
    from kdscale.config.load import find_config, load_config

    path, overrides = find_config(name), list(overrides or [])
    if path.name == "config.yaml" and (path.parent / "events.jsonl").is_file():
        overrides = [f"run_dir={json.dumps(str(path.parent))}", *overrides]
    return load_config(path, overrides)


def run_folder(run: str) -> Path:
    """The run folder that is named, or whose config is. Raises ConfigError, with the runs that there are."""
    from kdscale.config.load import config_folder
    from kdscale.errors import ConfigError

    folder, hint = Path(run), None
    shipped = config_folder() / f"{run.removesuffix('.yaml')}.yaml"
    if folder.is_file() or (not folder.exists() and shipped.is_file()):
        folder, hint = Path(load(run, None).run_dir), f"kdscale run {shlex.quote(run)} starts it"
    if (folder / "config.yaml").exists():
        return folder
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    raise ConfigError(
        f"there is no run in {folder}", expected="the folder of a run",
        got=f"runs here: {', '.join(runs)}" if runs else "no runs in the folder runs/ here", hint=hint,
    )  # fmt: skip


def model_folder(run: Path, name: str) -> Path:
    """The folder of one model of a run; the teacher comes from where the run's config says.

    Raises ConfigError for a name the run has no model of, and for a model that is not made yet.
    """
    from kdscale.errors import ConfigError
    from kdscale.runs.folder import RunFolder
    from kdscale.runs.lineage import teacher_of_run
    from kdscale.runs.models import TEACHER
    from kdscale.weights import resolve_teacher

    config = load(str(run), None)
    folders = model_folders(run, config)
    if name not in folders:
        raise ConfigError(f"{run} has no model {name!r}", expected=f"one of {', '.join(folders)}")
    if name == TEACHER:
        return teacher_of_run(RunFolder(run), config, resolve_teacher(config.teacher))
    if not is_model_folder(folders[name]):
        hint = f"kdscale run {shlex.quote(str(run))} makes it"
        raise ConfigError(f"the {name} model of {run} is not there yet", expected=str(folders[name]), hint=hint)
    return folders[name]


def model_folders(run: Path, config: Config) -> dict[str, Path]:
    """Where each model of a run will be; the teacher's as it is in the config."""
    from kdscale.runs.folder import RunFolder
    from kdscale.runs.lineage import teacher_of_run
    from kdscale.runs.models import models_of_run

    own = RunFolder(run)
    return models_of_run(own, config, teacher_of_run(own, config, Path(config.teacher.path)))


def is_model_folder(path: Path) -> bool:
    """Whether this is a checkpoint's folder, not a run's."""
    return (path / "config.json").is_file() and not (path / "config.yaml").exists()
