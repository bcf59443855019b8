"""What only Kubernetes does: queues of Kueue's, objects of others, pods that tell why."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.errors import ConfigError
from kdscale.service.engines.engine import Job
from tests.unit.service.engines.benches import KubernetesBench

Started = tuple[KubernetesBench, Job, str]


@pytest.fixture
def started(make_bench) -> Started:
    """A job that runs."""
    bench = make_bench("kubernetes")
    job = bench.job()
    handle = bench.engine().submit(job)
    bench.begin(job)
    return bench, job, handle


def jobset(bench: KubernetesBench) -> dict[str, Any]:
    (found,) = bench.read()["objects"]["default"].values()
    return dict(found)


def test_a_job_waits_in_its_queue(make_bench) -> None:
    bench = make_bench("kubernetes")
    job = bench.job(name="a name", owner="somebody", target={"queue": "mine", "priority": "low", "nodes": 2})
    handle = bench.engine().submit(job)
    made = jobset(bench)
    assert made["spec"]["suspend"]
    assert made["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "mine", "kueue.x-k8s.io/priority-class": "low", "kdscale-run": job.run_id,
        "kdscale-attempt": "1",
    }  # fmt: skip
    assert made["metadata"]["annotations"] == {"kdscale-name": "a name", "kdscale-owner": "somebody"}
    assert bench.state(handle).reason == "in queue mine"
    applied = next(call for call in bench.read()["calls"] if "apply" in call)
    assert {"--server-side", "--field-manager=kdscale"} <= set(applied)
    assert "--force-conflicts" not in applied


def test_kueue_starts_a_job_while_it_is_submitted_again(make_bench) -> None:
    """The second apply finds `suspend` in Kueue's hands: that is a conflict, and no error."""
    bench = make_bench("kubernetes")
    job = bench.job()
    bench.engine().submit(job)
    bench.begin(job)
    (job.work / "job.json").unlink()  # as if the service had been killed before it wrote anything down
    handle = bench.engine().submit(job)
    assert bench.count() == 1
    assert bench.state(handle).phase == "running"


def test_an_object_of_somebody_else_is_left_alone(make_bench) -> None:
    bench = make_bench("kubernetes")
    job = bench.job()
    name = f"kdscale-{job.run_id}-1"
    theirs = {"metadata": {"name": name, "labels": {"kdscale-run": "another"}}, "spec": {"suspend": False}}
    bench.change(objects={"default": {name: theirs}})
    with pytest.raises(ConfigError, match="left alone"):
        bench.engine().submit(job)
    assert jobset(bench) == theirs


def test_only_the_attempts_own_object_is_deleted(started: Started) -> None:
    bench, job, handle = started
    other = bench.job(run_id="0abcdefgh-0000002")
    bench.engine().submit(other)
    bench.engine().cancel(handle, grace=0.0)
    assert list(bench.read()["objects"]["default"]) == [f"kdscale-{job.run_id}-1", f"kdscale-{other.run_id}-1"]
    bench.change(pods={})
    bench.clock += 60.0
    bench.state(handle)  # asked once more
    assert list(bench.read()["objects"]["default"]) == [f"kdscale-{other.run_id}-1"]


def pods(*states: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"status": {"containerStatuses": [{"state": state}]}} for state in states]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([(8, "Error"), (6, "Error")], 6),  # the node that broke, not the one that lost it
        ([(137, "OOMKilled"), (8, "Error")], 15),
        ([(137, "Error")], 137),
        ([], 8),
    ],
)
def test_pods_that_left_no_note_tell_their_exit_codes(started: Started, ends: list[Any], code: int) -> None:
    bench, job, handle = started
    failed = {"type": "Failed", "status": "True", "reason": "ReachedMaxRestarts", "message": "jobset failed"}
    bench.update(job, False, {"conditions": [failed]})
    ended = pods(*({"terminated": {"exitCode": number, "reason": reason}} for number, reason in ends))
    bench.change(pods={f"kdscale-{job.run_id}-1": ended})
    assert bench.state(handle).exit_code == code
    assert bench.state(handle).reason


def test_why_pods_wait(started: Started) -> None:
    bench, job, handle = started
    bench.update(job, False, {"replicatedJobsStatus": [{"name": "nodes", "ready": 0, "active": 1}]})
    name = f"kdscale-{job.run_id}-1"
    bench.change(pods={name: pods({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})})
    assert bench.state(handle).phase == "waiting"
    assert "ImagePullBackOff: no such image" in bench.state(handle).reason
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    bench.change(pods={name: [{"status": {"conditions": [scheduled]}}]})
    assert "Unschedulable: 0/3 nodes" in bench.state(handle).reason


def test_what_cannot_work_is_refused_before_anything_is_made(make_bench) -> None:
    bench = make_bench("kubernetes")
    for wrong in (
        {"image": ""}, {"image": "a b"}, {"namespace": "A"}, {"queue": "a\nb"}, {"volumes": {"A b": "/x"}},
        {"volumes": {"a": "/x\ny"}}, {"secrets": ["-x"]}, {"memory": "much"}, {"gpu": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="target"):
            bench.engine().submit(bench.job(target=wrong))
    assert bench.count() == 0
