"""`kdscale plan` as a user has it: targets as options, a table of candidates, and a plan.json that records them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import load_config
from kdscale.pipeline.runner import run_until
from kdscale.runtime.progress import Reporter

OPEN = ("prune.ffn=null", "prune.heads=null", "prune.tolerance=0.1")


def plan_in_process(config: Path, *overrides: str) -> dict[str, Any]:
    """`kdscale plan` without starting another interpreter; returns plan.json."""
    loaded = load_config(config, [*OPEN, *overrides])
    run_until(loaded, "plan", Reporter(quiet=True))
    plan: dict[str, Any] = json.loads((Path(loaded.run_dir) / "plan.json").read_text())
    return plan


def test_masked_candidates_are_compared_without_a_checkpoint(kdscale: Callable[..., Any], tiny_config: Path) -> None:
    run = tiny_config.parent / "run"
    search = (
        "prune.search.masked_tokens=128", "prune.axes=[ffn,heads,layers]", "prune.layer_method=block_influence",
        "prune.layer_repair=none",
    )  # fmt: skip
    options = [word for setting in (*OPEN, *search) for word in ("--set", setting)]
    outcome = kdscale("plan", tiny_config, *options, "--target-bytes", "70%", "--masked", "3")
    assert outcome.code == 0, outcome.err
    plan = json.loads((run / "plan.json").read_text())
    assert plan["methods"]["search"] == "masked"
    assert plan["target"]["kind"] == "bytes"
    assert plan["target"]["cost"] <= plan["target"]["wanted"]
    candidates = plan["candidates"]
    masked = [item["masked"] for item in candidates]
    assert [item is not None for item in masked] == [True] * 3 + [False] * (len(masked) - 3)
    divergences = [item["kl"] for item in masked[:3]]
    assert divergences == sorted(divergences)
    assert all(item["tokens"] > 100 and item["compensate"] == "ridge" for item in masked[:3])
    assert plan["student"]["ffn"] == candidates[0]["ffn"]
    assert plan["student"]["layers"] == candidates[0]["layers"]
    assert {path.name for path in run.iterdir()} <= {
        "config.yaml", "data", "events.jsonl", "importance", "plan.json", "stages", "status.json", "logs", ".lock",
    }  # fmt: skip
    for word in ("shapes meet 70%", "chosen", f"{divergences[0]:.4f}"):
        assert word in outcome.out

    run_until(load_config(run / "config.yaml"), "prune", Reporter(quiet=True))
    assert kdscale("report", run / "config.yaml").code == 0
    facts = json.loads((run / "report" / "report.json").read_text())
    assert facts["missing"] == ["distillation", "evaluation"]
    for who in ("teacher", "student"):
        parts = facts["components"]
        assert sum(part[who]["parameters"] for part in parts) == plan[f"{who}_params"]["total"]
    written = sum(part["student"]["bytes"] for part in facts["components"])
    assert written == candidates[0]["bytes"] == facts["expected"]["weight_bytes"]["student"]
    assert facts["expected"]["decode_speedup"] > 1
    rows = facts["repair"]["layers"]
    assert {row["layer"] for row in rows} == set(plan["kept"]["layers"])
    assert all(0 < row["after"] <= row["before"] < 1 for row in rows)
    assert facts["perplexity"]["after"] == pytest.approx(math.exp(masked[0]["loss"]))
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for words in ("Chosen by masked runs", "Residual error, layer by layer", "Cumulative importance", "run masked"):
        assert words in page


def test_a_latency_limit_is_measured_here(tiny_config: Path) -> None:
    run = tiny_config.parent / "run"
    plan = plan_in_process(
        tiny_config, "prune.target_decode=90%", "prune.axes=[layers]", "prune.search.context_tokens=16",
        "prune.search.masked_tokens=64",
    )  # fmt: skip
    assert plan["target"]["kind"] == "decode"
    assert plan["student"]["layers"] < 4
    assert plan["candidates"][0]["decode_ms"] == plan["target"]["cost"] > 0
    assert any("random weights on this machine" in warning for warning in plan["warnings"])
    assert len(json.loads((run / "speed.json").read_text())["shapes"]) == 1  # layers alone: one layer's shape


def test_finalists_are_distilled_and_halved(tiny_config: Path) -> None:
    run = tiny_config.parent / "run"
    options = (
        "prune.target_params=70%", "prune.search.masked_candidates=0", "prune.search.probe_tokens=256",
        "prune.search.probe_candidates=3", "prune.axes=[ffn,heads]", "prune.compensate=none",
        "distill.checkpoint_every=100", "distill.validate_every=100",
    )  # fmt: skip
    plan = plan_in_process(tiny_config, *options)
    assert plan["methods"]["search"] == "probes"
    probes = [[probe["tokens"] for probe in item["probes"]] for item in plan["candidates"]]
    assert probes == [[256, 512], [256, 512], [256]] + [[]] * (len(probes) - 3)
    last = [item["probes"][-1]["loss"] for item in plan["candidates"][:2]]
    assert 0 < last[0] <= last[1]
    results = sorted((run / "probes").glob("*/result-*.json"))
    assert len(results) == 5
    assert not list((run / "probes").glob("*/*.safetensors")) + list((run / "probes").glob("*/pruned"))

    # one result lost, as by a kill: that probe alone is run again, and gives the same loss
    lost = next(path for path in results if path.name == "result-256.json")
    before = json.loads(lost.read_text())
    lost.unlink()
    (run / "plan.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in results if path != lost}
    again = plan_in_process(tiny_config, *options)
    assert json.loads(lost.read_text()) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again == plan
