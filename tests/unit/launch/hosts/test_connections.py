"""Connections and agents, with real processes and an ssh that stays on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from kdscale_launch import Host, HostConnections, Task

LAUNCH = Path(__file__).resolve().parents[4] / "launch"
HOSTS = (Host("one", 1), Host("two", 1))


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def task(code: str, tmp_path: Path, **settings) -> Task:
    settings = {"master_addr": "127.0.0.1", "master_port": 1, "log_dir": str(tmp_path / "logs"), **settings}
    return Task(python(code), **settings)


def test_every_rank_gets_its_place_and_the_first_one_is_heard(connections, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "EXTRA")
    output = []
    code = f"import os; print(*(os.environ.get(n) for n in {names}))"
    outcome = connections.run(task(code, tmp_path, env={"EXTRA": "it's $HOME"}), output.append)
    assert outcome.ok
    assert outcome.exit_codes == {0: 0, 1: 0, 2: 0}
    assert outcome.log_tails[0] == "0 0 3 1 127.0.0.1 it's $HOME"
    assert [outcome.log_tails[rank].split()[:4] for rank in (1, 2)] == [["1", "0", "3", "2"], ["2", "1", "3", "2"]]
    assert "".join(output).strip() == outcome.log_tails[0]
    assert (tmp_path / "logs" / "rank-2.log").read_text().strip() == outcome.log_tails[2]


def test_an_agent_runs_one_command_after_another(connections, tmp_path):
    first = connections.run(task("print(1)", tmp_path, per_slot=False))
    second = connections.run(task("import os; print(os.environ['KDSCALE_HOST_INDEX'])", tmp_path, per_slot=False))
    assert (sorted(first.log_tails.values()), sorted(second.log_tails.values())) == (["1", "1"], ["0", "1"])


def test_the_cause_is_shown_before_its_effects(connections, tmp_path):
    code = """
import os, time, pathlib
if os.environ["RANK"] == "2":
    pathlib.Path("cause").touch()
    raise ValueError("no such tensor")
while not pathlib.Path("cause").exists(): time.sleep(0.01)
raise RuntimeError("Connection closed by peer [127.0.0.1]:4")
"""
    outcome = connections.run(task(code, tmp_path))
    first = outcome.first()
    assert (first.rank, first.host, first.exit_code) == (2, 1, 1)
    text = outcome.describe()
    assert text.startswith("host two, rank 2: left with exit code 1")
    assert text.index("no such tensor") < text.index("then:") < text.index("rank 0")
    assert "Traceback" in text


def test_ranks_that_would_hang_are_ended_with_the_one_that_failed(connections, tmp_path, alive):
    code = """
