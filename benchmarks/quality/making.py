"""Runs of `kdscale` for the bench: each stage a process, its time kept, stopped in good order when the time is up.

Beside each run folder lies a stamp, `NAME.json`: the settings and the commit that the run was begun with, and what its
stages took so far, over all tries.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired, run
from typing import Any

from kdscale.config.load import dump_config
from kdscale.config.root import Config
from kdscale.files import read_json, remove_tree, sha256_file, sha256_json, write_json, write_text
from kdscale.runs.folder import RunFolder

_ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "kdscale.cli.main")
_GRACE = 300  # seconds to write a checkpoint in


class TimeIsUpError(Exception):
    """The limit of this call is reached; what was begun goes on in the next."""


class StageFailedError(Exception):
    """`kdscale` ended with an error; the message says where its output is."""


class Clock:
    """Seconds since it was made: of the wall, and of the processor, of this process and those it has waited for."""

    def __init__(self) -> None:
        self._wall, self._processor = time.monotonic(), _processor_seconds()

    def taken(self) -> dict[str, float]:
        return {
            "wall": round(time.monotonic() - self._wall, 1),
            "processor": round(_processor_seconds() - self._processor, 1),
        }


class Making:
    """One run folder on its way; `until`: the moment (of time.monotonic) at which a stage is stopped."""

    def __init__(self, path: Path, until: float):
        self.run, self._until = RunFolder(path), until

    @property
    def stamp_file(self) -> Path:
        return self.run.path.with_name(f"{self.run.path.name}.json")

    @property
    def stamp(self) -> dict[str, Any]:
        """What was written beside the run; empty where there is none."""
        return read_json(self.stamp_file) if self.stamp_file.exists() and self.run.path.exists() else {}

    def begin(self, stamp: Mapping[str, Any], copy_of: RunFolder | None = None) -> None:
        """A new run in place of what is there: empty, or a copy of another."""
        self.remove()
        self.run.path.parent.mkdir(parents=True, exist_ok=True)
        if copy_of is None:
            self.run.path.mkdir()
        else:
            shutil.copytree(copy_of.path, self.run.path, symlinks=True)
        write_json(self.stamp_file, {**stamp, "seconds": {}})

    def remove(self) -> None:
        """The run and its stamp."""
        self.stamp_file.unlink(missing_ok=True)  # first: a run without a stamp is begun anew
        remove_tree(self.run.path)

    def bring_to(self, stage: str, config: Config) -> dict[str, dict[str, float]]:
        """Bring the run up to a stage; returns what each stage has taken. Raises TimeIsUpError, StageFailedError."""
        settings, log = (self.run.path.with_name(f"{self.run.path.name}.{ending}") for ending in ("yaml", "log"))
        write_text(settings, dump_config(config))
        command = [*COMMAND, stage, str(settings), "--accept-changes"]
        clock = Clock()
        with log.open("a", encoding="utf-8") as stream:
            process = Popen(command, stdout=stream, stderr=STDOUT)
            try:
                status = process.wait(max(self._until - time.monotonic(), 0.0))
            except TimeoutExpired:
                raise TimeIsUpError from None
            finally:
                _end(process)
                taken = self._add(stage, clock.taken())
        if status:
            raise StageFailedError(f"{self.run.path.name}: kdscale {stage} ended with {status}, see {log}")
        settings.unlink()
        log.unlink()
        return taken

    def _add(self, stage: str, now: Mapping[str, float]) -> dict[str, dict[str, float]]:
        stamp = self.stamp
        before = stamp["seconds"].get(stage, {"wall": 0.0, "processor": 0.0})
        stamp["seconds"][stage] = {name: round(before[name] + now[name], 1) for name in before}
        write_json(self.stamp_file, stamp)
        return stamp["seconds"]


def _end(process: Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except TimeoutExpired:
            process.kill()
            process.wait()


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def digest(folder: Path) -> str:
    """Of a model's weights."""
    return sha256_json({file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))})[:16]


@cache
def commit() -> str:
    """The code that runs, with `+` where files differ from the commit; `unknown` outside a repository."""

    def git(*words: str) -> str:
        done = run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if not done.returncode else ""

    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + "+" * bool(
        git("status", "--porcelain", "-uno", "--", "kdscale", "kernels")
    )
