"""Agents, cluster and restarts, with real processes and an ssh that stays on this machine."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale_launch import STOPPED_EXIT_CODE, Host, HostConnections, HostsJob, JobFailed, Task, run_hosts

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
HOSTS = (Host("one", 1), Host("two", 1))


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def task(code: str, tmp_path: Path, **settings) -> Task:
    settings = {"master_addr": "127.0.0.1", "master_port": 1, "log_dir": str(tmp_path / "logs"), **settings}
    return Task(python(code), **settings)


def test_every_rank_gets_its_place_and_the_first_one_is_heard(cluster, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "EXTRA")
    heard = []
    code = f"import os; print(*(os.environ.get(n) for n in {names}))"
    outcome = cluster.run(task(code, tmp_path, env={"EXTRA": "it's $HOME"}), heard.append)
    assert outcome.ok
    assert outcome.codes == {0: 0, 1: 0, 2: 0}
    assert outcome.said[0] == "0 0 3 1 127.0.0.1 it's $HOME"
    assert [outcome.said[rank].split()[:4] for rank in (1, 2)] == [["1", "0", "3", "2"], ["2", "1", "3", "2"]]
    assert "".join(heard).strip() == outcome.said[0]
    assert (tmp_path / "logs" / "rank-2.log").read_text().strip() == outcome.said[2]


def test_an_agent_runs_one_command_after_another(cluster, tmp_path):
    first = cluster.run(task("print(1)", tmp_path, ranks=False))
    second = cluster.run(task("import os; print(os.environ['KDSCALE_HOST_INDEX'])", tmp_path, ranks=False))
    assert (sorted(first.said.values()), sorted(second.said.values())) == (["1", "1"], ["0", "1"])


def test_the_cause_is_shown_before_its_effects(cluster, tmp_path):
    code = """
import os, time, pathlib
if os.environ["RANK"] == "2":
    pathlib.Path("cause").touch()
    raise ValueError("no such tensor")
while not pathlib.Path("cause").exists(): time.sleep(0.01)
raise RuntimeError("Connection closed by peer [127.0.0.1]:4")
"""
    outcome = cluster.run(task(code, tmp_path))
    first = outcome.first()
    assert (first.rank, first.host, first.code) == (2, 1, 1)
    text = outcome.describe()
    assert text.startswith("host two, rank 2: left with exit code 1")
    assert text.index("no such tensor") < text.index("then:") < text.index("rank 0")
    assert "Traceback" in text


def test_ranks_that_would_hang_are_ended_with_the_one_that_failed(cluster, tmp_path, alive):
    code = """
