"""Runs of the service on clusters: the scheduler and an engine together, from the queue to the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kdscale.service.database.connection import Database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.engines.engine import Job
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings
from tests.unit.service.engines.benches import BENCHES, ClusterBench

CLUSTERS = [name for name, bench in BENCHES.items() if issubclass(bench, ClusterBench)]
Look = Callable[[], Run]


class Story:
    """One run, and a scheduler that is made anew for each step, as after a kill."""

    def __init__(self, bench: ClusterBench, settings: ServiceSettings, database: Database):
        self.bench, self.settings, self.database = bench, settings, database
        self.runs = Runs(database, bench.now)
        first = bench.job()
        config = {"name": "tiny", "teacher": {"path": "/none"}, "prune": {"target_params": "50%"}}
        self.id = self.runs.add(
            NewRun("tiny", "ada", config, first.folder, id=first.run_id, target={"engine": bench.engine_name})
        ).id

    def step(self, seconds: float = 60.0) -> Run:
        self.bench.clock += seconds
        engines = {self.bench.engine_name: self.bench.engine()}
        Scheduler(self.settings, self.database, engines, self.bench.now, Machine(1)).step()
        return self.runs.get(self.id)

    def job(self) -> Job:
        return self.bench.job(attempt=self.runs.get(self.id).attempt)


@pytest.fixture(params=CLUSTERS)
def story(request: pytest.FixtureRequest, make_bench, settings: ServiceSettings, database: Database) -> Story:
    return Story(make_bench(request.param), settings, database)


def test_a_run_is_preempted_paused_resumed_and_succeeds(story: Story) -> None:
    bench = story.bench
    assert story.step().state == "starting"
    bench.begin(story.job())
    assert story.step().state == "running"
    bench.preempt(story.job())
    preempted = story.step()
    assert preempted.state == "recovering"
    assert preempted.reason.startswith("preempted or restarted")
    bench.begin(story.job())
    assert story.step().state == "running"
    assert bench.count() == 1

    story.runs.ask(story.id, "pause")
    assert story.step().state == "pausing"
    assert bench.was_told(story.job())
    bench.finish(story.job(), 75)
    assert story.step().state == "paused"
    story.runs.ask(story.id, "resume")
    resumed = story.step()
    assert (resumed.state, resumed.attempt) == ("starting", 2)
    assert bench.count() == 2
    bench.begin(story.job())
    assert story.step().state == "running"
    bench.finish(story.job(), 0)
    assert (story.step().state, bench.count()) == ("succeeded", 2)


def test_a_system_that_is_down_costs_no_try(story: Story) -> None:
    bench = story.bench
    bench.fault(times=4, says="connection refused")
    for _ in range(4):
        down = story.step()
        assert down.state == "starting"
        assert "connection refused" in down.reason
    story.step()
    bench.begin(story.job())
    bench.fault(times=3, says="connection refused")
    for _ in range(3):
        assert story.step().state == "starting"
    running = story.step()
    assert (running.state, running.attempt, running.tries, bench.count()) == ("running", 1, 1, 1)


def test_a_lost_job_is_followed_by_another_attempt(story: Story) -> None:
    bench = story.bench
    story.step()
    bench.begin(story.job())
    assert story.step().state == "running"
    bench.vanish(story.job())
    story.step()
    lost = story.step(bench.engine().settings.patience)
    assert lost.state == "recovering"
    assert "does not know the job" in lost.reason
    again = story.step(3600.0)
    assert (again.state, again.attempt, bench.count()) == ("starting", 2, 2)


def test_a_final_error_is_not_tried_again(story: Story) -> None:
    bench = story.bench
    story.step()
    bench.begin(story.job())
    story.step()
    bench.finish(story.job(), 6)
    failed = story.step()
    assert (failed.state, failed.exit_code, bench.count()) == ("failed", 6, 1)
    assert "exit code 6" in failed.reason
    for _ in range(3):
        story.step(3600.0)
    assert bench.count() == 1


def test_a_run_that_is_cancelled_in_the_queue_of_its_cluster_never_begins(story: Story) -> None:
    assert story.step().state == "starting"
    story.runs.ask(story.id, "cancel")
    story.step()
    if story.bench.engine_name == "skypilot":
        story.bench.set(story.job(), "CANCELLED")
    assert story.step().state == "cancelled"
