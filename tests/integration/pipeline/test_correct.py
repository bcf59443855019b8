"""The teacher's correction: before the pruning or beside it, killed and gone on with, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.files import read_json, write_text
from kdscale.pipeline.runner import run_until
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import CORRECTED, CORRECTION_METRICS, WEIGHTS, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

CORRECT = """
correct: {tokens: 1024, distill: {micro_batch: 1, optimizer: {lr: 2.0e-4}}}
runtime: {threads: 1}
"""
QUIET = Reporter(quiet=True)


def run_up_to(stage: str, config: Path) -> RunFolder:
    loaded = load_config(config)
    run_until(loaded, stage, QUIET)
    return RunFolder(Path(loaded.run_dir))


def test_a_killed_correction_goes_on_and_all_later_stages_see_its_teacher(
    tiny_config: Path,
    tiny_llama_dir: Path,
    dies_when_a_checkpoint_is_sealed: Callable[[], AbstractContextManager[None]],
) -> None:
    """The last checkpoint is there, but the process dies before the teacher is: nothing is trained twice."""
    config = tiny_config
    write_text(config, config.read_text() + CORRECT)
    with dies_when_a_checkpoint_is_sealed():
        run_up_to("correct", config)
    run = run_up_to("correct", config)
    rows = [row for row in read_metrics(run.at(CORRECTION_METRICS)) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 5))
    assert all("kd" not in row and row["ce"] == row["loss"] for row in rows)
    assert max(row["lr"] for row in rows) == 2e-4
    assert not run.work.exists()
    assert "The teacher, trained further on text alone" in (run.at(CORRECTED) / "README.md").read_text()

    run_up_to("report", config)
    corrected, original = (digest_tree(folder, WEIGHTS) for folder in (run.at(CORRECTED), tiny_llama_dir))
    assert corrected["config.json"] == original["config.json"]
    assert corrected["model.safetensors"] != original["model.safetensors"]
    made_from = {stage: read_json(run.stages / f"{stage}.json")["made_from"]["files"] for stage in (
        "correct", "importance", "plan", "prune", "distill", "eval")}  # fmt: skip
    for stage in ("importance", "plan", "prune", "distill"):
        assert made_from[stage]["teacher"]["model.safetensors"] == corrected["model.safetensors"], stage
    for stage in ("correct", "eval"):
        assert made_from[stage]["teacher"]["model.safetensors"] == original["model.safetensors"], stage
    evaluation = read_json(run.eval / "eval.json")
    assert list(evaluation["models"]) == ["teacher", "corrected", "pruned", "distilled"]
    assert "Corrected" in (run.report / "report.html").read_text(encoding="utf-8")
    assert not run_until(load_config(config), "report", QUIET)
