"""A rank's command line: anything unknown is one message and exit code 2, before any work."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale.jobs import rank
from kdscale.pipeline.spawn import PLACE_VARIABLE


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: x\nrun_dir: {tmp_path}/run\nteacher: {{path: {tmp_path}}}\nprune: {{ffn: 64}}\n")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "got:      nothing"),
        (("--accept-changes",), "expected: CONFIG"),
        (("CONFIG", "--unitl=distill"), "--unitl=distill"),
        (("CONFIG", "--until=distil"), "got:      distil"),
        (("CONFIG", "distill.no_such=1"), "no_such"),
    ],
)
def test_unknown_words_are_refused(
    arguments: tuple[str, ...], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank.main([config if item == "CONFIG" else item for item in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "message"), [(None, "a launcher must set"), ("first", "RANK: expected a number")])
def test_variables_that_a_launcher_must_set(
    number: str | None, message: str, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", number), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert rank.main([config]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("until", "in_job"), [("prune", False), ("distill", True)])
def test_a_job_that_prepares_has_no_ranks_to_wait_for(
    until: str, in_job: bool, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(PLACE_VARIABLE, raising=False)
    seen: list[bool] = []

    def run(*_: object, **__: object) -> None:
        seen.append(os.environ.pop(PLACE_VARIABLE, None) is not None)

    monkeypatch.setattr(rank, "run_until", run)
    assert rank.main([config, f"--until={until}", "distill.processes=1"]) == 0
    assert seen == [in_job]
