"""What the ranks of an attempt run on other machines: the command, checked for their number, and its variables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from kdscale.jobs.launch import LaunchRequest, launcher_errors, make_request, python_path, rank_defaults
from kdscale.service.engines.engine import Job
from kdscale.service.engines.targets import EngineSettings
from kdscale_launch.environment import check_variables, forwarded_variables, without_secrets

# What the program that submits a job needs; nothing else of the service's environment is passed on.
_SUBMITTERS = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "KRB5CCNAME", "SLURM_CONF")


def rank_request(job: Job, ranks: int) -> LaunchRequest:
    """The command of every rank. Raises ConfigError when so many ranks cannot share the config's batch."""
    request = make_request(job.config, (), ranks, accept_changes=False)
    if Path(request.config.run_dir).absolute() != job.folder.absolute():
        request = make_request(job.config, (f"run_dir={json.dumps(str(job.folder.absolute()))}",), ranks, False)
    return request


def rank_variables(settings: EngineSettings) -> dict[str, str]:
    """The variables of the ranks that may be written to a file: none that may hold a secret."""
    path = python_path()
    with launcher_errors():
        forwarded = forwarded_variables(os.environ, settings.export)
    return without_secrets({**rank_defaults(), **forwarded, **({"PYTHONPATH": path} if path else {})})


def submitter_variables(settings: EngineSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that hands its own on to the job (sbatch).

    It has the secrets that ranks may need (HF_TOKEN), which no file holds, and none of the service's own.
    """
    own = {name: environment[name] for name in _SUBMITTERS if name in environment}
    with launcher_errors():
        forwarded = forwarded_variables(environment, settings.export)
        check_variables(forwarded)
    return {**own, **forwarded}


def working_folder(settings: EngineSettings) -> str:
    """Where relative paths of a config count from."""
    return settings.cwd or str(Path.cwd())
