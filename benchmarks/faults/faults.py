"""Break a run over two hosts of this machine in every way, at random moments, and see what it loses.

    python benchmarks/faults/faults.py --work /tmp/faults --injections 200 --out faults.jsonl
    python benchmarks/faults/faults.py --summary faults.jsonl  # the table; works while it runs, too

A tiny model, two ranks over gloo, ZeRO-3; each rank under an agent of its own, reached through a stand-in for ssh that
stays on this machine. Runs follow one another, each from an empty folder and broken several times; every injection and
every finished run is one line of the output file. A run counts as right when its student has the bytes, and its metrics
the steps and losses, of the unbroken run. Faults: see FAULTS. Conditions hold for a whole run: a slow disk (each fsync
takes 0.2 s longer), a clock that is hours or a year off on one rank (as Python reads it), a small disk that is
filled to the last byte (needs root, for a tmpfs), a node that goes for good (its run must equal the unbroken
one's within rounding: one rank sums in another order than two).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults_table
import psutil
from faults_job import EVERY, GRACE, STEPS, Job, alike, below, conditioned, prepare, signal_all, stage_of
from two_hosts import tiny_config

from kdscale_launch.watchdog import SLOW_FACTOR

AWAY = 15.0
PATIENCE = 300.0  # seconds in which any fault must be noticed, and in which a job must end after SIGTERM; at least
# how often each comes in a round; `late` ones need a distillation that is under way
FAULTS = {
    "kill -9 of a rank": 6, "kill -9 of a node": 3, "kill -9 of the launcher": 2, "SIGTERM": 2,
    "SIGTERM, then kill -9": 2, "node away for a while": 1, "node frozen": 1, "rank stopped (hang)": 2,
    "newest checkpoint damaged": 2, "NaN in one rank's teacher": 1, "NaN in one rank's loss": 1,
}  # fmt: skip
LATE = {
    "rank stopped (hang)", "newest checkpoint damaged", "NaN in one rank's teacher", "NaN in one rank's loss",
    "disk full", "node gone for good",
}  # fmt: skip
CONDITIONS = {"": 6, "slow disk": 1, "clock skew": 1, "small disk": 1, "one node left": 1}
ONE_LEFT = ("--min-nodes", "1", "--node-timeout", "10")


class Stuck(Exception):  # noqa: N818 - says what happened
    """A fault that was not noticed, or a job that did not end in time."""


class Breaker:
    """Chooses moments, breaks the job, and watches what becomes of it. `note` takes one record."""

    def __init__(self, job: Job, condition: str, rng: random.Random, startup: float, note: Callable[..., None]):
        self.job, self.condition, self.rng, self.startup, self.note = job, condition, rng, startup, note
        self.pending: list[dict[str, Any]] = []  # injections whose loss shows when training goes on
        self.since = time.monotonic()  # of the last (re)start
        # a rank that stops while it saves has SLOW_FACTOR times as long
        self.patience = max(PATIENCE, SLOW_FACTOR * job.watchdog + 60.0)

    def moment(self, late: bool) -> bool:
        """Wait for a random moment; False when the job ended before it came."""
        if late or self.rng.random() < 0.5:
            first = EVERY * 2 + 1 if late else 1
            target = min(max(first, self.job.resumed + self.rng.randint(1, 2 * EVERY)), STEPS - 3)
            # the steps in the file count once training has gone on since the last injection
            here = self.until(lambda: not self.pending and self.job.step() >= target and self.training(), 900)
            time.sleep(self.rng.uniform(0.0, 0.3))
        else:
            at = self.since + self.rng.uniform(0.0, 1.2 * self.startup)
            here = self.until(lambda: time.monotonic() > at, 900)
        return here and self.job.process.poll() is None

    def training(self) -> bool:
        return len(self.job.ranks(training=True)) == 2

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true before the launcher ended. Reads along."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.read()
            if self.job.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Stuck("waited in vain for a moment")
            time.sleep(0.05)
        return True

    def read(self) -> str:
        self.job.step()
        said = self.job.said()
        for step in re.findall(r"going on from step (\d+)|step (?=0/\d+: held-out)", said):
            self.settle(int(step or 0))
        return said

    def settle(self, step: int) -> None:
        """Training goes on from `step`: what that lost belongs to the injections since it last did."""
        happened = " ".join(record["fault"] for record in self.pending)
        damaged = "damaged" in happened
        limit = EVERY * (2 if damaged else 1) + (5 if "loss" in happened else 0)  # skipped ones count
        lost = self.job.reached - step
        for index, record in enumerate(self.pending):
            # the first one ended the training; those after it hit a job that had not gone on yet
            own = "damaged" in record["fault"] if damaged else index == 0
            self.note(**record, lost=lost if own else 0, resumed=step, kept=lost <= limit)
        self.pending.clear()
        self.job.resumed = self.job.reached = step

    def inject(self, fault: str) -> None:
        job, began = self.job, time.monotonic()
        about = {"fault": fault, "condition": self.condition, "step": job.step(), "stage": stage_of(job.run)}
        notice = getattr(self, _METHOD[fault])()
        seconds = time.monotonic() - began
        self.pending.append({**about, "noticed": round(seconds, 1), "outcome": notice})
        if job.process.poll() is not None:
            job.start()
        self.since = time.monotonic()

    # --- what is noticed, and how

    def broke(self) -> str:
        """The launcher saw it and starts again, or ended with an error."""
        deadline = time.monotonic() + self.patience
        said = ""
        while "starting again from the last checkpoint" not in said:
            said += self.read()
            if self.job.process.poll() is not None:
                said += self.read()
                return f"ended with {self.job.process.returncode}"
            if time.monotonic() > deadline:
                raise Stuck("not noticed")
            time.sleep(0.05)
        return "restarted by itself"

    def gone(self, processes: list[psutil.Process]) -> None:
        """All of them have ended; nothing is left to write into the run folder."""
        _, alive = psutil.wait_procs(processes, timeout=self.patience)
        if alive:
            raise Stuck(f"{len(alive)} processes were left running")

    def kill_rank(self) -> str:
        ranks = self.job.ranks()
        if not ranks:
            return self.kill_node()
        self.rng.choice(ranks).kill()
        return self.broke()

    def kill_node(self) -> str:
        agents = self.job.agents()
        if not agents:
            return self.kill_launcher()
        agent = self.rng.choice(agents)
        signal_all([agent, *below(agent)], signal.SIGKILL)
        return self.broke()

    def kill_launcher(self) -> str:
        tree = self.job.tree()
        self.job.process.kill()
        self.job.process.wait()
        self.gone(tree)
        return "all ended; same command again"

    def sigterm(self) -> str:
        tree = self.job.tree()
        self.job.process.terminate()
        try:
            code = self.job.process.wait(GRACE + 60)
        except subprocess.TimeoutExpired:
            raise Stuck("still there after SIGTERM") from None
        self.gone(tree)
        return f"ended with {code}; same command again"

    def sigterm_kill(self) -> str:
        self.job.process.terminate()
        time.sleep(self.rng.uniform(0.1, 2.0))
        return self.kill_launcher()

    def away(self) -> str:
        """A node dies and cannot be reached until later."""
        mark = self.job.work / f"away-{self.rng.choice(['one', 'two'])}"
        index = 0 if mark.name.endswith("one") else 1
        agents = sorted(self.job.agents(), key=lambda agent: agent.pid)
        if len(agents) < 2:
            return self.kill_launcher()
        mark.touch()
        try:
            signal_all([agents[index], *below(agents[index])], signal.SIGKILL)
            said = self.broke()
            time.sleep(AWAY)
        finally:
            mark.unlink()
        return said

    def leave(self) -> str:
        """The second node dies and is not seen again in this run."""
        (self.job.work / "away-two").touch()
        agents = sorted(self.job.agents(), key=lambda agent: agent.pid)
        signal_all([agents[1], *below(agents[1])], signal.SIGKILL)
        return self.broke()

    def freeze(self) -> str:
        """The second node stands still and wakes up when the job has gone on without it."""
        agents = sorted(self.job.agents(), key=lambda agent: agent.pid)
        if len(agents) < 2:
            return self.kill_launcher()
        frozen = [agents[1], *below(agents[1])]
        signal_all(frozen, signal.SIGSTOP)
        try:
            return self.broke()
        finally:
            signal_all(frozen, signal.SIGCONT)
            self.gone(frozen)

    def stop_rank(self) -> str:
        victims = self.job.ranks(training=True)
        victim = self.rng.choice(victims)
        victim.send_signal(signal.SIGSTOP)
        said = self.broke()
        self.gone([victim])
        return said

    def damage(self) -> str:
        """A rank dies, and the newest checkpoint is not what was written."""
        self.job.ranks(training=True)[0].kill()
        said = self.broke()
        newest = max((self.job.run / "checkpoints").glob("step-*"))
        files = [path for path in newest.rglob("*") if path.is_file()]
        victim = self.rng.choice(files)
        how = self.rng.choice(["bit", "truncated", "missing"])
        if how == "missing":
            victim.unlink()
        elif how == "truncated":
            os.truncate(victim, self.rng.randrange(victim.stat().st_size))
        else:
            data = bytearray(victim.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            victim.write_bytes(data)
        return said

    @contextlib.contextmanager
    def planned(self, **changes: int) -> Iterator[None]:
        plan = self.job.work / "plan.json"
        before = plan.read_text()
        plan.write_text(json.dumps({**json.loads(before), **changes}))
        try:
            yield
        finally:
            plan.write_text(before)

    def nan_teacher(self) -> str:
        """One rank's teacher goes bad; the weights that it loads again are good."""
        with self.planned(**{"nan teacher": self.rng.randrange(2)}):
            return self.broke()

    def nan_loss(self) -> str:
        """One rank's loss is NaN step after step: the run must end, and go on from before when it is started again."""
        with self.planned(**{"nan loss": self.rng.randrange(2)}):
            try:
                code = self.job.process.wait(self.patience)
            except subprocess.TimeoutExpired:
                raise Stuck("NaN did not end the job") from None
        return f"ended with {code}; same command again"

    def fill(self) -> str:
        """Not a byte is left; freed when the job has noticed."""
        filler = self.job.run.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(b"\0" * 65536):
                pass
        try:
            said = self.broke()
        finally:
            filler.unlink()
        return said


