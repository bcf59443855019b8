"""Drills: a cluster that preempts, breaks off answers and lags, and a service that is killed at any write.

Whatever the order, an attempt has one job, its end is the job's own, and what was asked to stop ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kdscale.errors import KdscaleError
from kdscale.service.engines import cluster
from kdscale.service.engines.engine import Job, JobState
from tests.unit.service.engines.benches import BENCHES, ClusterBench

CLUSTERS = [name for name, bench in BENCHES.items() if issubclass(bench, ClusterBench)]
_STEPS = 25


class Killed(BaseException):
    """The service, by SIGKILL."""


class Drill:
    """One attempt in a bad hour. `truth` is what really is with its job."""

    def __init__(self, bench: ClusterBench, seed: int, monkeypatch: pytest.MonkeyPatch):
        self.bench, self.chance = bench, random.Random(seed)
        self.job: Job = bench.job(run_id=f"drill-{seed}")
        self.handle = str(self.job.work)
        self.truth, self.code = "none", -1
        self.cancelled = self.submitted = self.calm = False
        self.seen: JobState | None = None
        write = cluster.write_json

        def write_or_die(path: Any, value: Any) -> None:
            if self.calm or self.chance.random() > 0.1:
                return write(path, value)
            if self.chance.random() < 0.5:
                write(path, value)
            raise Killed

        monkeypatch.setattr(cluster, "write_json", write_or_die)

    def call(self, ask: Callable[[], Any]) -> Any:
        """One call of a service that may be killed in it, to a system that may fail it before or after it did it."""
        if not self.calm and self.chance.random() < 0.2:
            program = self.chance.choice(["sbatch", "scancel", "sacct", self.bench.program])
            after = self.chance.random() < 0.5
            self.bench.fault(program, after=after, says="socket timed out" if after else "connection refused")
        try:
            return ask()
        except (Killed, KdscaleError):
            return None
        finally:
            self.bench.change(faults=[])

    def submit(self) -> None:
        self.submitted = self.call(lambda: self.bench.engine().submit(self.job)) == self.handle or self.submitted
        if self.truth == "none" and self.bench.count():
            self.truth = "waiting"

    def look(self) -> None:
        seen = self.call(lambda: self.bench.state(self.handle))
        if seen is None:
            return
        assert self.seen is None or self.seen.phase != "ended" or seen == self.seen  # an end is for good
        self.seen = seen
        self.follow_kills()
        if seen.phase == "lost":
            assert self.truth in ("none", "vanished")
        elif seen.phase == "ended":
            assert self.truth in ("ended", "killed", "vanished"), (seen, self.truth)
            if self.truth == "ended":
                assert seen.exit_code == self.code
            elif self.truth == "killed":
                assert self.cancelled
                assert seen.exit_code in (75, 137)
        else:
            assert self.truth != "ended" or seen.phase == "running"

    def follow_kills(self) -> None:
        """What the service ended is ended."""
        if self.truth not in ("waiting", "running"):
            return
        state = self.bench.read()
        gone = {
            "slurm": lambda: state["jobs"][-1]["queue"][0] == "CANCELLED",
            "kubernetes": lambda: not any(state["objects"].values()),
            "skypilot": lambda: state["managed"][-1]["status"] == "CANCELLED",
        }
        if gone[self.bench.engine_name]():
            self.truth = "killed"

    def finish_kill(self) -> None:
        """What takes its time to end does."""
        state = self.bench.read()
        if self.bench.engine_name == "kubernetes":
            state["pods"] = {}
            for objects in state["objects"].values():
                for name in [key for key, item in objects.items() if "deletionTimestamp" in item["metadata"]]:
                    del objects[name]
        for job in state["managed"]:
            job["status"] = "CANCELLED" if job["status"] == "CANCELLING" else job["status"]
        self.bench.write(state)

    def happen(self) -> None:
        """Something in the cluster."""
        self.follow_kills()
        events = {
            "waiting": ["begin", "begin", "kill"],
            "running": ["finish", "preempt", "preempt", "vanish", "kill"],
        }.get(self.truth, [])
        if not events:
            return
        event = self.chance.choice(events)
        if event == "vanish" and not self.submitted:
            return
        try:
            self.carry_out(event)
        except KeyError:  # the JobSet is gone
            self.truth = "killed"

    def carry_out(self, event: str) -> None:
        if event == "begin":
            self.bench.begin(self.job)
            self.truth = "running"
        elif event == "preempt":
            self.bench.preempt(self.job)
            self.truth = "waiting"
        elif event == "finish":
            self.code = 75 if self.cancelled and self.chance.random() < 0.7 else self.chance.choice([0, 2, 6, 8])
            self.bench.finish(self.job, self.code)
            self.truth = "ended"
        elif event == "vanish":
            self.bench.vanish(self.job)
            self.truth = "vanished"
        else:
            self.finish_kill()
            self.follow_kills()

    def cancel(self) -> None:
        if self.submitted:
            self.cancelled = True
            self.call(lambda: self.bench.engine().cancel(self.handle, grace=self.chance.choice([0.0, 60.0])))
            self.follow_kills()

    def run(self) -> None:
        acts = [self.submit, self.look, self.look, self.happen, self.happen]
        for step in range(_STEPS):
            self.chance.choice([*acts, *([self.cancel] if step > _STEPS // 2 else [])])()
            self.bench.clock += self.chance.choice([0.0, 1.0, 40.0])
            assert self.bench.count() <= 1
        self.calm = True
        self.submit()
        self.cancel()
        for _ in range(8):
            self.look()
            self.finish_kill()
            self.bench.clock += self.bench.engine().settings.patience / 2
        assert self.seen is not None
        assert self.seen.phase in ("ended", "lost")
        assert self.bench.count() <= 1


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 30))])
def test_a_bad_hour(make_bench, name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Drill(make_bench(name), seed, monkeypatch).run()
