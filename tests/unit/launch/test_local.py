"""The launcher: ranks see the right environment, and no way of ending leaves one running."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdscale_launch import JobSpec, LaunchError, RankFailed, run_local

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


def python_job(tmp_path: Path, code: str, processes: int = 2, **kwargs) -> JobSpec:
    return JobSpec((sys.executable, "-S", "-c", code), processes, tmp_path / "logs", cwd=tmp_path, **kwargs)


def test_ranks_get_their_environment(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA")
    code = f"import os; open('seen-' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run_local(python_job(tmp_path, code, 3, env={"EXTRA": "x"})) == 0
    seen = [(tmp_path / f"seen-{rank}").read_text().split() for rank in range(3)]
    assert [row[:4] for row in seen] == [[str(r), str(r), "3", "127.0.0.1"] for r in range(3)]
    assert len({row[4] for row in seen}) == 1
    assert all(row[5] == "x" for row in seen)


def test_one_failure_ends_all_and_is_shown(tmp_path, alive):
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('rank one has no disk')\n"
        "open('pid', 'w').write(str(os.getpid())); time.sleep(60)\n"
    )
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 left with exit code 1.*no disk") as caught:
        run_local(python_job(tmp_path, code))
    assert (caught.value.rank, caught.value.exit_code) == (1, 1)
    assert time.monotonic() - began < 20
    pid = tmp_path / "pid"
    assert not pid.exists() or not alive(int(pid.read_text()))


def test_command_that_does_not_exist(tmp_path):
    with pytest.raises(LaunchError, match="no-such-program"):
        run_local(JobSpec(("no-such-program",), 1, tmp_path))


@pytest.mark.parametrize(("command", "processes"), [((), 1), (("true",), 0)])
def test_impossible_jobs_are_refused(tmp_path, command, processes):
    with pytest.raises(LaunchError):
        JobSpec(command, processes, tmp_path)


LAUNCHER = """
import sys
from pathlib import Path
from kdscale_launch import JobSpec, run_local
child = '''
import os, signal, sys, time
def stop(signum, frame):
    open("stopped-" + os.environ["RANK"], "w").write(str(signum)); sys.exit(128 + signum)
if sys.argv[1] == "polite":
    signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
open("tmp-" + os.environ["RANK"], "w").write(str(os.getpid()))
os.rename("tmp-" + os.environ["RANK"], "pid-" + os.environ["RANK"])
time.sleep(120)
'''
sys.exit(run_local(JobSpec((sys.executable, "-S", "-c", child, sys.argv[1]), 2, Path("logs"))))
"""


def start_launcher(tmp_path: Path, manner: str, wait_for) -> tuple[subprocess.Popen[bytes], list[int]]:
    launcher = subprocess.Popen(
        [sys.executable, "-S", "-c", LAUNCHER, manner], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(LAUNCH)}
    )
    files = [tmp_path / f"pid-{rank}" for rank in range(2)]
    assert wait_for(lambda: all(file.exists() for file in files))
    return launcher, [int(file.read_text()) for file in files]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_once(tmp_path, signum, alive, wait_for):
    launcher, pids = start_launcher(tmp_path, "polite", wait_for)
    launcher.send_signal(signum)
    assert launcher.wait(15) == 128 + signum
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)] == [str(int(signum))] * 2
    assert not any(alive(pid) for pid in pids)


SAVES = """
import os, signal, sys, time
rank = os.environ["RANK"]
def save(signum, frame):
    time.sleep({seconds} * int(rank))  # stands in for the work
    sys.exit({code})
signal.signal(signal.SIGTERM, save)
open("ready-" + rank, "w").close()
if rank == "0":
    while not os.path.exists("ready-1"): time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("seconds", "grace", "code", "job_code"),
    [
        (1.0, math.inf, 75, 75),  # as long as it takes
        (60.0, 0.5, 75, 143),  # killed: nobody may say that everything is saved
        (0.0, math.inf, 143, 143),  # a second signal, by the rank's own account
        (0.0, math.inf, 0, 0),
    ],
)
def test_75_is_said_when_all_ranks_saved_alone(tmp_path, seconds, grace, code, job_code):
    job = python_job(tmp_path, SAVES.format(seconds=seconds, code=code), grace_seconds=grace)
    assert run_local(job) == job_code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses the kernel's parent-death signal")
def test_ranks_die_with_a_killed_launcher(tmp_path, alive, wait_for):
    launcher, pids = start_launcher(tmp_path, "polite", wait_for)
    launcher.kill()
    launcher.wait(15)
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_the_watcher_of_other_systems_ends_an_orphan(tmp_path, alive, wait_for):
    code = (
        "import subprocess, sys, os, time\n"
        'child = \'import os, time; open("t", "w").write(str(os.getpid())); os.rename("t", "pid"); time.sleep(60)\'\n'
        "subprocess.Popen([sys.executable, '-S', '-m', 'kdscale_launch.parent_watch', str(os.getpid()), "
        "sys.executable, '-S', "
        "'-c', child])\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(LAUNCH)}
    )
    assert wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    parent.kill()
    parent.wait(15)
    assert wait_for(lambda: not alive(pid))
