"""What holds for every row of ENGINES, with stand-ins for the systems."""

from __future__ import annotations

import dataclasses

import pytest

from kdscale.errors import KdscaleError, MachineError, MissingProgramError
from kdscale.service.engines import programs
from kdscale.service.engines.engine import ENGINES, EngineUnavailableError, JobState
from kdscale.service.engines.programs import EngineSilentError
from kdscale_launch.systems import notes
from tests.unit.service.engines.benches import BENCHES, Bench, ClusterBench

CLUSTERS = [name for name, bench in BENCHES.items() if issubclass(bench, ClusterBench)]
HOSTILE = [
    "$(touch pwned)", "`touch pwned`", '"; touch pwned; "', "'; touch pwned; '", "a\nb: c\n#SBATCH --wrap=x", "%j %x",
    "\x1b[2J", "\u202eevil", "- !!python/object", "{{x}}", "${HOME}", "--nodes=9", "a|b|c", "#x", "'", "ü😀",
    "x" * 5000,
]  # fmt: skip


@pytest.fixture(params=list(ENGINES))
def bench(request: pytest.FixtureRequest, make_bench) -> Bench:
    return make_bench(request.param)


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest, make_bench) -> ClusterBench:
    return make_bench(request.param)


def test_every_row_has_a_bench() -> None:
    assert set(BENCHES) == set(ENGINES)


def test_submitting_twice_starts_one_job(bench: Bench) -> None:
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    assert bench.engine().submit(job) == handle
    assert bench.count() == 1
    assert bench.state(handle).phase == "running"


def test_an_attempt_from_beginning_to_end(bench: Bench) -> None:
    job = bench.job(name="a run", owner="somebody")
    handle = bench.engine().submit(job)
    bench.begin(job)
    assert bench.state(handle).phase == "running"
    bench.finish(job, 6)
    assert bench.state(handle).exit_code == 6
    bench.engine().cancel(handle, grace=1.0)  # what has ended may be cancelled
    assert bench.state(handle).exit_code == 6
    again = bench.job(attempt=2)
    second = bench.engine().requeue(handle, again)
    assert second != handle
    bench.begin(again)
    bench.finish(again, 0)
    assert bench.state(second) == JobState("ended", 0, bench.state(second).reason)
    assert bench.count() == 2


def test_a_lost_job_is_told_apart(bench: Bench) -> None:
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    assert bench.state(handle).phase == "running"
    bench.vanish(job)
    if isinstance(bench, ClusterBench):
        assert bench.state(handle).phase == "running"  # it may only not be shown
        bench.clock += bench.engine().settings.patience
    seen = bench.state(handle)
    assert (seen.phase, seen.exit_code) == ("lost", None)
    assert seen.reason
    again = bench.job(attempt=2)
    bench.engine().requeue(handle, again)
    bench.begin(again)
    assert bench.count() == 2


def test_a_lost_job_that_turns_up_again_stays_lost_and_leaves(cluster: ClusterBench) -> None:
    """The next attempt may have begun."""
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    before = cluster.read()
    cluster.vanish(job)
    cluster.state(handle)
    cluster.clock += cluster.engine().settings.patience
    assert cluster.state(handle).phase == "lost"
    cluster.write(before)
    assert cluster.state(handle).phase == "lost"
    assert notes.is_asked_to_stop(job.work / "notes")


def test_a_system_is_not_asked_all_the_time(cluster: ClusterBench) -> None:
    """A scheduler looks at every run once a second."""
    job = cluster.job()
    engine = cluster.engine()
    handle = engine.submit(job)
    cluster.begin(job)
    engine.state(handle)
    asked = len(cluster.read()["calls"])
    cluster.clock += engine.settings.poll_seconds / 2
    first = engine.state(handle)
    assert len(cluster.read()["calls"]) == asked
    engine.cancel(handle, grace=60.0)  # that is done at once
    assert cluster.was_told(job)
    cluster.finish(job, 75)
    cluster.clock += engine.settings.poll_seconds
    assert (first.phase, engine.state(handle).exit_code) == ("running", 75)


def test_a_system_that_is_silent_is_left_alone_for_a_while(cluster: ClusterBench) -> None:
    """Each call that nobody answers takes its whole time, in which no other run is looked after."""
    job, engine = cluster.job(), cluster.engine()
    handle = engine.submit(job)
    cluster.begin(job)
    cluster.fault(says="error: timed out")
    with pytest.raises(EngineSilentError):
        engine.state(handle)
    asked = len(cluster.read()["calls"])
    for _ in range(3):
        with pytest.raises(EngineUnavailableError, match="did not answer lately"):
            engine.state(handle)
    with pytest.raises(EngineUnavailableError, match="did not answer lately"):
        engine.submit(cluster.job(attempt=2))
    assert len(cluster.read()["calls"]) == asked
    cluster.clock += 120.0
    assert engine.state(handle).phase == "running"


