"""What a run says about itself: time split, MFU, memory, profile, the documents behind a spike, and one step again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdscale.data.batches import PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill.load_models import Folders
from kdscale.distill.objectives.token_divergence import TokenDivergence
from kdscale.distill.replay import replay
from kdscale.distill.telemetry.clock import PHASES
from kdscale.errors import ConfigError
from kdscale.models.documents import Documents
from kdscale.runtime.progress import Reporter
from kdscale.sizing.flops import ModelFlops, step_flops
from kdscale.weights import read_config

BAD_STEP, PEAK = 7, 1e11  # the step (from 1) that one sequence spoils
WATCHED = {
    "spikes": {"window": 8, "after": 4}, "profile": {"steps": [2, 3], "shapes": True}, "peak_flops": PEAK,
    "zero_stage": 2,
}  # fmt: skip


@pytest.fixture
def loader(make_config, data_dir) -> PackedLoader:
    cfg = make_config().distill
    return PackedLoader(TokenStore.open(data_dir).split("train"), cfg.seq_len, cfg.global_batch, cfg.micro_batch, 5)


@pytest.fixture
def spoilt(loader, monkeypatch) -> int:
    """The number of the sequence whose loss is high, wherever it appears as the last one of its micro-batch."""
    number = (BAD_STEP - 1) * 4 + 3
    labels_S = torch.from_numpy(loader.sequence(number).labels_S)
    bad_N, real = labels_S[labels_S != -100], TokenDivergence.__call__

    def loss(self, student, targets, batch):
        total, terms = real(self, student, targets, batch)
        return (total + 1e4 if torch.equal(batch.labels_N[-len(bad_N) :], bad_N) else total), terms

    monkeypatch.setattr(TokenDivergence, "__call__", loss)
    return number


def tree(folder: Path) -> dict[str, bytes]:
    return {str(item.relative_to(folder)): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


def test_a_bad_batch_is_named_and_can_be_run_again(
    distil, spoilt, loader, make_config, tiny_llama_dir, student_dir, data_dir, tmp_path
):
    rows = [row for row in distil(tmp_path, **WATCHED) if row["kind"] == "train"]
    # speed: phases lie within the step, communication within the phases; MFU is FLOPs over time over the peak
    flops = [ModelFlops.of(read_config(folder)) for folder in (tiny_llama_dir, student_dir)]
    for row in rows:
        assert all(row[f"seconds_{phase}"] > 0 for phase in PHASES)
        assert sum(row[f"seconds_{phase}"] for phase in PHASES) <= row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(4 * 48 / row["seconds"])
        lengths = [n for batch in loader.step(row["step"] - 1) for n in Documents.of(batch.position_ids_BS).lengths]
        done = step_flops(*flops, 4 * 48, row["labels"], lengths)
        assert row["mfu"] == pytest.approx(done / row["seconds"] / PEAK)
        assert row["peak_memory_bytes"] > 50e6 and row["peak_memory_rank"] == 0
    # profile
    profile = tmp_path / "logs" / "profile"
    trace = json.loads((profile / "steps-2-3-rank-0.trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "aten::mm" in (profile / "steps-2-3-rank-0.operators.txt").read_text()
    # the spike, and nothing else, with its documents first
    assert [row["step"] for row in rows if row.get("spike")] == [BAD_STEP]
    bad = loader.describe(BAD_STEP - 1)[3]
    assert bad["number"] == spoilt
    named = rows[BAD_STEP - 1]["documents"]
    assert all(f"{document} (" in named for document in bad["documents"])
    (about,) = [json.loads(line) for line in (tmp_path / "logs" / "bad_batches.jsonl").read_text().splitlines()]
    assert about["micro_batches"][1]["loss"] > about["limit"] > about["micro_batches"][0]["loss"]
    assert spoilt in [item["number"] for item in about["micro_batches"][1]["sequences"]]
    # again, alone: the newest checkpoint before it is step 6's
    before, folders = tree(tmp_path), Folders(tiny_llama_dir, student_dir, data_dir, tmp_path)
    settings = {"nearest": False, "reporter": Reporter(quiet=True)}
    found = replay(make_config(**WATCHED), folders, BAD_STEP, max_steps=0, **settings)
    assert (found["checkpoint_step"], found["of_this_step"], found["same_bits"]) == (6, True, True)
    assert found["grad_norm"] == pytest.approx(rows[BAD_STEP - 1]["grad_norm"], rel=1e-4)
    assert found["gradient_norms"].keys() >= {"layer 0 attention", "layer 2 ffn", "embed_tokens"}
    worst = max(found["sequences"], key=lambda item: item["loss"])
    assert worst["number"] == spoilt
    assert [document["id"] for document in worst["documents"]] == bad["documents"]
    assert all(document["text"] for document in worst["documents"])
    # a step whose weights were never stored: the steps between are trained again, or it is refused, or said
    early = replay(make_config(**WATCHED), folders, 2, max_steps=1, **settings)
    assert (early["checkpoint_step"], early["same_bits"]) == (0, True)
    with pytest.raises(ConfigError, match="1 steps after the nearest one, which is of step 0"):
        replay(make_config(**WATCHED), folders, 2, max_steps=0, **settings)
    nearest = replay(make_config(**WATCHED), folders, 2, max_steps=0, nearest=True, reporter=Reporter(quiet=True))
    assert (nearest["weights_of_step"], nearest["of_this_step"], nearest["same_bits"]) == (0, False, False)
    with pytest.raises(ConfigError, match="1 to 8"):
        replay(make_config(**WATCHED), folders, 9, max_steps=9, **settings)
    assert tree(tmp_path) == before
