"""Where each model of a run lies that its config names. This loads no torch: planning a cluster asks it too."""

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
    return model_folder(cfg, entry.path, entry.revision, f"distill.teachers ({entry.name}): path", config_only)


def student_folder(cfg: Config, config_only: bool = False) -> Path:
    """The folder of the ready student. Raises as teacher_folders does."""
    assert cfg.student is not None, "the config has one"
    return model_folder(cfg, cfg.student.path, cfg.student.revision, "student.path", config_only)


def model_folder(cfg: Config, path: str, revision: str | None, field: str, config_only: bool) -> Path:
    """The folder of a model that `field` of the config names, beside the run's teacher."""
    named = TeacherConfig(path=path, revision=revision, trust_remote_code=cfg.teacher.trust_remote_code)
    try:
        return resolve_teacher(named, config_only)
    except ConfigError as error:
        raise ConfigError(field, expected=error.expected, got=error.got, hint=error.hint) from error
