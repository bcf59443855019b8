"""What only SkyPilot does: a job that shows up late, reasons in words, no signal before machines are taken away."""

from __future__ import annotations

import json

import pytest

from kdscale.errors import ConfigError
from kdscale.service.engines.engine import EngineUnavailableError
from tests.unit.service.engines.benches import SkyPilotBench


def test_a_job_that_shows_up_late_is_neither_lost_nor_started_twice(make_bench) -> None:
    bench = make_bench("skypilot")
    bench.change(late=2)
    job = bench.job()
    handle = bench.engine().submit(job)
    assert bench.state(handle).phase == "waiting"
    (job.work / "job.json").write_text(
        json.dumps({**json.loads((job.work / "job.json").read_text()), "submitted": False})
    )  # as if the service had been killed while it waited for sky
    assert bench.engine().submit(job) == handle
    assert bench.count() == 1
    assert bench.state(handle).reason == "pending"


def test_a_job_that_never_shows_up_is_lost(make_bench) -> None:
    bench = make_bench("skypilot")
    bench.change(late=10**6)
    handle = bench.engine().submit(bench.job())
    bench.state(handle)
    bench.clock += 1799.0
    assert bench.state(handle).phase == "waiting"
    bench.clock += 1.0
    assert bench.state(handle).phase == "lost"


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("FAILED", "Job exited with exit code 6. To see the details, run: sky jobs logs 1", 6),
        ("FAILED", "Job exited with exit codes [0, 15, 8]", 15),
        ("FAILED", "see the logs", 1),
        ("FAILED_SETUP", None, 2),
        ("FAILED_PRECHECKS", "no feasible resources", 2),
        ("FAILED_NO_RESOURCE", None, 11),
        ("FAILED_CONTROLLER", None, 8),
        ("CANCELLED", None, 143),
    ],
)
def test_how_a_job_ended(make_bench, status: str, reason: str | None, code: int) -> None:
    bench = make_bench("skypilot")
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    bench.set(job, status, failure_reason=reason)
    assert bench.state(handle).exit_code == code


def test_an_answer_that_nobody_understands_says_nothing(make_bench) -> None:
    bench = make_bench("skypilot")
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.set(job, "SOMETHING_NEW")
    with pytest.raises(EngineUnavailableError, match="SOMETHING_NEW"):
        bench.state(handle)


def test_the_task(make_bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    bench: SkyPilotBench = make_bench("skypilot", buckets={"/data": "s3://bucket/x"}, secrets=["HF_TOKEN"])
    job = bench.job(target={"infra": "aws/us-east-1", "accelerators": "H100:2", "nodes": 2, "spot": True})
    bench.engine().submit(job)
    task = bench.read()["managed"][0]["task"]
    assert (task["name"], task["num_nodes"]) == (f"kdscale-{job.run_id}-1", 2)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "distill.processes=4" in task["run"]
    assert "hf_secret" not in json.dumps(bench.read())
    launched = next(call for call in bench.read()["calls"] if "launch" in call)
    assert launched[launched.index("--secret") + 1] == "HF_TOKEN"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"target\.secrets"):
        bench.engine().submit(bench.job(attempt=2))


def test_what_cannot_work_is_refused_before_anything_is_made(make_bench) -> None:
    bench = make_bench("skypilot")
    for wrong in (
        {"infra": "aws/$(x)"}, {"accelerators": "H100:8 "}, {"image": "${HOME}"}, {"volumes": {"data": "x"}},
        {"buckets": {"/data": "s3://$HF_TOKEN"}}, {"cpus": "many"}, {"setup": "a\x1bb"}, {"region": "x"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="target"):
            bench.engine().submit(bench.job(target=wrong))
    assert bench.count() == 0
