"""`python -m kdscale_launch.parent_watch PARENT_PID COMMAND...`: run a command that must not outlive another process.

For systems whose kernel has no parent-death signal. It watches the parent, kills the command when the parent is gone,
passes signals on, and leaves with the command's exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from kdscale_launch.job import shell_exit_code

_POLL_SECONDS = 0.2


def main(arguments: Sequence[str]) -> int:
    """Run `arguments[1:]` until it ends or the process `arguments[0]` does; returns its exit code."""
    parent, command = int(arguments[0]), list(arguments[1:])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the request for stacks, until the command has a handler for it
    child = subprocess.Popen(command)

    def forward(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, forward)
    while child.poll() is None:
        if os.getppid() != parent:
            child.kill()
        time.sleep(_POLL_SECONDS)
    return shell_exit_code(child.returncode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