_METHOD = {
    "kill -9 of a rank": "kill_rank", "kill -9 of a node": "kill_node", "kill -9 of the launcher": "kill_launcher",
    "SIGTERM": "sigterm", "SIGTERM, then kill -9": "sigterm_kill", "node away for a while": "away",
    "node frozen": "freeze", "rank stopped (hang)": "stop_rank", "newest checkpoint damaged": "damage",
    "NaN in one rank's teacher": "nan_teacher", "NaN in one rank's loss": "nan_loss", "disk full": "fill",
    "node gone for good": "leave",
}  # fmt: skip


def one_run(number: int, arguments: argparse.Namespace, config: Path, whole: Job, startup: float) -> int:
    """Break one run several times and compare its end; returns the number of injections."""
    work, rng = Path(arguments.work), random.Random(f"{arguments.seed}-{number}")
    condition = rng.choices(list(CONDITIONS), list(CONDITIONS.values()))[0]
    if arguments.condition is not None:
        condition = arguments.condition
    faults = dict.fromkeys(arguments.faults, 1) if arguments.faults else dict(FAULTS)
    if condition == "small disk":
        faults = {"disk full": 3, "kill -9 of a rank": 1}
    alone = condition == "one node left"
    if alone:
        faults = {"node gone for good": 1}
    done = 0

    def note(**record: Any) -> None:
        line = {"time": time.time(), "seed": arguments.seed, "run": number, **record}
        with Path(arguments.out).open("a") as out:
            out.write(json.dumps(line) + "\n")

    with conditioned(work, condition, rng) as folder:
        job = Job(
            work, config, folder / f"run-{arguments.seed}-{number}", arguments.watchdog, ONE_LEFT if alone else ()
        )
        breaker = Breaker(job, condition, rng, startup, note)
        try:
            for _ in range(1 if alone else rng.randint(6, 12)):
                fault = rng.choices(list(faults), list(faults.values()))[0]
                if not breaker.moment(fault in LATE):
                    break
                breaker.inject(fault)
                done += 1
            finish(breaker)
            same = alike(job, whole) if alone else job.student() == whole.student() and job.curve() == whole.curve()
            note(kind="run", condition=condition, injections=done, same=same)
        except Stuck as problem:
            for record in breaker.pending:
                note(**record, lost=None, kept=False)
            note(kind="run", condition=condition, injections=done, same=False, stuck=str(problem))
            same = False
        finally:
            tree = job.tree()
            job.process.kill()
            signal_all(tree, signal.SIGKILL)
            (work / "away-two").unlink(missing_ok=True)
        if same:
            shutil.rmtree(job.run)
            job.log.unlink()
    return done


