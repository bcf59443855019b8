"""A model's measuring process, seen from the process that asks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kdscale.errors import ERRORS_BY_CODE, Interrupted, MachineError


@dataclass(frozen=True)
class Worker:
    """The process that measures one model."""

    path: Path
    process: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, do: str, **settings: int) -> dict[str, Any]:
        """Send a request and wait for the one line that it is answered with.

        Raises what the process raised, MachineError when it ran out of memory or was killed, RuntimeError with its
        trace when it failed as it never should.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **settings}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> BaseException:
        """What to raise for a process that has ended early: its own kind of error."""
        code, what = self.process.wait(), f"measuring {self.path} failed"
        self.errors.seek(0)
        said = self.errors.read().strip()[-2000:] or "no output"
        if -code in (signal.SIGINT, signal.SIGTERM):
            return Interrupted(-code, f"while {self.path} was measured")
        if code < 0:
            hint = "memory may have run out: lower eval.speed.context_lengths, or set eval.efficiency to false"
            return MachineError(what, got=f"its process was ended by {signal.Signals(-code).name}\n{said}", hint=hint)
        if code in ERRORS_BY_CODE:
            return ERRORS_BY_CODE[code](what, got=said)
        return RuntimeError(f"{what}\n{said}")


@contextmanager
def worker(path: Path, arguments: Sequence[str]) -> Iterator[Worker]:
    """Run Python with `arguments`, to measure the model in `path`, as long as the block lasts."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=_child_environment(),
        )  # fmt: skip
        try:
            yield Worker(path, process, errors)
        finally:
            process.kill()
            process.communicate()


def _child_environment() -> dict[str, str]:
    """The parent's environment and module path, so that the child finds kdscale where the parent found it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
