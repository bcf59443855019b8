"""The commands of a service as their user sees them, on the real application."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI

from kdscale.cli.service.show import shown_verdict
from kdscale.cli.service.submit import exit_code_of
from kdscale.client import Patience, RunDetail, Verdict
from kdscale.files import write_json
from tests.unit.client.conftest import run_json
from tests.unit.service.client.conftest import SPEC

Commands = Callable[..., tuple[int, str]]


@pytest.fixture
def signed_in(commands: Commands, secret: str, tmp_path: Path) -> Commands:
    (tmp_path / "token").write_text(secret + "\n")
    code, printed = commands("login", "--token-file", "token")
    assert (code, secret in printed) == (0, False)
    return commands


@pytest.fixture
def config(tmp_path: Path) -> str:
    write_json(tmp_path / "tiny.yaml", SPEC)  # JSON is YAML
    return "tiny.yaml"


def submitted(commands: Commands, config: str, *options: str) -> str:
    code, printed = commands("submit", config, *options)
    assert code == 0, printed
    return re.search(r"as (\S+);", printed)[1]  # type: ignore[index]


def test_nothing_is_asked_without_a_token_and_a_wrong_one_is_not_kept(commands: Commands, tmp_path: Path) -> None:
    code, printed = commands("runs")
    assert (code, "kdscale login --server http://127.0.0.1:8765" in printed) == (2, True)
    (tmp_path / "token").write_text("kds_wrong")
    code, printed = commands("login", "--token-file", "token")
    assert (code, "kds_wrong" in printed, "opens nothing" in printed) == (10, False, True)
    assert not (tmp_path / "settings").exists()


def test_what_is_wrong_with_a_config_is_told_once_and_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"field": "teacher.path", "detail": "teacher.path", "got": "'no'", "hint": "get it"}
    estimate = {
        "cluster": {"nodes": 1, "gpus_per_node": 8, "gpu": "H100"}, "assumed": True, "fits": True, "setting": {},
        "gpu_bytes": 6e9, "tokens": 10, "tokens_per_second": 83_922_562.0, "days": 1.0,
    }  # fmt: skip
    told = {"valid": False, "refused": [refused], "notes": [], "estimate": estimate}
    assert not shown_verdict(Verdict.model_validate(told))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("teacher.path: got 'no', get it")
    assert "83.9 M tokens/s" in printed and "for 8 × H100, as no GPU" in printed


def test_a_run_is_submitted_listed_paused_resumed_cancelled_and_made_again(signed_in: Commands, config: str) -> None:
    run = submitted(signed_in, config, "--name", "first", "--set", "distill.tokens=10k", "--priority", "2")
    assert re.search(rf"{run}\s+first\s+queued\s+ada", signed_in("runs")[1])
    assert signed_in("pause", run) == (0, "first is paused (pause was asked for by ada)\n")
    assert signed_in("resume", run)[1].startswith("first is queued")
    assert signed_in("cancel", run)[1].startswith("first is cancelled")
    code, printed = signed_in("rerun", run, "--name", "second", "--set", "distill.tokens=20k")
    assert (code, "second is queued" in printed) == (0, True)
    shown = signed_in("runs", "--state", "cancelled")[1]
    assert "first" in shown and "second" not in shown
    assert "newest 1" in signed_in("runs", "--limit", "1")[1]
    code, printed = signed_in("runs", run)
    assert code == 0 and "of ada" in printed and "distill" in printed


def test_mistakes_are_one_message_and_an_exit_code(signed_in: Commands, config: str) -> None:
    run = submitted(signed_in, config)
    for arguments, code, words in (
        (("submit", config, "--set", "prune.foo=1"), 10, "prune.foo: unknown key"),
        (("submit", "missing.yaml"), 2, "does not exist"),
        (("submit", "nothing-of-this-name"), 10, "there is no config"),
        (("submit", config, "--target", "slurm"), 2, "KEY=VALUE"),
        (("runs", "--state", "asleep"), 2, "--state"),
        (("download", run, "student"), 2, "one of config.yaml"),
        (("pause", "../x"), 2, "kdscale runs lists them"),
        (("logs", "1hc9xqv3z-7m2k0ft"), 10, "there is no run"),
        (("runs", "--server", "http://example.org"), 2, "--insecure-http"),
    ):
        got, printed = signed_in(*arguments)
        assert (got, words in printed) == (code, True), printed
        assert "Traceback" not in printed


def test_a_config_is_checked_without_a_run(signed_in: Commands, config: str) -> None:
    assert signed_in("submit", config, "--check", "--set", "teacher.path=/etc")[0] == 2
    assert signed_in("runs")[1] == "no runs\n"


def test_files_are_downloaded_and_runs_compared(signed_in: Commands, config: str, app: FastAPI, tmp_path: Path) -> None:
    first, second = submitted(signed_in, config, "--name", "first"), submitted(signed_in, config, "--name", "second")
    student = app.state.settings.runs / first / "student"
    (student / "more").mkdir(parents=True)
    for name in ("a.bin", "more/b.bin"):
        (student / name).write_bytes(name.encode() * 1000)
    code, printed = signed_in("download", first)
    assert (code, "2 files, 15.0 kB: first/student" in printed) == (0, True), printed
    assert (tmp_path / "first" / "student" / "more" / "b.bin").read_bytes() == b"more/b.bin" * 1000
    assert signed_in("download", first, "student/a.bin", "--out", "there")[0] == 0
    assert (tmp_path / "there" / "student" / "a.bin").is_file()
    code, printed = signed_in("download", first, "../../runs")
    assert (code, "without . and .." in printed) == (2, True), printed
    code, printed = signed_in("compare", first, second)
    assert (code, "--server URL" in printed) == (2, True), printed
    code, printed = signed_in("compare", first, second, "--server", "http://127.0.0.1:8765")
    assert (code, f"/compare?run={first}&run={second}" in printed) == (0, True), printed


@pytest.mark.parametrize(
    ("state", "exit_code", "left_with"),
    [
        ("succeeded", 0, 0), ("succeeded", None, 0), ("failed", 6, 6), ("failed", None, 1), ("failed", -9, 1),
        ("cancelled", 75, 75), ("cancelled", None, 75),
    ],
)  # fmt: skip
def test_waiting_ends_with_the_exit_code_of_the_run(state: str, exit_code: int | None, left_with: int) -> None:
    assert exit_code_of(RunDetail.model_validate(run_json(state=state, exit_code=exit_code))) == left_with


def test_waiting_tells_every_change_and_ends_with_the_run(
    signed_in: Commands, config: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [("starting", {}), ("running", {}), ("running", {}), ("failed", {"reason": "no memory", "exit_code": 15})]

    def passing(_seconds: float) -> None:
        """What the scheduler does meanwhile."""
        run = app.state.runs.page().items[0]
        state, fields = changes.pop(0)
        if state != run.state:
            app.state.runs.move(run.id, state, **fields)

    monkeypatch.setattr("kdscale.client.Patience", functools.partial(Patience, sleep=passing))
    code, printed = signed_in("submit", config, "--wait")
    lines = ["tiny is queued", "tiny is starting", "tiny is running", "tiny is failed (no memory)"]
    assert (code, printed.splitlines()[1:]) == (15, lines)
