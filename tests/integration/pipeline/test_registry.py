"""A stage is one row: one added from outside is a command, and is in status, in the disk check and in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale.cli import tables
from kdscale.cli.main import make_app
from kdscale.config.distill.settings import DistillConfig
from kdscale.errors import RunFolderError
from kdscale.files import read_json, write_text
from kdscale.pipeline.stage import Facts, Stage, StageContext
from kdscale.pipeline.stages.distill import distill
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs import folder
from kdscale.runs.folder import KERNELS, Artifact, RunFolder

COUNTS = Artifact("counts.json")


def count_tokens(context: StageContext) -> Facts:
    tokens = read_json(context.run.data / "manifest.json")
    write_text(context.run.at(COUNTS), json.dumps({"keys": len(tokens)}))
    return {"keys": len(tokens)}


@pytest.fixture
def counting() -> Iterator[Stage]:
    stage = Stage(
        name="count", title="count the tokens", help="Count the tokens.", run=count_tokens,
        config=("seed",), reads=(folder.DATA,), writes=(COUNTS,), disk_bytes=lambda context, params: 1 << 60,
    )  # fmt: skip
    rows = dict(STAGES)
    STAGES.clear()
    STAGES.update({"data": rows["data"], "count": stage, **rows})
    yield stage
    STAGES.clear()
    STAGES.update(rows)


def call(*arguments: object) -> None:
    make_app()(list(map(str, arguments)), standalone_mode=False)


def test_a_stage_added_from_outside(counting: Stage, tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tiny_config.parent / "run")
    with pytest.raises(RunFolderError, match=r"count 1152921504\.6 GB"):
        call("count", tiny_config)
    STAGES["count"] = replace(counting, disk_bytes=None)
    call("count", tiny_config)
    assert set(read_json(run.status)["stages"]) == {"data", "count"}
    assert read_json(run.at(COUNTS))["keys"] > 1

    capfd.readouterr()
    call("--help")
    assert "Count the tokens." in capfd.readouterr().out
    tables.status(run.path)
    shown = [line.split()[:2] for line in capfd.readouterr().out.splitlines()]
    assert ["count", "done"] in shown and ["importance", "waiting"] in shown

    call("report", tiny_config)
    reported = read_json(run.report / "report.json")["stages"]
    assert [row["stage"] for row in reported] == ["data", "count"]


def test_a_distillation_whose_validations_were_not_finite_still_ends(tmp_path: Path, monkeypatch) -> None:
    """JSON has no NaN: such a row has no perplexity, which was a KeyError after all the work was done."""
    run = RunFolder(tmp_path)
    row = {"kind": "validation", "step": 5}
    context = type("Context", (), {"run": run, "config": None})()
    monkeypatch.setattr("kdscale.pipeline.stages.distill.run_on_ranks", lambda *args, **options: None)
    monkeypatch.setattr(type(context), "config", type("C", (), {"distill": DistillConfig()}))
    write_text(run.metrics, json.dumps(row) + "\n" + json.dumps({**row, "step": 9, "perplexity": 12.5}) + "\n")
    assert distill(context) == {"held-out perplexity": "not finite → 12.50"}
    write_text(run.metrics, json.dumps({**row, "perplexity": 12.5}) + "\n" + json.dumps({**row, "step": 9}) + "\n")
    assert distill(context) == {"held-out perplexity": "12.50 → not finite"}
    write_text(run.at(KERNELS), json.dumps({"obstacle": "rank 1: no C compiler"}))
    assert distill(context)["kernels"] == "torch, as rank 1: no C compiler"
