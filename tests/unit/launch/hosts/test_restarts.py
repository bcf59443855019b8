"""Jobs that start again, stop, and go on with fewer hosts."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale_launch import STOPPED_EXIT_CODE, Host, HostsJob, JobFailed, run_hosts

HOSTS = (Host("one", 1), Host("two", 1))


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def job(ssh, tmp_path: Path, code: str, **settings) -> HostsJob:
    settings = {"grace_seconds": 5.0, "master_addr": "127.0.0.1", "host_seconds": 20.0, **settings}
    return HostsJob(HOSTS, python(code), ssh, str(tmp_path / "logs"), **settings)


def run(hosts_job: HostsJob, received: list[int] | None = None) -> tuple[int, str]:
    messages: list[str] = []
    code = run_hosts(hosts_job, received if received is not None else [], messages.append, lambda text: None)
    return code, "\n".join(messages)


BREAKS_TWICE = """
import os, signal
if os.environ["RANK"] == "1":
    open("tries", "a").write("x")
    if os.path.getsize("tries") < 3: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_broken_job_starts_again(ssh, tmp_path):
    code, messages = run(job(ssh, tmp_path, BREAKS_TWICE, max_restarts=2))
    assert code == 0
    assert "restart 2 of 2" in messages
    assert "host two, rank 1: was killed by signal 9" in messages
    assert len(list((tmp_path / "logs").glob("*/rank-1.log"))) == 3


def test_restarts_are_counted(ssh, tmp_path):
    with pytest.raises(JobFailed, match=r"attempt 2 of 2.*\n.*rank 1: was killed by signal 9") as caught:
        run(job(ssh, tmp_path, BREAKS_TWICE, max_restarts=1))
    assert caught.value.exit_code == 1


def test_an_error_that_would_come_again_is_not_tried_again(ssh, tmp_path):
    code = "import os, sys; open('tries-' + os.environ['RANK'], 'a').write('x'); sys.exit(4)"
    with pytest.raises(JobFailed) as caught:
        run(job(ssh, tmp_path, code, max_restarts=3, final_codes=frozenset({4})))
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
def test_sigterm_lets_every_rank_save(ssh, tmp_path, wait_for, leave, job_code):
    received: list[int] = []

    def stop() -> None:
        assert wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
        received.append(signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, messages = run(job(ssh, tmp_path, SAVES.format(leave=leave), max_restarts=3), received)
    thread.join()
    assert code == job_code
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))
    assert ("not every rank stopped" in messages) == (job_code != STOPPED_EXIT_CODE)


def test_a_rank_stopped_from_elsewhere_leaves_the_job_to_be_started_again(ssh, tmp_path):
    code = f"import sys; sys.exit({STOPPED_EXIT_CODE})"
    assert run(job(ssh, tmp_path, code))[0] == STOPPED_EXIT_CODE


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
def ssh_with_absences(ssh, tmp_path):
    """A host whose `away-NAME` exists cannot be reached."""
    script = Path(ssh.program[0])
    refusal = f'[ -e "{tmp_path}/away-$1" ] && {{ echo no route >&2; exit 255; }}'
    text = script.read_text().replace("\nshift\n", f"\n{refusal}\nshift\n")
    script.write_text(text)
    return ssh


@pytest.mark.parametrize(("rank", "lost"), [(1, "two"), (0, "one")])
def test_a_job_goes_on_with_fewer_hosts_and_with_all_when_they_are_back(ssh_with_absences, tmp_path, rank, lost):
    code = SHRINKS.format(rank=rank, lost=lost)
    elastic = job(ssh_with_absences, tmp_path, code, max_restarts=2, host_seconds=1.0, fewer_hosts={1: python(code)})
    assert run(elastic)[0] == 0
    seen = (tmp_path / "seen").read_text().split()
    assert sorted(seen[:2]) == sorted(seen[3:]) == ["20", "21"]
    assert seen[2] == "10"  # alone, as rank 0


def test_it_says_which_hosts_it_goes_on_without(ssh_with_absences, tmp_path):
    (tmp_path / "away-two").touch()
    ssh = replace(ssh_with_absences, connect_seconds=5.0)  # host one's agent must have started by then
    code, messages = run(job(ssh, tmp_path, "pass", fewer_hosts={1: python("pass")}))
    assert code == 0
    assert messages == "going on with 1 of 2 hosts (1 ranks), without\n  - two: no route"
    with pytest.raises(JobFailed, match="two: no route"):
        run(job(replace(ssh, connect_seconds=0.5), tmp_path, "pass"))
