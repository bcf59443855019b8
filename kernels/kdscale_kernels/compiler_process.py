"""A program that calls a compiler, or is one: it may print much, start others, and never end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence


def run_within(seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(exit code, what it printed) of a command. After `seconds` all that it started is killed.

    Raises TimeoutError then, OSError where it cannot be started.
    """
    with tempfile.TemporaryFile() as output:  # no pipe: what the command started may hold that open after its end
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise TimeoutError(f"did not end within {seconds:g} s") from error
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")
