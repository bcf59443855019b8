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
    TrainingError,
)

# Exit codes of user errors that say more than "a rank is gone"; the launcher does not try these again.
FINAL_CODES = frozenset(
    kind.exit_code for kind in (ConfigError, CheckpointError, DataError, RunFolderError, TrainingError, SelfCheckError)
)


def exit_code_of(stop: Interrupted) -> int:
    """75 (EX_TEMPFAIL) after SIGTERM: job systems take it for `start me again`; 128 + n after another signal."""
    from kdscale_launch import STOPPED_EXIT_CODE

    return STOPPED_EXIT_CODE if stop.signal_number == signal.SIGTERM else stop.exit_code


def leave(code: int) -> None:
    """Not sys.exit: with DeepSpeed and gloo loaded, one ordinary exit in ten aborts after all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
