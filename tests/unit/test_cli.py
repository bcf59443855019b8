"""The command line's promises: quick where it can be, and one message for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOLLM = ROOT / "tests" / "fixtures" / "teachers" / "smollm2-135m-instruct"

PROBE = """
import sys
from kdscale.cli.main import main
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
heavy = {"torch", "transformers", "deepspeed", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def run(*args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    sources = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    start = ["-c", code] if code else ["-m", "kdscale.cli.main"]
    return subprocess.run(
        [sys.executable, *start, *args], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": sources, "COLUMNS": "120"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("run", "--help"),
        ("launch", "--help"),
        ("launch", "demo", "--torchrun", "--slots", "2", "--set", "distill.micro_batch=1", "--dry-run"),
        ("--version",),
        ("plan", "demo", "--shapes-only", "--set", f"teacher.path={SMOLLM}"),
        ("plan-cluster", "demo", "--set", f"teacher.path={SMOLLM}"),
    ],
)
def test_these_commands_load_nothing_heavy(args: tuple[str, ...]) -> None:
    done = run(*args, code=PROBE)
    assert done.returncode == 0, done.stderr


def test_a_plan_of_shapes_shows_what_becomes_of_the_model() -> None:
    done = run("plan", "demo", "--shapes-only", "--set", f"teacher.path={SMOLLM}")
    assert done.returncode == 0, done.stderr
    assert "134.5 M" in done.stdout
    assert "1536" in done.stdout
    assert "704" in done.stdout
    assert "experts" not in done.stdout  # a dense model has none


def test_plan_cluster_prints_what_fits_and_writes_the_lines(tmp_path: Path) -> None:
    file = tmp_path / "planned.yaml"
    done = run(
        "plan-cluster", "demo", "--set", f"teacher.path={SMOLLM}", "--gpus-per-node", "2", "--tokens", "10B", "--gpu",
        "h200", "--stage", "2", "--write", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 NVIDIA H200" in done.stdout
    assert "chosen" in done.stdout
    assert "activations" in done.stdout
    assert done.stdout.endswith(file.read_text())
    assert "  processes: 2\n" in file.read_text()
    assert "  zero_stage: 2\n" in file.read_text()


def test_a_teacher_and_a_target_are_enough_for_a_plan() -> None:
    done = run("plan", "--teacher", str(SMOLLM), "--target-params", "50%", code=PROBE)
    assert done.returncode == 0, done.stderr
    assert "shapes meet" in done.stdout
    assert "134.5 M" in done.stdout
    assert done.stdout.endswith(f"to go on: kdscale init --teacher {SMOLLM}\n")


def test_the_status_of_no_run_says_nothing_of_configs() -> None:
    assert "config" not in run("status", "no-such-run").stderr


def test_a_name_that_the_system_refuses_is_one_message() -> None:
    done = run("export", "x" * 5000)
    assert (done.returncode, "Traceback" in done.stderr, len(done.stderr) < 1000) == (12, False, True)
    assert "File name too long" in done.stderr


def test_the_status_of_a_run_that_has_not_begun_says_how_to_start_it(tmp_path: Path) -> None:
    config = tmp_path / "my run.yaml"
    config.write_text(f"name: t\nrun_dir: {tmp_path}/run\nteacher: {{path: t}}\nprune: {{ffn: 8}}\n")
    assert f"to do:    kdscale run '{config}' starts it" in run("status", str(config)).stderr


@pytest.mark.parametrize(
    ("args", "needle"),
    [
        (("rnu",), "No such command"),
        (("run",), "Missing argument"),
        (("run", "no-such-config"), "shipped configs"),
        (("run", "demo", "--set", "seed=x"), "seed: input should be a valid integer"),
        (("run", "demo", "--set", "teacher.path=/nowhere"), "teacher.path"),
        (("status", "no-such-run"), "there is no run in no-such-run"),
        (("plan",), "--teacher MODEL and a target"),
        (("plan", "--teacher", str(SMOLLM), "--target-decode", "50%"), "give a CONFIG"),
        (("get-teacher", "gpt-9", "/tmp/x"), "gpt-9"),
        (("plan-cluster", "demo", "--gpu", "h1000"), "h100, h200"),
        (("plan-cluster", "demo", "--gpu-memory", "many"), "--gpu-memory"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_two(args: tuple[str, ...], needle: str) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
