"""Kill a run with SIGKILL at random moments, resume it each time, and compare its student with an unbroken run's.

    python benchmarks/faults/kill_resume.py demo --kills 10 --set distill.tokens=20k --work /tmp/kills

The moments are drawn uniformly from the unbroken run's wall time, so every stage is hit in proportion to its length.
Prints one line per kill (when, in which stage, at which training step) and leaves with 1 when any file of the student
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run, kill, resume, compare; returns the exit code."""
    arguments = parse()
    work = Path(arguments.work)
    unbroken, broken = work / "unbroken", work / "broken"
    started = time.monotonic()
    run_to_the_end(arguments, unbroken)
    unbroken_seconds = time.monotonic() - started
    print(f"unbroken run: {unbroken_seconds:.0f} s", flush=True)
    rng = random.Random(arguments.seed)
    kills = wrong = 0
    while kills < arguments.kills:
        seconds = rng.uniform(1.0, unbroken_seconds * 0.6)
        if kill_after(arguments, broken, seconds):
            kills += 1
            print(f"kill {kills:2d} after {seconds:6.1f} s in {where(broken)}", flush=True)
        else:
            # It ended before it could be killed: compare its student, and kill the next run from its beginning on.
            wrong += compare(unbroken, broken)
            shutil.rmtree(broken)
    run_to_the_end(arguments, broken)
    return min(1, wrong + compare(unbroken, broken))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", required=True, help="an empty folder for the two runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def command(arguments: argparse.Namespace, run: Path) -> list[str]:
    """The `kdscale run` command into `run`."""
    settings = [*arguments.set, f"run_dir={run}"]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "kdscale.cli.main", "run", arguments.config, *flags]


def run_to_the_end(arguments: argparse.Namespace, run: Path) -> None:
    """Run the config into `run`, without a kill."""
    done = subprocess.run(command(arguments, run), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run in {run} failed with exit code {done.returncode}:\n{done.stderr}")


def kill_after(arguments: argparse.Namespace, run: Path, seconds: float) -> bool:
    """Start the run and kill its whole process group after `seconds`; False when it finished before."""
    process = subprocess.Popen(
        command(arguments, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if code:
        raise SystemExit(f"the run in {run} failed with exit code {code} instead of resuming")
    return False


def where(run: Path) -> str:
    """The stage that the run is in and its rows of metrics, from its own files."""
    status = run / "status.json"
    stages = json.loads(status.read_text())["stages"] if status.exists() else {}
    running = [name for name, entry in stages.items() if entry["state"] == "running"]
    metrics = run / "logs" / "metrics.jsonl"
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    return f"stage {running[-1] if running else 'start'}, {steps} metric rows"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(unbroken: Path, broken: Path) -> int:
    """Print how many of the student's files differ; returns 1 when any does."""
    expected, actual = digests(unbroken / "student"), digests(broken / "student")
    differing = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    print(f"student: {len(expected)} files, {len(differing)} differ {differing or ''}", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
