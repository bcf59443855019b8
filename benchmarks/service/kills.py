"""Kill the service, its supervisors and its runs at random moments, and look at what became of every run.

    python benchmarks/service/kills.py --work /tmp/kills --runs 50 --kills 200 --out kills.json

Queues runs of a tiny model with a service (scheduler and watcher in a process of their own, no HTTP), sends SIGKILL to
one thing after another, starts a killed service again, and waits for the queue to be empty. Every run must succeed
once, with the bytes of a run that nobody disturbed; no attempt may begin twice, and no more attempts than slots may be
alive at any moment. Prints a table and leaves with 1 when anything is not so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "faults"))

from two_hosts import tiny_config

from kdscale.config.load import parse_yaml
from kdscale.files import read_json, read_own_json, sha256_file, write_json
from kdscale.runtime.locks import is_locked
from kdscale.service.database.connection import open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.engines import supervisor
from kdscale.service.engines.engine import Engines
from kdscale.service.engines.marks import MARK, end_marked, marked
from kdscale.service.ids import new_run_id
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, FINAL
from kdscale.service.watching.watcher import Watcher

SMALL = [
    "distill.tokens=2560", "distill.checkpoint_every=2", "distill.validate_every=1000", "distill.zero_stage=0",
    "eval.efficiency=false", "eval.tokens=256", "eval.seq_len=64", "eval.prompts=[hello]", "eval.sample_tokens=4",
    "prune.compensate=none",
]  # fmt: skip
_RESULT = "student/model.safetensors"


def main() -> int:
    """Queue, kill, wait, compare; returns the exit code."""
    arguments = parse()
    settings = ServiceSettings(
        home=str(arguments.work / "home"), slots=arguments.slots, tries=10_000, retry_seconds=0.0, poll_seconds=0.2
    )
    if arguments.serve:
        serve(settings)
        return 0
    arguments.work.mkdir(parents=True, exist_ok=True)
    config = tiny_config(arguments.work)
    began = time.time()
    expected = unbroken(config, arguments.work / "unbroken")
    alone = time.time() - began
    print(f"an undisturbed run takes {alone:.0f} s", flush=True)
    killer = Killer(arguments, settings)
    tree: Any = parse_yaml(config.read_text(), "tiny")
    for number in range(arguments.runs):
        run_id = new_run_id()
        folder = settings.runs / run_id
        killer.runs.add(NewRun(f"tiny {number}", f"owner {number % 3}", tree, folder, overrides=SMALL, id=run_id))
    began = time.time()
    try:
        killer.kill_and_wait()
    finally:
        killer.end()
    report = killer.report(expected) | {"seconds": time.time() - began, "seconds_alone": alone, "seed": arguments.seed}
    print(table(report))
    if arguments.out is not None:
        write_json(arguments.out, report)
    return 0 if not report["problems"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills, on average")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which what has not ended is stuck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def serve(settings: ServiceSettings) -> None:
    """The service, until it is killed."""
    database, stop = open_database(settings), threading.Event()
    scheduler = Scheduler(settings, database, Engines(settings), machine=Machine(settings.slots or 1))
    watcher = Watcher(settings, database)
    threading.Thread(target=watcher.run_forever, args=(stop, scheduler.leads), daemon=True).start()
    scheduler.run_forever(stop)


def unbroken(config: Path, folder: Path) -> str:
    """The digest of the student of a run that nobody disturbs."""
    overrides = [part for override in (*SMALL, f"run_dir={folder}") for part in ("--set", override)]
    with (folder.parent / "unbroken.log").open("wb") as log:
        command = [sys.executable, "-m", "kdscale.cli.main", "run", str(config), *overrides]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return sha256_file(folder / _RESULT)


class Killer:
    """A service, and ways to kill parts of it."""

    def __init__(self, arguments: argparse.Namespace, settings: ServiceSettings):
        self.arguments, self.settings = arguments, settings
        self.rng = random.Random(arguments.seed)
        self.database = open_database(settings)
        self.runs = Runs(self.database)
        self.kills: Counter[str] = Counter()
        self.in_state: Counter[str] = Counter()  # the states of the runs that were hit
        self.most_alive = 0
        self.service = self.start()
        self.ways: dict[str, tuple[float, Callable[[], bool]]] = {
            "service": (4.0, self.kill_service),
            "supervisor": (3.0, self.kill_supervisor),
            "run": (3.0, self.kill_run),
            "SIGTERM to a run": (1.0, self.stop_run),
            "everything at once": (1.0, self.kill_everything),
        }

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--serve", "--work", str(self.arguments.work)]
        with (self.arguments.work / "service.log").open("ab") as log:
            return subprocess.Popen([*command, "--slots", str(self.arguments.slots)], stdout=log, stderr=log)

    def kill_and_wait(self) -> None:
        """Kill until there were enough, and wait until every run has ended."""
        deadline, due = time.monotonic() + self.arguments.limit, time.monotonic()
        while time.monotonic() < deadline:
            counts = self.runs.counts()
            if sum(counts.get(state, 0) for state in FINAL) == self.arguments.runs:
                return
            self.most_alive = max(self.most_alive, len(self.alive()))
            if self.kills.total() < self.arguments.kills and time.monotonic() >= due:
                self.kill_something(counts)
                due = time.monotonic() + self.rng.uniform(0.0, 2.0 * self.arguments.every)
            if self.service.poll() is not None:
                self.service = self.start()
            time.sleep(0.05)

    def kill_something(self, counts: dict[str, int]) -> None:
        way = self.rng.choices(list(self.ways), [weight for weight, _ in self.ways.values()])[0]
        if self.ways[way][1]():
            self.kills[way] += 1
            ended = sum(counts.get(state, 0) for state in FINAL)
            print(f"{self.kills.total():4d} {way:20s} {ended:3d} runs have ended", flush=True)

    def alive(self) -> list[Path]:
        """The attempts that have a process now, by the marks that processes carry."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            start = f"{MARK}={self.settings.jobs}/".encode()
            found |= {os.fsdecode(item[len(MARK) + 1 :]) for item in environment if item.startswith(start)}
        return sorted(map(Path, found))

    def active(self) -> Run | None:
        """An active run, by chance."""
        found = self.runs.in_states(ACTIVE)
        return self.rng.choice(found) if found else None

    def kill_service(self) -> bool:
        self.service.kill()
        self.service.wait()
        return True

    def kill_supervisor(self) -> bool:
        if (run := self.active()) is None:
            return False
        work = self.settings.jobs / run.id / str(run.attempt)
        started = read_own_json(work / supervisor.STARTED, lambda value: isinstance(value, dict))
        return started is not None and is_locked(work / supervisor.LOCK) and self.signal(run, started["supervisor"])

    def kill_run(self, signum: int = signal.SIGKILL) -> bool:
        if (run := self.active()) is None:
            return False
        processes = marked(str(self.settings.jobs / run.id / str(run.attempt)))
        return bool(processes) and self.signal(run, self.rng.choice(processes), signum)

    def stop_run(self) -> bool:
        return self.kill_run(signal.SIGTERM)

    def kill_everything(self) -> bool:
        """What a power cut does to processes."""
        self.kill_service()
        for run in self.runs.in_states(ACTIVE):
            work = self.settings.jobs / run.id / str(run.attempt)
            started = read_own_json(work / supervisor.STARTED, lambda value: isinstance(value, dict))
            if started is not None and is_locked(work / supervisor.LOCK):
                self.signal(run, started["supervisor"])
        return True

    def signal(self, run: Run, pid: int, signum: int = signal.SIGKILL) -> bool:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:  # it ended just now
            return False
        self.in_state[run.state] += 1
        return True

    def end(self) -> None:
        """Leave nothing running."""
        self.kill_service()
        for work in self.alive():
            end_marked(str(work))

    def report(self, expected: str) -> dict[str, Any]:
        """What became of the runs, and everything that is not as it must be."""
        problems, ends, attempts = [], Counter[str](), 0
        if self.most_alive > self.arguments.slots:
            problems.append(f"{self.most_alive} attempts were alive at once")
        runs = [run for state in (*ACTIVE, *FINAL, "queued", "paused") for run in self.runs.in_states((state,))]
        if len(runs) != self.arguments.runs:
            problems.append(f"{len(runs)} runs are known of {self.arguments.runs}")
        for run in runs:
            ends[run.state] += 1
            attempts += run.attempt
            events = [event for event in Events(self.database).since(0, run.id, 1000) if event.type == "state"]
            ended = [event.data["state"] for event in events if event.data["state"] in FINAL]
            if ended != ["succeeded"]:
                problems.append(f"run {run.id} ended {ended}: {run.reason}")
            elif sha256_file(run.folder / _RESULT) != expected:
                problems.append(f"run {run.id} has another student")
            numbers = sorted(int(path.name) for path in (self.settings.jobs / run.id).glob("[0-9]*"))
            if numbers != list(range(1, run.attempt + 1)):
                problems.append(f"run {run.id} has the attempts {numbers}, and the database {run.attempt}")
            # two at once in one folder: the second leaves with this code
            exits = [read_json(path) for path in (self.settings.jobs / run.id).rglob(supervisor.EXIT)]
            if any(left["exit_code"] == 5 for left in exits):
                problems.append(f"run {run.id}: an attempt met another one in its folder")
        return {
            "runs": self.arguments.runs, "kills": dict(self.kills), "hit": dict(self.in_state), "ends": dict(ends),
            "attempts": attempts, "most_alive": self.most_alive, "slots": self.arguments.slots, "problems": problems,
        }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [("kills", sum(report["kills"].values()))]
    rows += [(f"  of: {name}", count) for name, count in report["kills"].items()]
    rows += [("runs", report["runs"]), *((f"  {state}", count) for state, count in report["ends"].items())]
    rows += [("attempts", report["attempts"]), ("most attempts alive at once", report["most_alive"])]
    rows += [("slots", report["slots"]), ("seconds", round(report["seconds"])), ("problems", len(report["problems"]))]
    return "\n".join([*(f"{name:32s}{value:>8}" for name, value in rows), *report["problems"]])


if __name__ == "__main__":
    raise SystemExit(main())
