"""What only Slurm does: accounts that lag behind, or are none; states that no script ends in; what sbatch gets."""

from __future__ import annotations

import subprocess

import pytest

from kdscale.errors import ConfigError
from kdscale.service.engines.engine import Job
from tests.unit.service.engines.benches import SlurmBench

Started = tuple[SlurmBench, Job, str]


@pytest.fixture
def started(make_bench) -> Started:
    """A job that runs."""
    bench = make_bench("slurm", account="team", check=False)
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    assert bench.state(handle).phase == "running"
    return bench, job, handle


@pytest.mark.parametrize(
    ("state", "exit_code", "saved", "expected"),
    [
        ("TIMEOUT", "0:0", None, 8),
        ("TIMEOUT", "0:15", 75, 75),
        ("NODE_FAIL", "1:0", None, 8),
        ("PREEMPTED", "0:15", 75, 75),
        ("PREEMPTED", "0:15", None, 8),
        ("OUT_OF_MEMORY", "0:125", None, 15),
        ("BOOT_FAIL", "0:0", None, 8),
        ("FAILED", "6:0", None, 6),
        ("FAILED", "0:9", None, 137),
        ("CANCELLED by 0", "0:15", None, 143),
        ("CANCELLED by 0", "0:15", 75, 75),
        ("SOMETHING_NEW", "0:0", None, 8),
    ],
)
def test_how_a_job_ended(started: Started, state: str, exit_code: str, saved: int | None, expected: int) -> None:
    bench, job, handle = started
    if saved is not None:
        bench.leave(job, saved)
    bench.set(job, None, [state, exit_code])
    seen = bench.state(handle)
    assert (seen.phase, seen.exit_code) == ("ended", expected)


def test_accounts_that_lag_behind(started: Started) -> None:
    """squeue has forgotten the job, sacct has not heard of its end: nobody says lost, and nobody says 0."""
    bench, job, handle = started
    bench.set(job, ["FAILED", "NonZeroExitCode"], ["RUNNING", "0:0"])
    assert bench.state(handle).phase == "running"
    bench.set(job, None, ["RUNNING", "0:0"])
    bench.clock += 100.0
    assert bench.state(handle).phase == "running"
    bench.set(job, None, ["FAILED", "6:0"])
    assert bench.state(handle).exit_code == 6


def test_a_cluster_without_accounts(started: Started) -> None:
    bench, job, handle = started
    bench.change(no_accounting=True)
    bench.set(job, None, None)
    assert bench.state(handle).phase == "running"
    bench.leave(job, 6)
    assert bench.state(handle).exit_code == 6


@pytest.mark.parametrize("lost", [False, True])
def test_a_job_that_began_before_it_could_be_taken_back(make_bench, lost: bool) -> None:
    """Pending when it was looked at, running when scancel comes: it is told, has its time, and may yet be lost."""
    bench = make_bench("slurm")
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.before["scancel"] = lambda: bench.begin(job)
    bench.engine().cancel(handle, grace=60.0)
    assert bench.state(handle).phase == "running"
    assert bench.was_told(job)
    if not lost:
        bench.clock += 60.0
        bench.state(handle)
        assert bench.state(handle).exit_code == 137
    else:
        bench.vanish(job)
        assert bench.state(handle).phase == "running"
        bench.clock += 180.0
        assert bench.state(handle).phase == "lost"


def test_what_sbatch_is_told(make_bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("KDSCALE_DATABASE", "postgresql://user:password@db/x")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    bench = make_bench("slurm", partition="cpu", warn=120, extra=["qos=high", "constraint=a&b"])
    name = 'a "name" \\ of #SBATCH, 50% & more'
    job = bench.job(name=name, owner="somebody", target={"nodes": 2, "gpus_per_node": 4, "time": "1-00:00:00"})
    bench.engine().submit(job)
    told = bench.read()["jobs"][0]["told"]
    own_name = f"kdscale-{job.run_id}-1"
    assert told == {
        "job-name": own_name, "comment": f"{own_name}; {name}; somebody", "partition": "cpu", "gpus-per-node": "4",
        "nodes": "2", "ntasks-per-node": "4", "time": "1-00:00:00", "signal": "B:TERM@120", "requeue": "",
        "open-mode": "append", "output": f"{job.work}/slurm-%j.out", "qos": "high", "constraint": "a&b",
    }  # fmt: skip
    script = (job.work / "job.sbatch").read_text()
    assert "hf_secret" not in script
    assert "export HF_HOME=/shared/hf" in script
    assert "HF_TOKEN" in bench.read()["environment"]  # sbatch hands its own environment on
    assert "KDSCALE_DATABASE" not in bench.read()["environment"]
    subprocess.run(["bash", "-n", str(job.work / "job.sbatch")], check=True)


def test_what_slurm_does_not_take_is_the_runs_fault(make_bench) -> None:
    bench = make_bench("slurm")
    with pytest.raises(ConfigError, match="Invalid partition name"):
        bench.engine().submit(bench.job(target={"partition": "none"}))
    for wrong in ({"partition": "a b"}, {"time": "soon"}, {"extra": ["wrap=x\ny"]}, {"nodes": 0}, {"node": 1}):
        with pytest.raises(ConfigError, match="target"):
            bench.engine().submit(bench.job(target=wrong))
    assert bench.count() == 0
