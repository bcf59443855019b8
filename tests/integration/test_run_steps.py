"""Progressive pruning: each step from the student of the one before, resumable, one report at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdscale.runs.digests import digest_file

STEPS = """
steps:
  - {name: wide, prune: {ffn: 96}, distill: {tokens: 1536}}
"""


def events(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [f"{row['stage']} {row['event']}" for row in rows if row["event"] == "done"]


def test_two_steps_to_one_report(kdscale: Callable[..., Any], tiny_config: Path) -> None:
    tiny_config.write_text(tiny_config.read_text() + STEPS)
    run = tiny_config.parent / "run"
    step = run / "steps" / "1-wide"
    outcome = kdscale("distill", tiny_config)
    assert outcome.code == 0, outcome.err
    assert kdscale("report", tiny_config).code == 0
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (step, run)]
    assert [plan["student"]["ffn"] for plan in plans] == [96, 64]
    assert plans[1]["teacher"] == plans[0]["student"]
    made_from = {
        stage: json.loads((run / "stages" / f"{stage}.json").read_text())["made_from"]["files"]["teacher"]
        for stage in ("data", "importance", "plan", "prune", "distill")
    }
    assert made_from["distill"]["config.json"] == made_from["data"]["config.json"]  # learns from the original, ...
    assert made_from["distill"]["model.safetensors"] != made_from["prune"]["model.safetensors"]
    assert "generation_config.json" in made_from["data"]
    assert made_from["importance"] == made_from["plan"] == made_from["prune"] != made_from["data"]
    assert made_from["prune"]["model.safetensors"] == digest_file(
        step / "student" / "model.safetensors"
    )  # ... cuts this
    assert (step / "data").resolve() == run / "data"
    assert not (step / "eval").exists()

    facts = json.loads((run / "report" / "report.json").read_text())
    assert [found["name"] for found in facts["steps"]] == ["wide", "this student"]
    assert facts["steps"][0]["tokens"] == 1536
    assert facts["steps"][0]["perplexity_after"] > 1
    assert facts["original_params"] == plans[0]["teacher_params"]
    assert facts["capacity"]["teacher_params"] == plans[0]["teacher_params"]["total"]
    assert "ffn 128 → 96" in (run / "report" / "report.html").read_text(encoding="utf-8")

    before = events(step), events(run)
    assert before[0] == [f"{stage} done" for stage in ("importance", "plan", "prune", "distill")]
    again = kdscale("distill", tiny_config)
    assert "nothing to do" in again.err
    assert (events(step), events(run)) == before
    assert kdscale("status", run).out.count("done") == 4 + 6


def test_an_impossible_step_is_refused_before_any_work(kdscale: Callable[..., Any], tiny_config: Path) -> None:
    tiny_config.write_text(tiny_config.read_text() + STEPS.replace("ffn: 96", "ffn: 32"))  # the last one wants 64
    outcome = kdscale("run", tiny_config)
    assert outcome.code == 2
    assert "at most the teacher's 32" in outcome.err
    assert not (tiny_config.parent / "run").exists()