def test_a_log_that_cannot_be_read_holds_nobody_up(cluster: ClusterBench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.state(handle)

    def silent(*_: object, **__: object) -> None:
        raise EngineSilentError("kubectl did not answer")

    monkeypatch.setattr(programs, "_run", silent)
    assert cluster.engine().logs(handle, 1000) in (b"", b"[the log cannot be read now: kubectl did not answer]\n")


def test_a_stopped_job_says_that_it_saved(bench: Bench) -> None:
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    bench.engine().cancel(handle, grace=60.0)
    assert bench.was_told(job)
    assert bench.state(handle).phase == "running"
    bench.finish(job, 75)
    assert bench.state(handle).exit_code == 75


def test_a_stop_before_the_beginning_loses_nothing(cluster: ClusterBench) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    assert cluster.state(handle).phase == "waiting"
    cluster.engine().cancel(handle, grace=60.0)
    assert cluster.state(handle).phase == "ended"
    assert cluster.state(handle).exit_code == 75


def test_a_job_that_does_not_stop_is_ended_when_its_time_is_up(cluster: ClusterBench) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    cluster.engine().cancel(handle, grace=60.0)
    cluster.clock += 59.0
    assert cluster.state(handle).phase == "running"
    cluster.clock += 1.0
    cluster.state(handle)
    if cluster.engine_name == "kubernetes":
        assert cluster.state(handle).reason == "being deleted"
        cluster.vanish(job)  # its pods are gone
    if cluster.engine_name == "skypilot":
        assert cluster.state(handle).reason == "cancelling"
        cluster.set(job, "CANCELLED")
    assert cluster.state(handle).exit_code == 137


def test_the_end_is_known_when_the_system_has_forgotten_it(cluster: ClusterBench) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    cluster.finish(job, 4)
    cluster.forget(job)
    assert cluster.state(handle).exit_code == 4  # from what the job left
    for path in (job.work / "notes").iterdir():
        path.unlink()
    assert cluster.state(handle).exit_code == 4


def test_a_preempted_job_waits_and_goes_on(cluster: ClusterBench) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    assert cluster.state(handle).phase == "running"
    cluster.preempt(job)
    seen = cluster.state(handle)
    assert seen.phase == "waiting"
    assert seen.reason.startswith("preempted or restarted: ")
    cluster.begin(job)
    assert cluster.state(handle).phase == "running"
    cluster.finish(job, 0)
    assert cluster.state(handle).exit_code == 0
    assert cluster.count() == 1


def test_a_preempted_job_that_is_stopped_has_saved(cluster: ClusterBench) -> None:
    job = cluster.job()
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    cluster.state(handle)
    cluster.preempt(job)
    cluster.engine().cancel(handle, grace=60.0)
    assert cluster.state(handle).exit_code == 75


def test_a_system_that_does_not_answer_says_nothing_about_a_job(cluster: ClusterBench) -> None:
    job = cluster.job()
    says = "error: Unable to connect to the server"
    cluster.fault(says=says)
    with pytest.raises(EngineUnavailableError, match="Unable to connect") as caught:
        cluster.engine().submit(job)
    assert caught.value.worth_retrying
    handle = cluster.engine().submit(job)
    assert cluster.count() == 1
    cluster.begin(job)
    cluster.fault(says=says)
    with pytest.raises(EngineUnavailableError):
        cluster.state(handle)
    assert cluster.state(handle).phase == "running"
    cluster.fault(says=says)
    with pytest.raises(EngineUnavailableError):
        cluster.engine().cancel(handle, grace=60.0)
    assert cluster.state(handle).phase == "running"
    assert cluster.was_told(job)  # what was asked for is done as soon as it can be


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_job_that_was_taken_although_nobody_said_so_is_not_started_again(make_bench, name: str) -> None:
    """The system takes the job and the connection breaks, or the service is killed before it writes that down."""
    cluster = make_bench(name, spawn=True, command_seconds=1.0)
    job = cluster.job()
    start = {"slurm": "sbatch", "kubernetes": "kubectl", "skypilot": "sky"}[name]
    if name != "slurm":  # the first call only looks
        cluster.fault(start, code=0, after=True)
    cluster.fault(start, after=True, sleeps=60)
    with pytest.raises(MachineError, match="did not answer"):
        cluster.engine().submit(job)
    cluster.own["command_seconds"] = 60.0
    assert cluster.count() == 1
    handle = cluster.engine().submit(job)
    assert cluster.count() == 1
    cluster.begin(job)
    assert cluster.state(handle).phase == "running"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_program_that_is_not_there_is_named(make_bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = make_bench(name, spawn=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingProgramError, match="cannot start"):
        cluster.engine().submit(cluster.job())


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_stay_names(make_bench, name: str) -> None:
    """One engine for each name keeps this cheap; the rendering of every field is tested with its engine."""
    cluster = make_bench(CLUSTERS[HOSTILE.index(name) % len(CLUSTERS)])
    job = cluster.job(name=name, owner=name)
    handle = cluster.engine().submit(job)
    cluster.begin(job)
    assert cluster.state(handle).phase == "running"
    assert cluster.count() == 1
    assert not list(cluster.folder.rglob("pwned"))


def test_ids_that_are_none_are_refused(cluster: ClusterBench) -> None:
    job = cluster.job()
    for run_id in ("../x", "a b", "$(x)", "", "A", "a" * 40, "a\n"):
        with pytest.raises(KdscaleError, match="id of a run"):
            cluster.engine().submit(dataclasses.replace(job, run_id=run_id))
    assert cluster.count() == 0


def test_logs(bench: Bench) -> None:
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    bench.state(handle)
    if bench.engine_name == "slurm":
        (job.work / "slurm-1000.out").write_text("line\n" * 100)
    tail = bench.engine().logs(handle, 40)
    assert len(tail) <= 40
    assert bool(tail) == isinstance(bench, ClusterBench)  # the shell in the place of a local run prints nothing
