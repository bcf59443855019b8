"""Exit codes, and how a process leaves."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from kdscale.errors import ERRORS_BY_CODE, Interrupted

# Exit codes after which a launcher does not start the job again: the same command would end the same way.
FINAL_CODES = frozenset(code for code, error in ERRORS_BY_CODE.items() if not error.worth_retrying)


def exit_code_of(stop: Interrupted) -> int:
    """75 (EX_TEMPFAIL) after SIGTERM with nothing lost: job systems take it for `start me again`; otherwise 128 + n."""
    from kdscale_launch import STOPPED_EXIT_CODE

    return STOPPED_EXIT_CODE if stop.kept and stop.signal_number == signal.SIGTERM else stop.exit_code


def leave(code: int) -> NoReturn:
    """End the process, without C++ destructors where a process group or DeepSpeed was used.

    With DeepSpeed and gloo loaded, one ordinary exit in ten aborts after all the work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    is_initialized = getattr(sys.modules.get("torch.distributed"), "is_initialized", lambda: False)
    if "deepspeed" in sys.modules or is_initialized():
        os._exit(code)
    sys.exit(code)
