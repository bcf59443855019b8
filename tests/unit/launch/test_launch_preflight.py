"""Preflight's verdicts from made-up reports, its probe on this machine, and the door that ranks wait at."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdscale.jobs import preflight
from kdscale.runtime.signals import watch_signals
from kdscale_launch import RankPlace
from kdscale_launch.local import free_port
from kdscale_launch.rendezvous import release_waiting_ranks, wait_for_rank_0


def report(**changes: Any) -> dict[str, Any]:
    versions = dict.fromkeys(("python", "kdscale", "source", "torch", "transformers", "deepspeed", "safetensors",
                              "tokenizers", "numpy"), "1.0") | changes.pop("versions", {})  # fmt: skip
    return {
        "versions": versions, "cores": 8, "gpus": 0, "config": "c" * 64, "config_error": None, "teacher": "t",
        "write_error": None, "free_bytes": 10**12, **changes,
    }  # fmt: skip


def bad(reports: dict[str, Any], skews: dict[str, tuple[float, float]] | None = None) -> dict[str, str]:
    found = preflight.judge(reports, dict.fromkeys(reports, 2), skews or dict.fromkeys(reports, (0.0, 0.001)))
    return {finding.topic: finding.text for finding in found if finding.severity == "bad"}


def test_equal_hosts_are_fine() -> None:
    assert bad({"a": report(), "b": report()}) == {}


@pytest.mark.parametrize(
    ("other", "topic", "found"),
    [
        (report(versions={"torch": "2.0"}), "torch", "b: 2.0; a has 1.0"),
        (report(versions={"deepspeed": None}), "deepspeed", "b: None; a has 1.0"),
        (report(versions={"source": "x"}), "source", "b: x; a has 1.0"),
        (report(config="d" * 64), "config", "b: dddddddddddd; a has cccccccccccc"),
        (report(config_error="no file"), "config", "b: no file"),
        (report(teacher="u"), "teacher", "b: u; a has t"),
        (report(write_error="read-only"), "run folder", "b: read-only"),
        (report(free_bytes=10), "disk", "0.0 GB free (b)"),
        (report(gpus=8), "devices", "a: 2 slots, 0 GPUs visible"),
    ],
)
def test_what_differs_is_named_with_its_host(other: dict[str, Any], topic: str, found: str) -> None:
    assert bad({"a": report(), "b": other}) == {topic: found}


def test_a_package_that_is_missing_everywhere_is_bad() -> None:
    none = report(versions={"deepspeed": None})
    assert list(bad({"a": none, "b": none})) == ["deepspeed"]


def test_a_clock_is_wrong_only_beyond_what_was_measured() -> None:
    hosts = {"a": report(), "b": report()}
    assert bad(hosts, {"a": (0.0, 0.1), "b": (-7.0, 0.1)}) == {"clocks": "b: -7.0 s"}
    assert bad(hosts, {"a": (0.0, 0.1), "b": (-7.0, 3.0)}) == {}


def test_marks_prove_a_shared_folder(tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"name: x\nrun_dir: {tmp_path}/run\nteacher: {{path: {tiny_llama_dir}}}\nprune: {{ffn: 64}}\n")
    one = preflight.probe("m-0", str(config), [])
    other = preflight.probe("m-1", str(config), [f"run_dir={tmp_path}/elsewhere"])
    assert (one["config_error"], one["write_error"]) == (None, None)
    assert one["config"] != other["config"]
    assert one["teacher"] == other["teacher"]
    assert preflight.shared(["m-0", "m-1"], str(config), [], seconds=0.0) == ["m-1"]
    assert preflight.judge_shared({"a": ["b"], "b": []}).severity == "bad"
    preflight.clean(["m-0", "m-1"], str(config), [])
    assert list((tmp_path / "run" / "logs").iterdir()) == []


def test_a_config_that_cannot_be_read_is_reported_not_raised(tmp_path: Path) -> None:
    assert "does not exist" in preflight.probe("m", str(tmp_path / "none.yaml"), [])["config_error"]


# --- waiting for rank 0


def door(port: int) -> dict[str, str]:
    return {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_ranks_wait_until_rank_0_listens() -> None:
    port, answers = free_port(), []
    waiting = threading.Thread(target=lambda: answers.append(wait_for_rank_0(door(port))))
    waiting.start()
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(20)
    assert answers == [True]


def test_ranks_are_sent_home_when_there_is_nothing_to_distil() -> None:
    port, answers = free_port(), []
    waiting = [threading.Thread(target=lambda: answers.append(wait_for_rank_0(door(port)))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    release_waiting_ranks(RankPlace(0, 3, "127.0.0.1", port), seconds=20.0)
    for thread in waiting:
        thread.join(20)
    assert answers == [False, False]


def test_rank_0_does_not_wait_for_ranks_that_never_come() -> None:
    began = time.monotonic()
    release_waiting_ranks(RankPlace(0, 3, "127.0.0.1", free_port()), seconds=0.2)
    assert time.monotonic() - began < 10


# --- one signal that arrives twice


def test_the_same_signal_at_once_again_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 60.0)
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with watch_signals() as request:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (request.signum, calls) == (signal.SIGTERM, [])
            monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 0.0)
            signal.raise_signal(signal.SIGTERM)  # later: now it does what it did before
            assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
