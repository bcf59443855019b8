"""The command line's promises: quick where it can be, and one message for a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import ROOT, Commands, Outcome

SMOLLM = ROOT / "tests" / "fixtures" / "teachers" / "smollm2-135m-instruct"
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run("status", folder)` → exit code and what was printed, by a process that has loaded nothing heavy before."""
    commands = Commands(tmp_path_factory.mktemp("printed"), light=True)
    yield commands.call
    commands.close()


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
def test_these_commands_load_nothing_heavy(run: Run, args: tuple[str, ...]) -> None:
    done = run(*args, may_be_heavy=False)
    assert done.code == 0, done.err


def test_a_plan_of_shapes_shows_what_becomes_of_the_model(run: Run) -> None:
    done = run("plan", "demo", "--shapes-only", "--set", f"teacher.path={SMOLLM}")
    assert done.code == 0, done.err
    assert "134.5 M" in done.out
    assert "1536" in done.out
    assert "704" in done.out
    assert "experts" not in done.out  # a dense model has none


def test_plan_cluster_prints_what_fits_and_writes_the_lines(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "planned.yaml"
    done = run(
        "plan-cluster", "demo", "--set", f"teacher.path={SMOLLM}", "--gpus-per-node", "2", "--tokens", "10B", "--gpu",
        "h200", "--stage", "2", "--write", str(file),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "2 NVIDIA H200" in done.out
    assert "chosen" in done.out
    assert "activations" in done.out
    assert done.out.endswith(file.read_text())
    assert "  processes: 2\n" in file.read_text()
    assert "  zero_stage: 2\n" in file.read_text()


def test_a_teacher_and_a_target_are_enough_for_a_plan(run: Run) -> None:
    done = run("plan", "--teacher", str(SMOLLM), "--target-params", "50%", may_be_heavy=False)
    assert done.code == 0, done.err
    assert "shapes meet" in done.out
    assert "134.5 M" in done.out
    assert done.out.endswith(f"to go on: kdscale init --teacher {SMOLLM}\n")


def test_the_status_of_no_run_says_nothing_of_configs(run: Run) -> None:
    assert "config" not in run("status", "no-such-run").err


def test_a_name_that_the_system_refuses_is_one_message(run: Run) -> None:
    done = run("export", "x" * 5000)
    assert (done.code, "Traceback" in done.err, len(done.err) < 1000) == (12, False, True)
    assert "File name too long" in done.err


def test_the_status_of_a_run_that_has_not_begun_says_how_to_start_it(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "my run.yaml"
    config.write_text(f"name: t\nrun_dir: {tmp_path}/run\nteacher: {{path: t}}\nprune: {{ffn: 8}}\n")
    assert f"to do:    kdscale run '{config}' starts it" in run("status", str(config)).err


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
def test_mistakes_are_one_message_and_exit_code_two(run: Run, args: tuple[str, ...], needle: str) -> None:
    done = run(*args)
    assert done.code == 2, done.err
    assert needle in done.err
    assert "Traceback" not in done.err
