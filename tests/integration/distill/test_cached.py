"""Targets that are stored: the stage that writes them, and distillations from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.root import Config
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.targets import write_targets
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.teacher import online

Write = Callable[..., dict[str, Any]]
Distil = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def write(
    make_config: Callable[..., Config], tiny_llama_dir: Path, student_dir: Path, data_dir: Path, tmp_path: Path
) -> Write:
    """Runs the stage in `tmp_path/name`; returns its facts."""

    def run_stage(name: str, targets: dict[str, Any], **distill: Any) -> dict[str, Any]:
        run = RunFolder(tmp_path / name)
        run.path.mkdir(exist_ok=True)
        for link, target in ((run.data, data_dir), (run.pruned, student_dir)):
            if not link.exists():
                link.symlink_to(target)
        config = make_config(targets=targets, teacher_placement="cached", **distill)
        return dict(write_targets(StageContext(config, run, tiny_llama_dir, Reporter(quiet=True))))

    return run_stage


TOP_K = [{"name": "token_divergence", "top_k": 16}]
SAMPLED = [{"name": "token_divergence", "targets": "sampled", "draws": 20}]


@pytest.mark.parametrize(
    ("objectives", "codec"),
    [
        (TOP_K, {"name": "topk", "top_k": 16, "bits": 32}),
        (TOP_K, {"name": "topk", "top_k": 24, "bits": 32}),
        (SAMPLED, {"name": "sampled", "draws": 20}),
        (TOP_K, {"name": "hidden", "dtype": "float32"}),
    ],
    ids=["topk", "more entries than needed", "sampled", "hidden"],
)
def test_stored_targets_give_the_losses_of_an_online_teacher(
    distil: Distil, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: Any, codec: Any
) -> None:
    """Bit for bit where the codec is exact, and no weight of the teacher but its head is read."""
    here = distil(tmp_path / "here", objectives=objectives)
    targets = {"codec": codec, "micro_batch": 2}
    assert write("there", targets, objectives=objectives)["positions"] == "1,719"
    monkeypatch.setattr(online, "place_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    there = distil(tmp_path / "there", objectives=objectives, targets=targets, teacher_placement="cached")
    assert [row["loss"] for row in there] == [row["loss"] for row in here]
