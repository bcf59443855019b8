"""Breaks a job under benchmarks/faults/faults.py, and measures what it loses. FAULTS is the table of all faults."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
from faults_job import EVERY, GRACE, STEPS, FaultyJob, descendants, signal_all, stage_of

from kdscale_launch.watchdog import SLOW_FACTOR

AWAY_SECONDS = 15.0
PATIENCE_SECONDS = 300.0  # the least time in which any fault must be noticed


class Stuck(Exception):  # noqa: N818 - says what happened
    """A fault was not noticed, or a job did not end in time."""


class Breaker:
    """Chooses moments, breaks the job, and measures what it loses. `note` writes one record."""

    def __init__(self, job: FaultyJob, condition: str, rng: random.Random, startup: float, note: Callable[..., None]):
        self.job, self.condition, self.rng, self.startup, self.note = job, condition, rng, startup, note
        self.pending: list[dict[str, Any]] = []  # injections whose loss is known when training goes on
        self.since = time.monotonic()  # of the last (re)start
        # a rank that stops while it saves has SLOW_FACTOR times as long
        self.patience = max(PATIENCE_SECONDS, SLOW_FACTOR * job.watchdog + 60.0)

    def moment(self, late: bool) -> bool:
        """Wait for a random moment; False when the job ended first."""
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
        """Whether both ranks distil."""
        return len(self.job.ranks(training=True)) == 2

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for the condition, reading the log; False when the launcher ended first. Raises Stuck."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.read()
            if self.job.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Stuck(f"nothing happened for {seconds:.0f} s")
            time.sleep(0.05)
        return True

    def read(self) -> str:
        """The new log lines; settles injections when one says that training goes on."""
        self.job.step()
        lines = self.job.new_lines()
        for step in re.findall(r"going on from step (\d+)|step (?=0/\d+: held-out)", lines):
            self.settle(int(step or 0))
        return lines

    def settle(self, step: int) -> None:
        """Training goes on from `step`: the steps lost are due to the injections since it last did."""
        happened = " ".join(record["fault"] for record in self.pending)
        damaged = "damaged" in happened
        limit = EVERY * (2 if damaged else 1) + (5 if "loss" in happened else 0)  # skipped ones count
        lost = self.job.reached - step
        for index, record in enumerate(self.pending):
            # the first one ended the training; the later ones hit a job that had not gone on yet
            caused_loss = "damaged" in record["fault"] if damaged else index == 0
            self.note(**record, lost=lost if caused_loss else 0, resumed=step, kept=lost <= limit)
        self.pending.clear()
        self.job.resumed = self.job.reached = step

    def inject(self, fault: str) -> None:
        """Break the job, and start it again when it ended."""
        job, began = self.job, time.monotonic()
        record = {"fault": fault, "condition": self.condition, "step": job.step(), "stage": stage_of(job.run)}
        outcome = FAULTS[fault].inject(self)
        seconds = time.monotonic() - began
        self.pending.append({**record, "noticed": round(seconds, 1), "outcome": outcome})
        if job.process.poll() is not None:
            job.start()
        self.since = time.monotonic()

    # --- waiting for the job to notice

    def wait_for_restart(self) -> str:
        """Wait until the launcher starts the job again, or ends with an error. Raises Stuck."""
        deadline = time.monotonic() + self.patience
        lines = ""
        while "starting again from the last checkpoint" not in lines:
            lines += self.read()
            if self.job.process.poll() is not None:
                lines += self.read()
                return f"ended with {self.job.process.returncode}"
            if time.monotonic() > deadline:
                raise Stuck("not noticed")
            time.sleep(0.05)
        return "restarted by itself"

    def wait_for_end(self, processes: list[psutil.Process]) -> None:
        """Wait until all have ended, so that nothing writes into the run folder. Raises Stuck."""
        _, alive = psutil.wait_procs(processes, timeout=self.patience)
        if alive:
            raise Stuck(f"{len(alive)} processes were left running")

    # --- the faults; each returns how the job took it

    def kill_rank(self) -> str:
        ranks = self.job.ranks()
        if not ranks:
            return self.kill_node()
        self.rng.choice(ranks).kill()
        return self.wait_for_restart()

    def kill_node(self) -> str:
        agents = self.job.agents()
        if not agents:
            return self.kill_launcher()
        agent = self.rng.choice(agents)
        signal_all([agent, *descendants(agent)], signal.SIGKILL)
        return self.wait_for_restart()

    def kill_launcher(self) -> str:
        tree = self.job.tree()
        self.job.process.kill()
        self.job.process.wait()
        self.wait_for_end(tree)
        return "all ended; same command again"

    def sigterm(self) -> str:
        tree = self.job.tree()
        self.job.process.terminate()
        try:
            code = self.job.process.wait(GRACE + 60)
        except subprocess.TimeoutExpired:
            raise Stuck("still there after SIGTERM") from None
        self.wait_for_end(tree)
        return f"ended with {code}; same command again"

    def sigterm_kill(self) -> str:
        self.job.process.terminate()
        time.sleep(self.rng.uniform(0.1, 2.0))
        return self.kill_launcher()

    def away(self) -> str:
        """A node dies and cannot be reached for a while."""
        mark = self.job.work / f"away-{self.rng.choice(['one', 'two'])}"
        index = 0 if mark.name.endswith("one") else 1
        agents = self.job.agents()
        if len(agents) < 2:
            return self.kill_launcher()
        mark.touch()
        try:
            signal_all([agents[index], *descendants(agents[index])], signal.SIGKILL)
            outcome = self.wait_for_restart()
            time.sleep(AWAY_SECONDS)
        finally:
            mark.unlink()
        return outcome

    def leave(self) -> str:
        """The second node dies and does not come back in this run."""
        (self.job.work / "away-two").touch()
        agents = self.job.agents()
        signal_all([agents[1], *descendants(agents[1])], signal.SIGKILL)
        return self.wait_for_restart()

    def freeze(self) -> str:
        """The second node is stopped, and continued when the job has gone on without it."""
        agents = self.job.agents()
        if len(agents) < 2:
            return self.kill_launcher()
        frozen = [agents[1], *descendants(agents[1])]
        signal_all(frozen, signal.SIGSTOP)
        try:
            return self.wait_for_restart()
        finally:
            signal_all(frozen, signal.SIGCONT)
            self.wait_for_end(frozen)

    def stop_rank(self) -> str:
        victims = self.job.ranks(training=True)
        victim = self.rng.choice(victims)
        victim.send_signal(signal.SIGSTOP)
        outcome = self.wait_for_restart()
        self.wait_for_end([victim])
        return outcome

    def damage(self) -> str:
        """A rank dies, and the newest checkpoint is damaged."""
        self.job.ranks(training=True)[0].kill()
        outcome = self.wait_for_restart()
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
        return outcome

    @contextlib.contextmanager
    def planned(self, **changes: int) -> Iterator[None]:
        """Change the plan that ranks read, within the block."""
        plan = self.job.work / "plan.json"
        before = plan.read_text()
        plan.write_text(json.dumps({**json.loads(before), **changes}))
        try:
            yield
        finally:
            plan.write_text(before)

    def nan_teacher(self) -> str:
        """NaN in one rank's teacher, whose weights on disk are good."""
        with self.planned(**{"nan teacher": self.rng.randrange(2)}):
            return self.wait_for_restart()

    def nan_loss(self) -> str:
        """One rank's loss stays NaN: the run must end, and go on from an earlier step when it is started again."""
        with self.planned(**{"nan loss": self.rng.randrange(2)}):
            try:
                code = self.job.process.wait(self.patience)
            except subprocess.TimeoutExpired:
                raise Stuck("NaN did not end the job") from None
        return f"ended with {code}; same command again"

    def fill(self) -> str:
        """Fill the disk to the last byte; free it when the job has noticed."""
        filler = self.job.run.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(b"\0" * 65536):
                pass
        try:
            outcome = self.wait_for_restart()
        finally:
            filler.unlink()
        return outcome


class Fault(NamedTuple):
    """One way to break a job: `weight` is how often it is chosen, relative to the others without a condition.

    A `late` fault needs a distillation that has begun.
    """

    inject: Callable[[Breaker], str]
    weight: int = 0
    late: bool = False


FAULTS = {
    "kill -9 of a rank": Fault(Breaker.kill_rank, 6),
    "kill -9 of a node": Fault(Breaker.kill_node, 3),
    "kill -9 of the launcher": Fault(Breaker.kill_launcher, 2),
    "SIGTERM": Fault(Breaker.sigterm, 2),
    "SIGTERM, then kill -9": Fault(Breaker.sigterm_kill, 2),
    "node away for a while": Fault(Breaker.away, 1),
    "node frozen": Fault(Breaker.freeze, 1),
    "rank stopped (hang)": Fault(Breaker.stop_rank, 2, late=True),
    "newest checkpoint damaged": Fault(Breaker.damage, 2, late=True),
    "NaN in one rank's teacher": Fault(Breaker.nan_teacher, 1, late=True),
    "NaN in one rank's loss": Fault(Breaker.nan_loss, 1, late=True),
    "disk full": Fault(Breaker.fill, late=True),
    "node gone for good": Fault(Breaker.leave, late=True),
}