import os, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective, where no handler runs
open("pid-" + os.environ["RANK"], "w").write(str(os.getpid()))
if os.environ["RANK"] == "1":
    while not os.path.exists("pid-0") or not os.path.exists("pid-2"): time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    outcome = cluster.run(task(code, tmp_path, grace=0.5))
    assert [failure.code for failure in outcome.failures] == [-signal.SIGKILL]
    assert "was killed by signal 9" in outcome.describe()
    assert not any(alive(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(3))


def test_a_command_that_cannot_start_is_an_error_of_its_host(cluster, tmp_path):
    outcome = cluster.run(Task(("no-such-program",), log_dir=str(tmp_path / "logs")))
    assert not outcome.ok
    assert "host one: cannot start 'no-such-program'" in outcome.describe()


def test_a_deadline_ends_everything(cluster, tmp_path):
    outcome = cluster.run(task("import time; time.sleep(100)", tmp_path, deadline=0.3))
    assert "not done within 0.3 s" in outcome.describe()


def test_clocks_of_one_machine_agree(cluster):
    skews = cluster.clock_skews()
    assert sorted(skews) == [0, 1]
    assert all(abs(skew) <= uncertainty + 0.05 for skew, uncertainty in skews.values())


def test_a_lost_host_is_named(cluster, tmp_path):
    code = """
import os, signal, time
if os.environ["RANK"] == "1": os.kill(os.getppid(), signal.SIGKILL)
time.sleep(100)
"""
    outcome = cluster.run(task(code, tmp_path, grace=0.5))
    assert outcome.describe().startswith("host two: lost: the connection ended")
    assert set(cluster.lost) == {1}


def test_a_silent_host_is_lost_after_the_deadline(reach, tmp_path):
    code = """
import os, signal, time
if os.environ["RANK"] == "1": open("agent", "w").write(str(os.getppid())); os.kill(os.getppid(), signal.SIGSTOP)
time.sleep(100)
"""
    with HostConnections(HOSTS, replace(reach, dead_after=2.0)) as cluster:
        assert cluster.connect() == {}
        try:
            outcome = cluster.run(task(code, tmp_path, grace=0.5))
            assert "host two: lost: no sign of life for 2 s" in outcome.describe()
        finally:
            os.kill(int((tmp_path / "agent").read_text()), signal.SIGKILL)


def test_a_host_lost_before_the_command_is_a_failure(reach, tmp_path, wait_for):
    with HostConnections(HOSTS, reach) as cluster:
        assert cluster.connect() == {}
        victim = task("import os; print(os.getppid())", tmp_path, ranks=False)
        os.kill(int(cluster.run(victim).said[1]), signal.SIGKILL)
        assert wait_for(lambda: cluster.clock_skews(1).keys() == {0})
        outcome = cluster.run(task("pass", tmp_path))
        assert "host two: lost" in outcome.describe()


def test_output_arrives_whole_however_much_there_is(cluster, tmp_path):
    heard = []
    outcome = cluster.run(task("for n in range(30_000): print('→ é', n)", tmp_path), heard.append)
    assert outcome.ok
    assert "".join(heard) == "".join(f"→ é {n}\n" for n in range(30_000))


def test_a_terminal_that_takes_no_output_does_not_end_the_job(reach, tmp_path):
    paused = []

    def output(text: str) -> None:
        if not paused:
            paused.append(text)
            time.sleep(3.5)  # Ctrl-S, or a pager: much longer than silence may last

    with HostConnections(HOSTS, replace(reach, dead_after=1.5)) as cluster:
        assert cluster.connect() == {}
        outcome = cluster.run(task("import time; print(1, flush=True); time.sleep(3)", tmp_path), output)
    assert paused
    assert outcome.ok, outcome.describe()


def test_hosts_that_cannot_be_reached_say_why(reach):
    with HostConnections([Host("here", 1), Host("gone-7", 1)], replace(reach, connect_seconds=1.0)) as cluster:
        assert cluster.connect() == {1: "ssh: connect to host gone-7: no route"}


def test_ranks_end_when_the_launcher_is_killed(reach, tmp_path, alive, wait_for):
    launcher = f"""
from kdscale_launch import HostConnections, Host, SshSettings, Task
child = "import os, time; open('t', 'w').write(str(os.getpid())); os.rename('t', 'pid'); time.sleep(100)"
settings = SshSettings({sys.executable!r}, {str(tmp_path)!r}, {str(LAUNCH)!r}, {reach.ssh!r})
with HostConnections([Host("one", 1)], settings) as cluster:
    cluster.connect()
    cluster.run(Task(({sys.executable!r}, "-S", "-c", child), log_dir={str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-S", "-c", launcher], env={**os.environ, "PYTHONPATH": str(LAUNCH)})
    assert wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    process.kill()
    process.wait(15)
    assert wait_for(lambda: not alive(pid))


# --- restarts and signals


def job(reach, tmp_path: Path, code: str, **settings) -> HostsJob:
    settings = {"grace": 5.0, "master_addr": "127.0.0.1", "host_seconds": 20.0, **settings}
    return HostsJob(HOSTS, python(code), reach, str(tmp_path / "logs"), **settings)


def run(wanted: HostsJob, received: list[int] | None = None) -> tuple[int, str]:
    said: list[str] = []
    code = run_hosts(wanted, received if received is not None else [], said.append, lambda text: None)
    return code, "\n".join(said)


BREAKS_TWICE = """
import os, signal
if os.environ["RANK"] == "1":
    open("tries", "a").write("x")
    if os.path.getsize("tries") < 3: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_broken_job_starts_again(reach, tmp_path):
    code, said = run(job(reach, tmp_path, BREAKS_TWICE, max_restarts=2))
    assert code == 0
    assert "restart 2 of 2" in said
    assert "host two, rank 1: was killed by signal 9" in said
    assert len(list((tmp_path / "logs").glob("*/rank-1.log"))) == 3


def test_restarts_are_counted(reach, tmp_path):
    with pytest.raises(JobFailed, match=r"attempt 2 of 2.*\n.*rank 1: was killed by signal 9") as caught:
        run(job(reach, tmp_path, BREAKS_TWICE, max_restarts=1))
    assert caught.value.exit_code == 1


def test_an_error_that_would_come_again_is_not_tried_again(reach, tmp_path):
    code = "import os, sys; open('tries-' + os.environ['RANK'], 'a').write('x'); sys.exit(4)"
    with pytest.raises(JobFailed) as caught:
        run(job(reach, tmp_path, code, max_restarts=3, final_codes=frozenset({4})))
    assert caught.value.exit_code == 4
    assert (tmp_path / "tries-0").read_text() == "x"


SAVES = """
import os, signal, sys, time
def stop(number, frame): open("saved-" + os.environ["RANK"], "w").close(); {leave}
signal.signal(signal.SIGTERM, stop)
open("ready-" + os.environ["RANK"], "w").close()
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("leave", "job_code"),
    [
        (f"sys.exit({STOPPED_EXIT_CODE})", STOPPED_EXIT_CODE),
        ("signal.signal(15, signal.SIG_DFL), os.kill(os.getpid(), 15)", STOPPED_EXIT_CODE),  # it had not begun yet
        ("sys.exit(3)", 128 + signal.SIGTERM),
    ],
)
def test_sigterm_lets_every_rank_save(reach, tmp_path, wait_for, leave, job_code):
    received: list[int] = []

    def stop() -> None:
        assert wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
        received.append(signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, said = run(job(reach, tmp_path, SAVES.format(leave=leave), max_restarts=3), received)
    thread.join()
    assert code == job_code
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))
    assert ("not every rank stopped" in said) == (job_code != STOPPED_EXIT_CODE)


def test_a_rank_stopped_from_elsewhere_leaves_the_job_to_be_started_again(reach, tmp_path):
    code = f"import sys; sys.exit({STOPPED_EXIT_CODE})"
    assert run(job(reach, tmp_path, code))[0] == STOPPED_EXIT_CODE


# --- fewer hosts

SHRINKS = """
import os, signal, sys
seen = open("seen", "a")
seen.write(os.environ["WORLD_SIZE"] + os.environ["RANK"] + " "); seen.flush()
if os.environ["WORLD_SIZE"] == "1":
    os.unlink("away-{lost}"); sys.exit("breaks again")
if not os.path.exists("once"):
    if os.environ["RANK"] != "{rank}": signal.pause()
    open("once", "w"); open("away-{lost}", "w"); os.kill(os.getppid(), signal.SIGKILL)
"""


@pytest.fixture
def reach_with_absences(reach, tmp_path):
    """A host whose `away-NAME` exists cannot be reached."""
    script = Path(reach.ssh[0])
    refusal = f'[ -e "{tmp_path}/away-$1" ] && {{ echo no route >&2; exit 255; }}'
    text = script.read_text().replace("\nshift\n", f"\n{refusal}\nshift\n")
    script.write_text(text)
    return reach


@pytest.mark.parametrize(("rank", "lost"), [(1, "two"), (0, "one")])
def test_a_job_goes_on_with_fewer_hosts_and_with_all_when_they_are_back(reach_with_absences, tmp_path, rank, lost):
    code = SHRINKS.format(rank=rank, lost=lost)
    wanted = job(reach_with_absences, tmp_path, code, max_restarts=2, host_seconds=1.0, smaller={1: python(code)})
    assert run(wanted)[0] == 0
    said = (tmp_path / "seen").read_text().split()
    assert sorted(said[:2]) == sorted(said[3:]) == ["20", "21"]
    assert said[2] == "10"  # alone, as rank 0


def test_it_says_which_hosts_it_goes_on_without(reach_with_absences, tmp_path):
    (tmp_path / "away-two").touch()
    reach = replace(reach_with_absences, connect_seconds=5.0)  # host one's agent must have started by then
    code, said = run(job(reach, tmp_path, "pass", smaller={1: python("pass")}))
    assert code == 0
    assert said == "going on with 1 of 2 hosts (1 ranks), without\n  - two: no route"
    with pytest.raises(JobFailed, match="two: no route"):
        run(job(replace(reach, connect_seconds=0.5), tmp_path, "pass"))


# --- what is executed


def test_the_remote_command_survives_two_shells(reach, tmp_path):
    folder = tmp_path / "it's; a $(folder)"
    folder.mkdir()
    odd = replace(reach, cwd=str(folder))
    *flags, name, remote = odd.command(Host("one", 1))
    assert name == "one"
    assert shlex.split(remote)[:2] == ["cd", str(folder)]
    assert "ServerAliveInterval=1" in flags
    with HostConnections([Host("one", 1)], odd) as cluster:
        assert cluster.connect() == {}
        outcome = cluster.run(Task(python("import os; print(os.getcwd())"), ranks=False))
        assert outcome.said == {0: str(folder)}


def test_no_secret_is_on_a_command_line(cluster, tmp_path):
    code = "import os; print(open(f'/proc/{os.getppid()}/cmdline').read(), os.environ['HF_TOKEN'])"
    outcome = cluster.run(task(code, tmp_path, env={"HF_TOKEN": "hf_0"}))
    line, token = outcome.said[0].rsplit(" ", 1)
    assert token == "hf_0"
    assert "kdscale_launch.hosts.agent" in line
    assert "hf_0" not in line
