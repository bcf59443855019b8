"""The command line as a user has it: another process, its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment in which `python -m kdscale.cli.main` runs from this checkout, on one thread."""
    sources = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    return {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Commands:
    """Commands in forks of one process that has imported what most need (integration/command_server.py).

    That of `light` ones has imported the command line alone. `folder` is for what they print.
    """

    def __init__(self, folder: Path, light: bool = False):
        self._printed = {name: folder / name for name in ("out", "err")}
        self._start = [sys.executable, "-m", "tests.integration.command_server", *(["light"] if light else [])]
        self._server: subprocess.Popen[str] | None = None

    def call(self, *arguments: object, cwd: Path = ROOT, may_be_heavy: bool = True) -> Outcome:
        """Run one command in `cwd`; one that may not be heavy has failed when it has loaded torch or the like."""
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen(self._start, **pipes, text=True, env=environment(), cwd=ROOT)
        for path in self._printed.values():
            path.write_text("")
        job = {
            "arguments": list(map(str, arguments)), "folder": str(cwd), "may_be_heavy": may_be_heavy,
            **{key: str(path) for key, path in self._printed.items()},
        }  # fmt: skip
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Outcome(code, *(path.read_text("utf-8") for path in self._printed.values()))

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()  # ends its input
