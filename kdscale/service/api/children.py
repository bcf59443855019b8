"""Processes that do for the service what needs a run's own libraries: one JSON answer each, in limited time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from kdscale.config.fields import shown
from kdscale.errors import ERRORS_BY_CODE, KdscaleError
from kdscale.jobs.launch import python_path
from kdscale.service.problems import Problem
from kdscale_launch.environment import without_secrets


def child_environment() -> dict[str, str]:
    """The service's variables without secrets."""
    return {**without_secrets(os.environ), "PYTHONPATH": python_path()}


def ask_child(module: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """What `python -m module` answers. Raises the KdscaleError that it tells of, or a Problem."""
    command = ["nice", "-n", "10", sys.executable, "-m", module, *arguments]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=child_environment(), timeout=seconds,
            check=False, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Problem(503, "slow", f"this took more than {seconds:g} seconds") from None
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError as error:
        raise Problem(503, "check", "this could not be done", got=shown(ended.stderr[-500:])) from error
    if "error" in answer:
        raise ERRORS_BY_CODE.get(answer["exit_code"], KdscaleError)(**answer["error"])
    return answer
