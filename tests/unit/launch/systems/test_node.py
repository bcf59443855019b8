"""A node that starts its own ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from kdscale_launch.systems import notes


def test_a_node_starts_its_share_of_the_ranks(tmp_path):
    code = "import os; open('r' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in " \
           "('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"  # fmt: skip
    launch = Path(__file__).resolve().parents[4] / "launch"
    command = [sys.executable, "-S", "-m", "kdscale_launch.systems.node", "--nodes", "3", "--slots", "2",
        "--node-rank-from",
               "JOB_COMPLETION_INDEX", "--log-dir", "logs", "--master-addr", "first", "--master-port", "9", "--",
               sys.executable, "-S", "-c", code]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(launch), "JOB_COMPLETION_INDEX": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"r{rank}").read_text() for rank in (4, 5)] == ["0 6 first 9", "1 6 first 9"]
    missing = subprocess.run(
        command, cwd=tmp_path, env={**environment, "JOB_COMPLETION_INDEX": "3"}, capture_output=True, check=False
    )
    assert missing.returncode == 2


def test_a_node_that_a_note_asks_to_stop_saves_and_says_so_in_a_note(tmp_path):
    """The job system sees 0, so that it does not start the node again."""
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open("ready", "w").close()
while True: time.sleep(0.02)
"""
    process = subprocess.Popen(_with_notes(code), cwd=tmp_path, env=_environment())
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    notes.ask_to_stop(tmp_path / "notes")
    assert process.wait(timeout=30) == 0
    assert notes.read_exit_codes(tmp_path / "notes") == {2: 75}
    (tmp_path / "ready").unlink()
    assert subprocess.run(_with_notes(code), cwd=tmp_path, env=_environment(), check=False).returncode == 0
    assert not (tmp_path / "ready").exists()  # started once more by the job system, it leaves at once


def test_a_node_that_breaks_says_so_in_a_note_too(tmp_path):
    done = subprocess.run(_with_notes("raise SystemExit(6)"), cwd=tmp_path, env=_environment(), check=False)
    assert done.returncode == 6
    assert notes.read_exit_codes(tmp_path / "notes") == {2: 6}


def test_the_node_that_broke_speaks_for_the_job(tmp_path):
    final = frozenset({2, 6})
    assert notes.job_exit_code({}, final) is None
    assert notes.job_exit_code({0: 0, 1: 0}, final) == 0
    assert notes.job_exit_code({0: 75, 1: 0}, final) == 75
    assert notes.job_exit_code({0: 1, 1: 6, 2: 8, 3: 75}, final) == 6
    assert notes.job_exit_code({0: 8, 1: 137}, final) == 8
    for name, text in (("exit-1", "6\n"), ("exit-2", ""), ("exit-3", "no"), ("exit-4", "999"), ("exit-x", "1")):
        (tmp_path / name).write_text(text)
    (tmp_path / "exit-5").mkdir()
    assert notes.read_exit_codes(tmp_path) == {1: 6}
    assert notes.read_exit_codes(tmp_path / "none") == {}


def _with_notes(code: str) -> list[str]:
    return [sys.executable, "-S", "-m", "kdscale_launch.systems.node", "--nodes", "3", "--slots", "1",
            "--node-rank-from", "JOB_COMPLETION_INDEX", "--log-dir", "logs", "--master-addr", "first",
            "--master-port", "9", "--notes", "notes", "--", sys.executable, "-S", "-c", code]  # fmt: skip


def _environment() -> dict[str, str]:
    launch = Path(__file__).resolve().parents[4] / "launch"
    return {**os.environ, "PYTHONPATH": str(launch), "JOB_COMPLETION_INDEX": "2"}