def finish(breaker: Breaker) -> None:
    """To the end without further faults. A job that ended for want of disk or patience is started again."""
    for _ in range(3):
        breaker.until(lambda: False, 1800)
        breaker.read()
        if breaker.job.process.returncode == 0:
            if breaker.pending:  # went on without a checkpoint
                breaker.settle(0 if breaker.job.reached <= EVERY else breaker.job.reached)
            return
        breaker.job.start()
    raise Stuck(f"ended with {breaker.job.process.returncode} without a fault")


def main() -> int:
    arguments = parse()
    if arguments.summary:
        return faults_table.show(Path(arguments.summary))
    work = Path(arguments.work)
    work.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing is left running
    prepare(work)
    config = tiny_config(work)
    began = time.monotonic()
    whole = Job(work, config, work / "unbroken", arguments.watchdog)
    while whole.step() == 0 and whole.process.poll() is None:
        time.sleep(0.05)
    startup = time.monotonic() - began
    if code := whole.process.wait():
        raise SystemExit(f"the unbroken run left with {code}; see {whole.log}")
    print(f"unbroken run: {startup:.0f} s to the first step, {time.monotonic() - began:.0f} s in all", flush=True)
    injections = number = 0
    while injections < arguments.injections:
        injections += one_run(number, arguments, config, whole, startup)
        number += 1
        print(f"{injections} injections in {number} runs, {(time.monotonic() - began) / 60:.0f} min", flush=True)
    return faults_table.show(Path(arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="a folder that does not exist yet", default="faults")
    parser.add_argument("--out", default="faults.jsonl", help="one JSON object a line, appended")
    parser.add_argument("--injections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--watchdog", type=float, default=20.0, help="distill.watchdog_seconds; more where CPUs are shared"
    )
    parser.add_argument("--faults", nargs="*", choices=sorted(_METHOD), help="only these")
    parser.add_argument("--condition", choices=sorted(CONDITIONS), help="only this")
    parser.add_argument("--summary", metavar="FILE", help="print the table of an output file, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
