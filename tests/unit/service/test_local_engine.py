"""Runs on this machine, with small shell commands in the place of trainings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdscale.files import write_json
from kdscale.runtime.locks import is_locked
from kdscale.service.engines import supervisor
from kdscale.service.engines.engine import ENGINES, Job, JobState, make_engine
from kdscale.service.engines.local import LocalEngine
from kdscale.service.engines.marks import end_marked, marked
from kdscale.service.settings import ServiceSettings

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="marks are read from /proc")
_LONG = 30.0


class ShellEngine(LocalEngine):
    """The engine, with `sh -c SCRIPT` as the run."""

    def __init__(self, script: str):
        super().__init__()
        self.script = script

    def _command(self, job: Job) -> list[str]:
        return ["sh", "-c", self.script]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield Job("a-run", 1, tmp_path / "run", tmp_path / "run" / "config.yaml", tmp_path / "jobs" / "a-run" / "1")
    assert end_marked(str(tmp_path / "jobs" / "a-run" / "1"))


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + _LONG
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def end_of(engine: LocalEngine, handle: str) -> JobState:
    until(lambda: engine.state(handle).phase in ("ended", "lost"))
    return engine.state(handle)


def supervisor_of(job: Job) -> int:
    return int(json.loads((job.work / supervisor.STARTED).read_text())["supervisor"])


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 8", 8), ("kill -9 $$", 137), ("exit 75", 75), ("kill -15 $$", 75), ("exit 143", 143)],
)
def test_how_a_run_ended_is_kept(job: Job, script: str, code: int) -> None:
    engine = ShellEngine(f"echo something; {script}")
    handle = engine.submit(job)
    assert end_of(engine, handle) == JobState("ended", code)
    assert engine.logs(handle, 100) == b"something\n"
    assert engine.submit(job) == handle and end_of(engine, handle).exit_code == code


def test_a_program_that_is_missing_ends_the_attempt(job: Job) -> None:
    class Missing(LocalEngine):
        def _command(self, job: Job) -> list[str]:
            return ["/no/such/program"]

    engine = Missing()
    assert end_of(engine, engine.submit(job)).exit_code == 127
    assert b"/no/such/program" in engine.logs(str(job.work), 1000)


def test_an_attempt_that_has_begun_is_never_begun_again(job: Job) -> None:
    job.work.mkdir(parents=True)
    request = {"command": ["touch", str(job.work / "again")], "folder": str(job.work), "mark": str(job.work)}
    write_json(job.work / supervisor.REQUEST, request)
    write_json(job.work / supervisor.STARTED, {"supervisor": 1, "started": 0.0})  # and was killed
    command = [sys.executable, "-m", "kdscale.service.engines.supervisor", str(job.work)]
    assert subprocess.run(command, check=False).returncode == 0
    until(lambda: not is_locked(job.work / supervisor.LOCK))
    assert not (job.work / "again").exists() and not (job.work / supervisor.EXIT).exists()


def test_a_clock_that_is_set_changes_nothing_of_the_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    stop, now, passed = supervisor._Stop(tmp_path), time.time(), time.monotonic()
    write_json(tmp_path / supervisor.STOP, {"deadline": now + 60.0})
    assert stop.asked() and not stop.is_late
    for jump in (3600.0, -3600.0):
        with monkeypatch.context() as patch:
            patch.setattr(supervisor.time, "time", lambda jump=jump: now + jump)
            assert stop.asked() and not stop.is_late
            patch.setattr(supervisor.time, "monotonic", lambda: passed + 61.0)
            assert stop.asked() and stop.is_late


def test_an_attempt_is_started_once_whoever_asks_and_how_often(job: Job) -> None:
    engine = ShellEngine("echo begun; while [ ! -e go ]; do sleep 0.05; done".replace("go", str(job.work / "go")))
    command = [sys.executable, "-m", "kdscale.service.engines.supervisor", str(job.work)]
    handle = engine.submit(job)
    rivals = [subprocess.Popen(command) for _ in range(3)]
    assert engine.submit(job) == handle
    assert [rival.wait() for rival in rivals] == [0, 0, 0]
    assert engine.state(handle).phase == "running"
    (job.work / "go").touch()
    assert end_of(engine, handle).exit_code == 0
    assert [engine.submit(job), *(subprocess.run(command, check=False).returncode for _ in range(2))] == [handle, 0, 0]
    assert engine.logs(handle, 1000) == b"begun\n"


def test_a_run_dies_with_its_supervisor_and_is_lost(job: Job) -> None:
    engine = ShellEngine("setsid sleep 1000 & sleep 1000")  # a child in a session of its own, as ranks are
    handle = engine.submit(job)
    until(lambda: len(marked(str(job.work))) == 3)
    os.kill(supervisor_of(job), signal.SIGKILL)
    until(lambda: not is_locked(job.work / supervisor.LOCK))
    assert engine.state(handle).phase == "lost"
    assert marked(str(job.work)) == []
    assert engine.submit(job) == handle and engine.state(handle).phase == "lost"  # never begun a second time


def test_the_run_is_told_to_stop_and_may_save(job: Job) -> None:
    engine = ShellEngine("trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    handle = engine.submit(job)
    until(lambda: engine.logs(handle, 100))
    engine.cancel(handle, grace=1000.0)
    engine.cancel(handle, grace=2000.0)
    assert end_of(engine, handle) == JobState("ended", 75)
    assert engine.logs(handle, 100).endswith(b"saved\n")


def test_a_run_that_does_not_stop_is_killed_after_its_grace(job: Job) -> None:
    engine = ShellEngine("trap '' TERM; echo ready; while :; do sleep 0.05; done")
    handle = engine.submit(job)
    until(lambda: engine.logs(handle, 100))
    engine.cancel(handle, grace=1000.0)
    engine.cancel(handle, grace=0.0)
    assert end_of(engine, handle) == JobState("ended", 137)


def test_a_run_that_is_stopped_before_it_begins_never_begins(job: Job) -> None:
    engine = ShellEngine("echo begun")
    job.work.mkdir(parents=True)
    engine.cancel(str(job.work), grace=10.0)
    handle = engine.submit(job)
    assert end_of(engine, handle) == JobState("ended", 75) and engine.logs(handle, 100) == b""


def test_a_signal_to_the_supervisor_reaches_the_run(job: Job) -> None:
    """systemd ends every process of a service that way."""
    engine = ShellEngine("trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    handle = engine.submit(job)
    until(lambda: engine.logs(handle, 100))
    os.kill(supervisor_of(job), signal.SIGTERM)
    assert end_of(engine, handle) == JobState("ended", 75)


def test_what_a_run_leaves_running_is_ended_with_it(job: Job) -> None:
    engine = ShellEngine("setsid sleep 1000 & exit 3")
    assert end_of(engine, engine.submit(job)).exit_code == 3
    assert marked(str(job.work)) == []


def test_secrets_of_the_service_do_not_reach_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SOME_DATABASE", "postgresql://me:word@host/db")
    monkeypatch.setenv("HARMLESS", "here")
    engine = ShellEngine("env")
    handle = engine.submit(Job(**{**vars(job), "devices": ("2", "5")}))
    end_of(engine, handle)
    printed = engine.logs(handle, 100_000).decode().splitlines()
    assert {"HARMLESS=here", "CUDA_VISIBLE_DEVICES=2,5"} <= set(printed)
    assert not any("hf_secret" in line or "me:word" in line for line in printed)


def test_a_damaged_request_is_an_error_in_words(job: Job) -> None:
    job.work.mkdir(parents=True)
    write_json(job.work / supervisor.REQUEST, {"command": []})
    with pytest.raises(Exception, match=r"request\.json is damaged"):
        ShellEngine("true").submit(job)
    assert LocalEngine().state(str(job.work)).phase == "lost"


def test_the_command_of_a_run(job: Job) -> None:
    command = [sys.executable, "-m", "kdscale.cli.main", "run", str(job.config)]
    assert LocalEngine()._command(job) == command
    shared = Job(**{**vars(job), "slots": 4})
    assert LocalEngine()._command(shared) == [*command, "--set", "distill.processes=4"]


def test_the_table_of_engines_names_this_one() -> None:
    assert isinstance(make_engine("local", ServiceSettings(home="home")), LocalEngine)
    with pytest.raises(Exception, match=r"target\.engine"):
        make_engine("elsewhere", ServiceSettings(home="home"))
    assert next(iter(ENGINES)) == "local"
