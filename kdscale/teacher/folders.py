"""Where each teacher of a run lies. This loads no torch: planning a cluster asks it too."""

from __future__ import annotations

from pathlib import Path

from kdscale.config.distill.teachers import TeacherEntry
from kdscale.config.root import Config, TeacherConfig
from kdscale.errors import ConfigError
from kdscale.weights import resolve_teacher


def teacher_folders(cfg: Config, own: Path, config_only: bool = False) -> dict[str, Path]:
    """The folder of each teacher by its name: `own` is the run's; of the run's alone, under "".

    With `config_only` no more of a hub's model is fetched than its config.json. Raises ConfigError or ServiceError for
    one that cannot be had.
    """
    folders = {entry.name: _folder(cfg, entry, config_only) or own for entry in cfg.distill.teachers}
    return folders or {"": own}


def _folder(cfg: Config, entry: TeacherEntry, config_only: bool) -> Path | None:
    if entry.path is None:
        return None
    named = TeacherConfig(path=entry.path, revision=entry.revision, trust_remote_code=cfg.teacher.trust_remote_code)
    try:
        return resolve_teacher(named, config_only)
    except ConfigError as error:
        field = f"distill.teachers ({entry.name}): path"
        raise ConfigError(field, expected=error.expected, got=error.got, hint=error.hint) from error
