"""What follows the end of a job, and the words for it."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.errors import ERRORS_BY_CODE
from kdscale.service.engines.engine import JobState
from kdscale.service.scheduler.machine import Machine, parse_list, visible_devices
from kdscale.service.scheduler.outcomes import Attempt, Outcome, last_words, outcome, reason_of
from kdscale.service.states import NEXT

LOST = JobState("lost", reason="its supervisor was killed")


def after(state: Any, job: JobState | int, tries: int = 1, seconds: float = 0.0, printed: str = "") -> Outcome:
    job = JobState("ended", job) if isinstance(job, int) else job
    return outcome(Attempt(state, tries, seconds, job, printed), most_tries=3, retry_seconds=30.0)


@pytest.mark.parametrize("state", ["starting", "running", "recovering", "pausing", "cancelling"])
def test_every_end_has_a_state_that_may_follow_and_a_reason(state: Any) -> None:
    for job in (*range(256), LOST, JobState("ended", None)):
        decided = after(state, job)
        assert decided.state in NEXT[state] | {"recovering"}, job
        as_asked = job == 0 or (job == 75 and state in ("pausing", "cancelling"))
        assert (decided.reason == "") == as_asked, job


@pytest.mark.parametrize(
    ("state", "job", "then"),
    [
        ("running", 0, "succeeded"),
        ("pausing", 0, "succeeded"),
        ("cancelling", 0, "succeeded"),
        ("running", 75, "recovering"),
        ("pausing", 75, "paused"),
        ("pausing", 137, "paused"),
        ("pausing", 2, "failed"),
        ("cancelling", 75, "cancelled"),
        ("cancelling", 2, "cancelled"),
        *(("running", code, "recovering" if code in (8, 9, 11) else "failed") for code in ERRORS_BY_CODE),
        ("running", 1, "recovering"),
        ("running", 137, "recovering"),
        ("running", LOST, "recovering"),
        ("pausing", LOST, "paused"),
        ("starting", 75, "recovering"),
    ],
)
def test_what_follows(state: str, job: Any, then: str) -> None:
    assert after(state, job).state == then


def test_tries_are_counted_and_waits_grow() -> None:
    assert [after("running", 8, tries).wait for tries in (1, 2)] == [30.0, 60.0]
    third = after("running", 8, 3)
    assert third.state == "failed" and third.reason.startswith("after 3 tries: ")
    stopped = after("running", 75, 3)
    assert (stopped.state, stopped.tries) == ("recovering", 2)  # and the start that follows is the third again
    assert after("running", 8, 3, seconds=3600.0) == Outcome("recovering", after("running", 8, 1).reason, 30.0, 1)


def test_reasons_tell_kinds_of_ends_apart() -> None:
    ends = [LOST, *(JobState("ended", code) for code in (1, 2, 5, 8, 9, 11, 15, 75, 134, 137, 143, 200))]
    reasons = [reason_of(end, "") for end in ends]
    assert len({*reasons}) == len(reasons)
    assert reasons[0] == "lost: its supervisor was killed"
    assert "SIGTERM" in reason_of(JobState("ended", 143), "")
    printed = "step 3\nerror: data.sources: no text\n  expected: some\n"
    assert reason_of(JobState("ended", 4), printed) == ("exit code 4: data.sources: no text\n  expected: some")
    assert "a node failed; the last line" in reason_of(JobState("ended", 8, "a node failed"), "the last line")
    assert last_words("Traceback:\n  File\nKeyError: 3\n") == "KeyError: 3"
    assert last_words("") == ""


def test_devices_are_cards_or_their_slices() -> None:
    listed = (
        "GPU 0: NVIDIA A100 (UUID: GPU-aa)\n  MIG 3g.20gb Device 0: (UUID: MIG-b1)\n"
        "  MIG 3g.20gb Device 1: (UUID: MIG-b2)\nGPU 1: NVIDIA A100 (UUID: GPU-cc)\n"
    )
    assert parse_list(listed) == ("MIG-b1", "MIG-b2", "GPU-cc")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": " 3, 1"}) == ("3", "1")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_nobody_gets_a_device_that_another_holds() -> None:
    machine = Machine(3, ("a", "b", "c"))
    assert machine.choose(2, {"b"}) == ["a", "c"]
    assert machine.choose(2, {"a", "b"}) is None
    assert Machine(4).choose(2, ()) == []
