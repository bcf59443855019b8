"""The scheduler with a fake engine: what it does with each run, and that nothing is lost or started twice."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kdscale.config.load import load_config
from kdscale.errors import MachineError, RunFolderError, ServiceError
from kdscale.service.database.connection import open_database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import Run, Runs
from kdscale.service.engines.engine import EngineUnavailableError, JobState
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, FINAL, WrongTransitionError
from tests.unit.service.mortal_service import FakeEngine, Service


@pytest.fixture
def service(tmp_path: Path) -> Any:
    made = Service(tmp_path / "home")
    yield made
    made.database.close()


def test_a_run_is_started_in_its_folder_and_succeeds(service: Service) -> None:
    run = service.add(overrides=["seed=3"])
    service.step()
    started = service.get(run)
    assert (started.state, started.attempt, started.started) == ("running", 1, 1000.0)
    job = service.engine.given[f"{run.id}/1"]
    config = load_config(job.config)
    assert (config.seed, config.run_dir) == (3, str(run.folder)) and job.config == run.folder / "config.yaml"
    assert json.loads((run.folder / "service.json").read_text())["owner"] == "ada"
    assert job.work == service.settings.jobs / run.id / "1"
    service.end(run, 0)
    service.step()
    assert service.get(run).state == "succeeded" and service.get(run).exit_code == 0
    states = [event.data["state"] for event in Events(service.database).since(0, run.id)]
    assert states == ["queued", "starting", "running", "succeeded"]


def test_slots_are_never_exceeded_and_devices_not_shared(tmp_path: Path) -> None:
    service = Service(tmp_path / "home", Machine(3, ("a", "b", "c")))
    runs = [service.add(slots=slots) for slots in (1, 2, 1)]
    service.step()
    assert [service.get(run).state for run in runs] == ["running", "running", "queued"]
    assert [service.get(run).devices for run in runs] == [["a"], ["b", "c"], []]
    service.end(runs[1], 0)
    service.step()
    assert service.get(runs[2]).devices == ["b"] and service.engine.given[f"{runs[2].id}/1"].devices == ("b",)


def test_runs_of_another_engine_need_no_slot_of_this_machine(tmp_path: Path) -> None:
    service = Service(tmp_path / "home", Machine(1))
    far = FakeEngine("slurm")
    service.scheduler = service.start({"local": service.engine, "slurm": far})
    local = [service.add() for _ in range(2)]
    elsewhere = service.add(target={"engine": "slurm"}, slots=16)
    unknown = service.add(target={"engine": "cloud"})
    service.step()
    assert [service.get(run).state for run in (*local, elsewhere)] == ["running", "queued", "running"]
    assert service.get(unknown).state == "failed" and "target.engine" in service.get(unknown).reason


def test_what_can_never_fit_is_in_nobodys_way(tmp_path: Path) -> None:
    service = Service(tmp_path / "home", Machine(2), engines={"slurm": {"slots": None}})
    far = FakeEngine("slurm")
    service.scheduler = service.start({"local": service.engine, "slurm": far})
    large, small = service.add(slots=3, priority=9), service.add()  # the machine had more slots once
    elsewhere = service.add(target={"engine": "slurm"}, slots=16)
    service.step()
    assert [service.get(run).state for run in (large, small, elsewhere)] == ["queued", "running", "running"]


def test_two_homes_share_a_database_and_no_run(tmp_path: Path) -> None:
    first, second = Service(tmp_path / "a"), Service(tmp_path / "b")
    second.runs = Runs(first.database, second.clock)
    second.scheduler = Scheduler(second.settings, first.database, {"local": second.engine}, second.clock, Machine(1))
    queued, begun = first.add(), first.add()
    first.step("submit after")  # its handle is not written down
    second.step()
    assert not second.engine.starts and {first.get(run).state for run in (queued, begun)} == {"queued", "starting"}
    own = second.add()
    second.step()
    assert second.get(own).state == "running" and len(second.engine.starts) == 1
    first.step()
    assert {first.get(run).state for run in (queued, begun)} == {"running"} and len(first.engine.starts) == 2


def test_a_full_disk_does_not_end_what_waits(service: Service) -> None:
    run, service.engine.refuses = service.add(), RunFolderError("cannot write", got="No space left on device")
    service.step()
    assert service.get(run).state == "recovering" and "No space left" in service.get(run).reason
    service.engine.refuses = None
    service.time += 60.0
    service.step()
    assert service.get(run).state == "running"


def test_a_pause_is_told_once_and_goes_on_later(service: Service) -> None:
    run = service.add()
    service.step()
    service.runs.ask(run.id, "pause")
    for _ in range(3):
        service.step()
    assert service.engine.told == {f"{run.id}/1": 1} and service.get(run).state == "pausing"
    service.end(run, 75)
    service.step()
    assert service.get(run).state == "paused" and service.get(run).reason == ""
    service.runs.ask(run.id, "resume")
    service.step()
    assert service.get(run).state == "running" and service.engine.alive == [f"{run.id}/2"]


def test_a_pause_before_the_start_is_recorded_reaches_the_job(service: Service) -> None:
    run = service.add()
    service.step("submit after")
    assert service.get(run).state == "starting" and service.get(run).handle is None
    service.runs.ask(run.id, "cancel")
    service.step()
    assert service.engine.told == {f"{run.id}/1": 1} and service.engine.starts[f"{run.id}/1"] == 1
    service.end(run, 75)
    service.step()
    assert service.get(run).state == "cancelled"


def test_a_run_that_is_resumed_has_all_its_tries_again(service: Service) -> None:
    run = service.add()
    for _ in range(3):
        service.step()
        service.end(run, 8)
        service.step()
        service.time += 1000.0
    assert service.get(run).state == "failed" and "after 3 tries" in service.get(run).reason
    service.runs.ask(run.id, "resume")
    service.step()
    service.end(run, 8)
    service.step()
    assert service.get(run).state == "recovering"


def test_a_kill_in_the_start_of_a_second_attempt_leaves_it_in_hand(service: Service) -> None:
    run = service.add()
    service.step()
    service.end(run, 8)
    service.step()
    service.time += 30.0
    service.step("submit after")
    service.runs.ask(run.id, "pause")
    service.step()
    assert service.get(run).state == "pausing" and service.engine.told == {f"{run.id}/2": 1}


def test_what_may_work_again_is_tried_again_after_a_while(service: Service) -> None:
    run = service.add()
    service.step()
    for attempt, wait in ((1, 30.0), (2, 60.0)):
        service.end(run, None if attempt == 1 else 8)
        service.step()
        assert service.get(run).state == "recovering"
        service.time += wait - 1
        service.step()
        assert service.get(run).state == "recovering"
        service.time += 1
        service.step()
        assert (service.get(run).state, service.get(run).attempt) == ("running", attempt + 1)
    service.end(run, 8)
    service.step()
    assert service.get(run).state == "failed" and "after 3 tries" in service.get(run).reason


def test_an_engine_may_start_a_run_again_by_itself(service: Service) -> None:
    run = service.add()
    service.step()
    seen = []
    for job in (JobState("waiting", reason="requeued"), JobState("running"), JobState("waiting"), JobState("lost")):
        service.engine.jobs[f"{run.id}/1"] = job
        service.step()
        seen.append((service.get(run).state, service.get(run).due))
    assert seen == [("recovering", None), ("running", None), ("recovering", None), ("recovering", 1030.0)]
    service.time += 30.0
    service.step()
    assert service.engine.alive == [f"{run.id}/2"]


def test_a_run_that_waits_for_its_next_try_can_be_paused(service: Service) -> None:
    run = service.add()
    service.step()
    service.end(run, 8)
    service.step()
    service.runs.ask(run.id, "pause")
    service.step()
    assert service.get(run).state == "paused" and service.engine.told == {}


def test_an_attempt_that_cannot_be_submitted_counts_as_one(service: Service) -> None:
    run = service.add()
    service.engine.refuses = MachineError("no process can be started")
    service.step()
    assert service.get(run).state == "recovering" and "no process" in service.get(run).reason
    wrong = service.add(config={"name": "some", "teacher": {}, "prune": {}})
    service.engine.refuses = None
    service.step()
    assert service.get(wrong).state == "failed" and "teacher.path" in service.get(wrong).reason


def test_an_attempt_that_a_system_does_not_take_now_is_submitted_again(service: Service) -> None:
    """It may have been taken, so it stays the same attempt and counts no try."""
    run = service.add()
    service.engine.refuses = EngineUnavailableError("the controller does not answer")
    for _ in range(5):
        service.step()
        assert service.get(run).state == "starting" and "does not answer" in service.get(run).reason
    service.engine.refuses = None
    service.step()
    assert service.get(run).state == "running"
    assert (service.get(run).attempt, service.get(run).tries) == (1, 1)


def test_an_engine_that_does_not_answer_says_nothing_about_its_runs(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [service.add(), service.add()]
    service.step()
    answers = service.engine.state

    def state(handle: str) -> JobState:
        if handle.startswith(runs[0].id):
            raise ServiceError("no answer")
        return answers(handle)

    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "state", state)
        service.end(runs[1], 0)
        service.step()
    assert [service.get(run).state for run in runs] == ["running", "succeeded"]
    assert "no answer" in service.get(runs[0]).reason
    service.step()
    assert service.get(runs[0]).reason == ""


def test_a_run_without_progress_is_said_to_hang_until_it_moves(service: Service) -> None:
    run = service.add()
    service.step()
    service.time += service.settings.hung_after + 1
    for _ in range(2):
        service.step()
    assert service.get(run).reason == "no progress since 1970-01-01 00:16 UTC" and service.get(run).state == "running"
    assert [event.type for event in Events(service.database).since(0, run.id)].count("hung") == 1
    service.runs.set_progress(run.id, {"moved": service.time})
    service.step()
    assert service.get(run).reason == ""


def test_two_services_of_one_home_have_one_scheduler(service: Service) -> None:
    other = service.start()
    assert service.scheduler.leads() and not other.leads()
    stop = threading.Event()
    stop.set()
    service.scheduler.run_forever(stop)  # lets go of the lead at its end
    assert other.leads()


def test_an_error_in_one_step_does_not_end_the_scheduler(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, steps = threading.Event(), []

    def step() -> None:
        steps.append(1)
        if len(steps) == 1:
            raise RuntimeError("the disk is full")
        stop.set()

    monkeypatch.setattr(service.scheduler, "step", step)
    monkeypatch.setattr(stop, "wait", lambda seconds: None)
    service.scheduler.run_forever(stop)
    assert len(steps) == 2


class AnyOrder(RuleBasedStateMachine):
    """Requests, ends of jobs and kills of the service in any order."""

    home: Callable[[], Path]
    template: Path

    def __init__(self) -> None:
        super().__init__()
        home = type(self).home()
        shutil.copytree(self.template, home)  # tables are not made anew for every case
        self.service = Service(home, Machine(3, ("a", "b", "c")), max_running=3, default_quota=2)
        self.known: list[Run] = []

    def teardown(self) -> None:
        self.everything_ends()
        self.service.database.close()

    @precondition(lambda self: len(self.known) < 6)
    @rule(owner=st.sampled_from(["ada", "bob"]), slots=st.integers(1, 2), priority=st.integers(0, 1))
    def submit(self, owner: str, slots: int, priority: int) -> None:
        self.known.append(self.service.add(owner=owner, slots=slots, priority=priority))

    @rule(dies=st.none() | st.integers(1, 20), seconds=st.sampled_from([1.0, 100.0]))
    def step(self, dies: int | None, seconds: float) -> None:
        self.service.time += seconds
        self.service.step(dies)

    @precondition(lambda self: self.service.engine.alive)
    @rule(data=st.data(), code=st.sampled_from([0, 2, 8, 75, 137, None]))
    def job_ends(self, data: st.DataObject, code: int | None) -> None:
        handle = data.draw(st.sampled_from(self.service.engine.alive))
        state = JobState("lost") if code is None else JobState("ended", code)
        self.service.engine.jobs[handle] = state

    @precondition(lambda self: self.known)
    @rule(data=st.data(), request=st.sampled_from(["pause", "resume", "cancel"]))
    def ask(self, data: st.DataObject, request: Any) -> None:
        run = data.draw(st.sampled_from(self.known))
        with suppress(WrongTransitionError):
            self.service.runs.ask(run.id, request)

    @invariant()
    def no_attempt_is_started_twice(self) -> None:
        assert all(count == 1 for count in self.service.engine.starts.values())
        runs = [handle.split("/")[0] for handle in self.service.engine.alive]
        assert len({*runs}) == len(runs)  # nor two attempts of one run at once

    @invariant()
    def limits_hold(self) -> None:
        alive = [self.service.engine.given[handle] for handle in self.service.engine.alive]
        devices = [device for job in alive for device in job.devices]
        assert len({*devices}) == len(devices) <= 3
        held: Counter[str] = Counter()
        for run in self.service.runs.in_states(ACTIVE):
            held[run.owner] += run.slots
        assert sum(held.values()) <= 3 and all(count <= 2 for count in held.values())

    @invariant()
    def no_job_runs_without_its_run(self) -> None:
        for handle in self.service.engine.alive:
            run_id, attempt = handle.split("/")
            run = self.service.runs.get(run_id)
            assert run.state in ACTIVE and run.attempt == int(attempt)

    def everything_ends(self) -> None:
        """After the last rule: with jobs that end well, every run comes to an end of its own."""
        for run in self.known:
            if self.service.get(run).state == "paused":
                self.service.runs.ask(run.id, "resume")
        for _ in range(8 * len(self.known) + 8):
            self.service.time += 100.0
            self.service.step()
            for handle in self.service.engine.alive:
                self.service.engine.jobs[handle] = JobState("ended", 0)
        left = {run.id: self.service.get(run).state for run in self.known if self.service.get(run).state not in FINAL}
        assert {*left.values()} <= {"paused"}, left


def test_in_any_order_no_run_is_lost_and_none_is_started_twice(tmp_path: Path) -> None:
    homes = itertools.count()
    open_database(ServiceSettings(home=str(tmp_path / "empty"))).close()

    class Here(AnyOrder):
        home = staticmethod(lambda: tmp_path / str(next(homes)))
        template = tmp_path / "empty"

    run_state_machine_as_test(Here, settings=hypothesis_settings(max_examples=20, stateful_step_count=25))