import os, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective, where no handler runs
open("pid-" + os.environ["RANK"], "w").write(str(os.getpid()))
if os.environ["RANK"] == "1":
    while not os.path.exists("pid-0") or not os.path.exists("pid-2"): time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    outcome = connections.run(task(code, tmp_path, grace_seconds=0.5))
    assert [failure.exit_code for failure in outcome.failures] == [-signal.SIGKILL]
    assert "was killed by signal 9" in outcome.describe()
    assert not any(alive(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(3))


def test_a_command_that_cannot_start_is_an_error_of_its_host(connections, tmp_path):
    outcome = connections.run(Task(("no-such-program",), log_dir=str(tmp_path / "logs")))
    assert not outcome.ok
    assert "host one: cannot start 'no-such-program'" in outcome.describe()


def test_a_deadline_ends_everything(connections, tmp_path):
    outcome = connections.run(task("import time; time.sleep(100)", tmp_path, deadline_seconds=0.3))
    assert "not done within 0.3 s" in outcome.describe()


def test_clocks_of_one_machine_agree(connections):
    skews = connections.clock_skews()
    assert sorted(skews) == [0, 1]
    assert all(abs(skew) <= uncertainty + 0.05 for skew, uncertainty in skews.values())


def test_a_lost_host_is_named(connections, tmp_path):
    code = """
import os, signal, time
if os.environ["RANK"] == "1": os.kill(os.getppid(), signal.SIGKILL)
time.sleep(100)
"""
    outcome = connections.run(task(code, tmp_path, grace_seconds=0.5))
    assert outcome.describe().startswith("host two: lost: the connection ended")
    assert set(connections.lost) == {1}


def test_a_silent_host_is_lost_after_the_deadline(ssh, tmp_path):
    code = """
import os, signal, time
if os.environ["RANK"] == "1": open("agent", "w").write(str(os.getppid())); os.kill(os.getppid(), signal.SIGSTOP)
time.sleep(100)
"""
    with HostConnections(HOSTS, replace(ssh, dead_after=2.0)) as connections:
        assert connections.connect() == {}
        try:
            outcome = connections.run(task(code, tmp_path, grace_seconds=0.5))
            assert "host two: lost: no sign of life for 2 s" in outcome.describe()
        finally:
            os.kill(int((tmp_path / "agent").read_text()), signal.SIGKILL)


def test_a_host_lost_before_the_command_is_a_failure(ssh, tmp_path, wait_for):
    with HostConnections(HOSTS, ssh) as connections:
        assert connections.connect() == {}
        victim = task("import os; print(os.getppid())", tmp_path, per_slot=False)
        os.kill(int(connections.run(victim).log_tails[1]), signal.SIGKILL)
        assert wait_for(lambda: connections.clock_skews(1).keys() == {0})
        outcome = connections.run(task("pass", tmp_path))
        assert "host two: lost" in outcome.describe()


def test_output_arrives_whole_however_much_there_is(connections, tmp_path):
    output = []
    outcome = connections.run(task("for n in range(30_000): print('→ é', n)", tmp_path), output.append)
    assert outcome.ok
    assert "".join(output) == "".join(f"→ é {n}\n" for n in range(30_000))


def test_a_terminal_that_takes_no_output_does_not_end_the_job(ssh, tmp_path):
    paused = []

    def output(text: str) -> None:
        if not paused:
            paused.append(text)
            time.sleep(3.5)  # Ctrl-S, or a pager: much longer than silence may last

    with HostConnections(HOSTS, replace(ssh, dead_after=1.5)) as connections:
        assert connections.connect() == {}
        outcome = connections.run(task("import time; print(1, flush=True); time.sleep(3)", tmp_path), output)
    assert paused
    assert outcome.ok, outcome.describe()


def test_hosts_that_cannot_be_reached_say_why(ssh):
    with HostConnections([Host("here", 1), Host("gone-7", 1)], replace(ssh, connect_seconds=1.0)) as connections:
        assert connections.connect() == {1: "ssh: connect to host gone-7: no route"}


def test_ranks_end_when_the_launcher_is_killed(ssh, tmp_path, alive, wait_for):
    launcher = f"""
from kdscale_launch import HostConnections, Host, SshSettings, Task
child = "import os, time; open('t', 'w').write(str(os.getpid())); os.rename('t', 'pid'); time.sleep(100)"
settings = SshSettings({sys.executable!r}, {str(tmp_path)!r}, {str(LAUNCH)!r}, {ssh.program!r})
with HostConnections([Host("one", 1)], settings) as connections:
    connections.connect()
    connections.run(Task(({sys.executable!r}, "-S", "-c", child), log_dir={str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-S", "-c", launcher], env={**os.environ, "PYTHONPATH": str(LAUNCH)})
    assert wait_for((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    process.kill()
    process.wait(15)
    assert wait_for(lambda: not alive(pid))


def test_no_secret_is_on_a_command_line(connections, tmp_path):
    code = "import os; print(open(f'/proc/{os.getppid()}/cmdline').read(), os.environ['HF_TOKEN'])"
    outcome = connections.run(task(code, tmp_path, env={"HF_TOKEN": "hf_0"}))
    line, token = outcome.log_tails[0].rsplit(" ", 1)
    assert token == "hf_0"
    assert "kdscale_launch.hosts.agent" in line
    assert "hf_0" not in line
