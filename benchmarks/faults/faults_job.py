"""One job under benchmarks/faults/faults.py: its launcher, its processes, what it has written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from kill_resume import digests
from safetensors.torch import load_file

from kdscale.jobs.launch import RANK_MODULE
from kdscale.pipeline import rank_main
from kdscale.runs.metrics_log import read_metrics
from kdscale_launch.hosts import agent

EVERY, STEPS = 10, 120  # steps between checkpoints; steps of a run
TRAINING_MODULE = rank_main.__name__  # of rank 0's training; the other ranks train in RANK_MODULE
DEAD_AFTER, GRACE = 10.0, 30.0
SSH = """#!/bin/sh
while [ "$1" = -o ] || [ "$1" = -T ]; do [ "$1" = -o ] && shift; shift; done
[ -e {work}/away-$1 ] && {{ echo "no route to $1" >&2; exit 255; }}
shift
exec sh -c "$*"
"""
PYTHON = """#!/bin/sh
case "$2" in
    {rank}|{training}) exec {python} {wrapper} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


class FaultyJob:
    """One run folder and the launcher that trains into it, started again whenever it has ended."""

    def __init__(self, work: Path, config: Path, run: Path, watchdog: float, options: tuple[str, ...] = ()):
        self.work, self.run, self.watchdog = work, run, watchdog
        self.log = work / f"{run.name}.log"
        self.log.write_text("")
        settings = (f"run_dir={run}", f"distill.tokens={STEPS * 256}", f"distill.checkpoint_every={EVERY}",
                    "distill.validate_every=60", f"distill.watchdog_seconds={watchdog}")  # fmt: skip
        self.command = [
            sys.executable, "-m", "kdscale.cli.main", "launch", str(config), "--hostfile", str(work / "hosts"),
            "--ssh-command", str(work / "ssh"), "--python", str(work / "python"), "--master-addr", "127.0.0.1",
            "--until", "distill", "--dead-after", str(DEAD_AFTER), "--grace", str(GRACE), "--skip-preflight",
            "--max-restarts", "1000", *options, *[part for item in settings for part in ("--set", item)],
        ]  # fmt: skip
        self.reached = self.resumed = 0
        self._read = 0
        self.start()

    def start(self) -> None:
        """Start the launcher."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def new_lines(self) -> str:
        """The lines that the launcher has logged since the last call."""
        with self.log.open("rb") as stream:
            stream.seek(self._read)
            data = stream.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        return data.decode(errors="replace")

    def step(self) -> int:
        """The newest step in the metrics log, read from the end of the file."""
        path = self.run / "logs" / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4000))
            steps = re.findall(rb'"step": (\d+)', stream.read())
            newest = int(steps[-1]) if steps else 0
            self.reached = max(self.reached, newest)
            return newest
        return 0

    def tree(self) -> list[psutil.Process]:
        """Every process below the launcher."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.process.pid).children(recursive=True))
        return []

    def agents(self) -> list[psutil.Process]:
        """The agents of the two hosts, in the order of the hosts."""
        agents = [process for process in self.tree() if agent.__name__ in command_line(process)]
        return sorted(agents, key=lambda process: process.pid)

    def ranks(self, training: bool = False) -> list[psutil.Process]:
        """Every process of a rank, or only those that distil."""
        ranks = [p for p in self.tree() if {RANK_MODULE, TRAINING_MODULE} & set(command_line(p))]
        return [p for p in ranks if not training or TRAINING_MODULE in command_line(p) or rank_of(p) == 1]

    def student(self) -> dict[str, str]:
        """SHA-256 of every file of the student, by name."""
        return digests(self.run / "student")

    def weights(self) -> dict[str, Any]:
        """The student's tensors by name."""
        return dict(load_file(self.run / "student" / "model.safetensors"))

    def curve(self) -> list[tuple[int, float]]:
        """Step and loss of every training row."""
        rows = read_metrics(self.run / "logs" / "metrics.jsonl")
        return [(int(row["step"]), row["loss"]) for row in rows if row["kind"] == "train"]


def equal_within_rounding(job: FaultyJob, unbroken: FaultyJob) -> bool:
    """Whether fp32 losses and weights agree within rounding: the same documents in the same order, summed otherwise."""
    losses, expected = dict(job.curve()), dict(unbroken.curve())
    weights = unbroken.weights()
    return (
        losses.keys() == expected.keys()
        and all(math.isclose(loss, expected[step], rel_tol=1e-4) for step, loss in losses.items())
        and all(tensor.allclose(weights[name], rtol=1e-3, atol=1e-4) for name, tensor in job.weights().items())
    )


def command_line(process: psutil.Process) -> list[str]:
    """Empty when the process has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def rank_of(process: psutil.Process) -> int:
    """RANK in the environment of the process; -1 without one."""
    try:
        return int(process.environ().get("RANK", -1))
    except psutil.Error:
        return -1


def signal_all(processes: list[psutil.Process], signum: int) -> None:
    """Send a signal to those that are still alive."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes below this one; empty when it has ended."""
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def stage_of(run: Path) -> str:
    """The stage that is running, from status.json."""
    try:
        stages = json.loads((run / "status.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return "start"
    running = [name for name, entry in stages.items() if entry["state"] == "running"]
    return running[-1] if running else "between stages"


def prepare(work: Path) -> None:
    """Write the stand-ins for ssh and the ranks' interpreter, the hosts, and where ranks read their faults."""
    wrapper = Path(__file__).with_name("faults_rank.py").absolute()
    for name, text in (("ssh", SSH), ("python", PYTHON)):
        (work / name).write_text(
            text.format(work=work, python=sys.executable, wrapper=wrapper, rank=RANK_MODULE, training=TRAINING_MODULE)
        )
        (work / name).chmod(0o755)
    (work / "hosts").write_text("one slots=1\ntwo slots=1\n")
    os.environ.update(KDSCALE_FAULT_PLAN=str(work / "plan.json"), KDSCALE_FAULT_PYTHON=str(work / "python"))


@contextlib.contextmanager
def with_condition(work: Path, condition: str, rng: random.Random) -> Iterator[Path]:
    """Set up a condition; yields the folder for its run."""
    plan, small = work / "plan.json", work / "small"
    ahead = {"skew": [rng.randrange(2), rng.choice([3, -3, 24 * 400]) * 3600]}
    faults = {"slow disk": {"slow": 0.2}, "clock skew": ahead}
    plan.write_text(json.dumps(faults.get(condition, {})))
    if condition == "small disk":
        small.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "kdscale-faults", str(small)], check=True)
    try:
        yield small if condition == "small disk" else work
    finally:
        if condition == "small disk":
            subprocess.run(["umount", "-l", str(small)], check=True)
