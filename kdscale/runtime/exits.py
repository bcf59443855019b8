"""Exit codes, and how a process leaves."""

from __future__ import annotations

import os
import signal
import sys

from kdscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    RunFolderError,
    SelfCheckError,
    TeacherServiceError,
    TrainingError,
)

_FINAL = (ConfigError, CheckpointError, DataError, RunFolderError, TrainingError, SelfCheckError, TeacherServiceError)

# Exit codes of errors that another try would not mend: the launcher does not start these ranks again.
FINAL_CODES = frozenset(error.exit_code for error in _FINAL)


def exit_code_of(stop: Interrupted) -> int:
    """75 (EX_TEMPFAIL) after SIGTERM: job systems take it for `start me again`; 128 + n after another signal."""
    from kdscale_launch import STOPPED_EXIT_CODE

    return STOPPED_EXIT_CODE if stop.signal_number == signal.SIGTERM else stop.exit_code


def leave(code: int) -> None:
    """Not sys.exit: with DeepSpeed and gloo loaded, one ordinary exit in ten aborts after all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
