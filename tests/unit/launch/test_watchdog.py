"""Ranks that hang: what their watchdog says, with which code they leave, and which rank the launcher names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale_launch import HUNG_EXIT_CODE, Host, HostConnections, JobSpec, RankFailed, Task, run_local
from kdscale_launch.hosts.failure import Failure

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(LAUNCH)}
PREAMBLE = """
import ctypes, os, sys, time
from kdscale_launch.watchdog import at_step, enter, watching
rank = int(os.environ.get("RANK", 3))
def waits_for_a_token():
    os.read(os.pipe()[0], 1)
"""
# Stands in for a collective: what counts is the file that the innermost function was written in.
ALL_REDUCE = """
exec(compile("def all_reduce(): waits_for_a_token_in_c()", "/x/torch/distributed/distributed_c10d.py", "exec"))
waits_for_a_token_in_c = __import__("functools").partial(os.read, os.pipe()[0], 1)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-c", PREAMBLE + code]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)


def test_a_blocked_main_thread_is_shown_and_the_process_left():
    done = run("""
with watching(0.4, rank):
    at_step(17, lambda: "documents 3, 5")
    enter("teacher")
    waits_for_a_token()
""")
    assert done.returncode == HUNG_EXIT_CODE
    assert "Thread 0x" in done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("kdscale watchdog: rank 3 hung in waits_for_a_token (<string>:")
    assert "phase teacher, step 17, documents 3, 5, no progress for" in last
    assert "waiting for other ranks" not in last


def test_code_that_keeps_pythons_lock_does_not_stop_the_clock():
    done = run("with watching(0.3, rank):\n    enter('data')\n    ctypes.PyDLL(None).pause()")  # PyDLL keeps the lock
    assert done.returncode == 1
    assert "most recent call first" in done.stderr
    assert Failure(0, 3, "", done.stderr, 0.0, 1).hung == "hung in code that does not release Python's lock"


def test_progress_keeps_it_quiet_and_leaving_the_block_ends_it():
    done = run("""
with watching(0.8, rank):
    enter("data")
    for _ in range(40): time.sleep(0.04); enter("student")  # twice the limit in all
ctypes.PyDLL(None).usleep(1_200_000)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_slow_phases_get_more_time():
    done = run("with watching(0.25, rank):\n    enter('checkpoint')\n    waits_for_a_token()")
    assert done.returncode == HUNG_EXIT_CODE
    seconds = float(done.stderr.rsplit("no progress for ", 1)[1].split()[0])
    assert seconds >= 1  # four times the quarter of a second


def test_without_seconds_there_is_none():
    done = run("""
with watching(0, rank):
    os.kill(os.getpid(), 10)  # the launcher asks for the stacks
    time.sleep(0.5)
""")
    assert done.returncode == 0
    assert "most recent call first" in done.stderr


@pytest.fixture
def hosts(ssh, tmp_path):
    settings = replace(ssh, pythonpath=str(LAUNCH))
    with HostConnections([Host("one", 1), Host("two", 1)], settings) as connections:
        assert connections.connect() == {}
        yield connections


def task(code: str, tmp_path: Path) -> Task:
    command = (sys.executable, "-S", "-c", PREAMBLE + ALL_REDUCE + code)
    return Task(command, log_dir=str(tmp_path / "logs"), master_addr="127.0.0.1", master_port=1, grace_seconds=0.5)


def test_the_rank_that_the_others_wait_for_is_named_first(hosts, tmp_path):
    outcome = hosts.run(
        task(
            """
with watching(0.4 + 0.4 * rank, rank):
    enter("data" if rank else "backward")
    waits_for_a_token() if rank else all_reduce()
""",
            tmp_path,
        )
    )
    assert [failure.rank for failure in outcome.failures] == [0, 1]
    assert outcome.first().rank == 1
    text = outcome.describe()
    assert text.startswith("host two, rank 1: hung in waits_for_a_token (<string>:")
    assert f"; stack in {tmp_path}/logs/rank-1.log" in text.splitlines()[0]
    assert "host one, rank 0: hung in all_reduce (torch/distributed/distributed_c10d.py:1): phase backward" in text


def test_a_stopped_rank_is_named_before_those_that_wait_for_it(hosts, tmp_path, alive):
    outcome = hosts.run(
        task(
            """
open(f"pid-{rank}", "w").write(str(os.getpid()))
if rank: os.kill(os.getpid(), 19)
with watching(0.4, rank):
    enter("collective")
    all_reduce()
""",
            tmp_path,
        )
    )
    assert outcome.describe().startswith("host two, rank 1: stopped by a signal")
    assert "rank 0: hung in all_reduce" in outcome.describe()
    assert not alive(int((tmp_path / "pid-1").read_text()))


def test_a_killed_ranks_peers_show_their_stacks(hosts, tmp_path):
    code = """
with watching(0, rank):
    open(f"pid-{rank}", "w").close()
    while rank and not os.path.exists("pid-0"): time.sleep(0.01)
    os.kill(os.getpid(), 9) if rank else waits_for_a_token()
"""
    outcome = hosts.run(task(code, tmp_path))
    assert [(failure.rank, failure.exit_code) for failure in outcome.failures] == [(1, -signal.SIGKILL)]
    assert "in waits_for_a_token" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_ranks_of_one_machine(tmp_path):
    code = """
with watching(0.4, rank):
    enter("data")
    waits_for_a_token() if rank else all_reduce()
"""
    command = (sys.executable, "-S", "-c", PREAMBLE + ALL_REDUCE + code)
    spec = JobSpec(command, 2, tmp_path / "logs", env={"PYTHONPATH": str(LAUNCH)})
    with pytest.raises(RankFailed, match="hung in waits_for_a_token") as caught:
        run_local(spec)
    assert (caught.value.rank, caught.value.exit_code) == (1, HUNG_EXIT_CODE)
