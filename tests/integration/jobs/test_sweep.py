"""A sweep with its runs, as a user has it: what trials share is made once, and a trial's own error is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_trials_share_what_their_values_do_not_change(
    kdscale: Callable[..., Any], tiny_config: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {tiny_config}\nfolder: {tmp_path}/sweep\nsampler: grid\ntrials: 2\ntokens: 512\n"
        "search: {distill.optimizer.lr: [1.0e-3], prune.ffn: [64, 9999]}\n"
    )
    outcome = kdscale("sweep", sweep, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    facts = json.loads((tmp_path / "sweep/sweep.json").read_text())
    done, failed = sorted(facts["trials"], key=lambda trial: trial["draw"]["prune.ffn"])
    assert done["state"] == "complete" and done["value"] > 0
    assert failed["state"] == "failed" and "9999" in failed["message"]
    assert "failed" in outcome.out and "best.yaml" in outcome.err
    trial, base = tmp_path / f"sweep/trials/{done['number']:04d}", tmp_path / "sweep/base"
    assert (trial / "importance/scores.safetensors").samefile(base / "importance/scores.safetensors")
    events = [json.loads(line) for line in (trial / "events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "done"] == ["distill", "eval"]
