"""benchmarks/gpu_session.sh: all parts run even when one fails, which the script's end says. Python is a stand-in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in -c*cuda*) exit "$NO_GPU";; "-m pytest"*) echo "2 failed"; exit "$FAILS";; esac
"""


def session(tmp_path: Path, *, gpu: bool, fails: bool) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    calls = tmp_path / "calls"
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "NO_GPU": str(int(not gpu)),
        "FAILS": str(int(fails)),
        "TOKENS": "1M",
    }
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), "/teacher", "/text.jsonl", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done, [line for line in calls.read_text().splitlines() if not line.startswith("-c")]


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_runs_and_a_failure_is_named(tmp_path: Path, fails: bool) -> None:
    done, calls = session(tmp_path, gpu=True, fails=fails)
    assert [call.split()[:3] for call in calls] == [
        ["-m", "pytest", "-m"],
        ["benchmarks/kernels/run.py", "--device", "cuda"],
        ["benchmarks/distill/packed_attention.py", "--device", "cuda"],
        ["benchmarks/distill/trl_gkd.py", "--teacher", "/teacher"],
        ["-m", "kdscale.cli.main", "run"],
    ]
    assert "--set distill.tokens=1M --set distill.seq_len=1024" in calls[4]
    assert done.returncode == int(fails)
    assert ("failed: tests" in done.stdout) == fails
    assert "2 failed" in (tmp_path / "out" / "tests.log").read_text()
    assert (tmp_path / "out" / "distil.log").exists()


def test_without_a_gpu_its_parts_have_not_passed(tmp_path: Path) -> None:
    done, calls = session(tmp_path, gpu=False, fails=False)
    assert [call.split()[0] for call in calls] == ["benchmarks/distill/trl_gkd.py", "-m"]
    assert done.returncode == 1
    assert "failed: tests kernels attention" in done.stdout
