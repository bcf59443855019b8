"""A gate ends a command with an exit code of its own, when all stages are done, and again the next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.cli import run as commands
from kdscale.cli import tables
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import ERRORS_BY_CODE, GateError
from kdscale.pipeline import runner
from kdscale.pipeline.stage import Stage, StageContext
from kdscale.runs.folder import Artifact, RunFolder
from kdscale.runtime.progress import Reporter

MEASURED, REPORT = Artifact("measured.txt"), Artifact("report.txt")


def writer(artifact: Artifact) -> Any:
    def run(context: StageContext) -> dict[str, Any]:
        context.run.at(artifact).write_text("done")
        return {}

    return run


def refuse(config: Config, run: RunFolder) -> None:
    raise GateError("bias.fail_if: grew", got=run.at(REPORT).read_text())


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of two stages, the first of which has a gate."""
    stages = [
        Stage(name="measure", title="measure", run=writer(MEASURED), writes=(MEASURED,), gate=refuse),
        Stage(name="show", title="show", run=writer(REPORT), reads=(MEASURED,), writes=(REPORT,)),
    ]
    monkeypatch.setattr(runner, "stages_until", lambda last, config: stages)
    monkeypatch.setattr(runner, "check_before_work", lambda *_: (tmp_path, []))
    monkeypatch.setattr(runner, "student_parameters", lambda *_: 0)
    tree = {"name": "t", "run_dir": str(tmp_path / "run"), "teacher": {"path": "t"}, "prune": {"ffn": 64}}
    return build_config(tree, "test")


def test_all_is_written_before_the_gate_ends_the_command(config: Config, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(GateError, match="got:      done"):
            runner.run_until(config, "show", Reporter(quiet=True))
    assert {path.stem for path in (tmp_path / "run" / "stages").glob("*.json")} == {"measure", "show"}
    assert ERRORS_BY_CODE[16] is GateError and not GateError.worth_retrying


def test_the_results_are_shown_all_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Path, str]] = []
    monkeypatch.setattr(commands, "load", lambda name, overrides: config)
    monkeypatch.setattr(tables, "results", lambda folder, stage: shown.append((folder, stage)))
    with pytest.raises(GateError):
        commands._run_until("show", "config.yaml", None, False)
    assert shown == [(Path(config.run_dir), "show")]
