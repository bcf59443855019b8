"""Adapters trained beside frozen weights, in whole distillations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.errors import Interrupted
from kdscale.models.loading import load_model
from kdscale.runs.metrics_log import read_metrics

LORA: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}, "tokens": 4 * 4 * 48, "validate_every": 4,
    "checkpoint_every": 2,
}  # fmt: skip
WEIGHTS = Path("student") / "model.safetensors"


@pytest.fixture(scope="module")
def whole(distil: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lora")
    return folder, distil(folder, **LORA, zero_stage=0)


def logits(model: Any, data_dir: Path) -> torch.Tensor:
    (batch, *_) = eval_batches(TokenStore.open(data_dir).split("heldout"), 48, 2, 96)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch.input_ids_BS).logits
    return found


def test_the_student_is_the_pruned_one_with_its_adapter_which_peft_reads_too(
    whole: tuple[Path, Any], student_dir: Path, data_dir: Path
) -> None:
    from peft import PeftModel

    folder, rows = whole
    before, after = load_file(student_dir / "model.safetensors"), load_file(folder / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name or "down_proj.weight" in name}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(changed)
    options: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    pruned, merged = load_model(student_dir, **options), load_model(folder / "student", **options)
    start = logits(pruned, data_dir)
    adapted: Any = PeftModel.from_pretrained(pruned, folder / "adapter")
    assert torch.allclose(logits(adapted, data_dir), logits(merged, data_dir), atol=2e-5)
    assert not torch.allclose(start, logits(merged, data_dir), atol=1e-3)
    first, last = (row["loss"] for row in rows if row["kind"] == "validation")
    assert last < first
    assert "rank 4, alpha 8, of q_proj, down_proj" in (folder / "student" / "README.md").read_text()


def test_a_checkpoint_holds_the_adapters_alone(whole: tuple[Path, Any]) -> None:
    (file,) = sorted((whole[0] / "checkpoints").iterdir())[-1].glob("rank-*.safetensors")
    names = {name.split(":", 2)[2] for name in load_file(file)}
    assert len(names) == 3 * 2 * 2 and all(".lora_A.default" in name or ".lora_B.default" in name for name in names)
    (module,) = {name.rsplit(".lora_")[0] for name in names if "layers.2" in name and "q_proj" in name}
    assert module == "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 3, "gradient_checkpointing": "full"}])
def test_every_stage_trains_the_same_and_a_killed_run_goes_on_with_the_same_bits(
    distil: Callable[..., Any], whole: Any, tmp_path: Path, dies_at_step: Callable[..., Any], settings: dict[str, Any]
) -> None:
    with dies_at_step(3, Interrupted):
        distil(tmp_path / "killed", **LORA, **settings)
    rows = distil(tmp_path / "killed", **LORA, **settings)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole[1]], abs=5e-6)
    alone = distil(tmp_path / "whole", **LORA, **settings)
    assert [row["loss"] for row in rows] == [row["loss"] for row in alone]
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_base_teaches_itself_without_a_copy(distil: Callable[..., Any], tmp_path: Path, student_dir: Path) -> None:
    """Before the first step it is the student: no divergence. Then the text moves the student away from it."""
    both = [{"name": "token_divergence", "targets": "full", "ce_weight": 0.5}]
    rows = distil(tmp_path, **LORA, zero_stage=1, teacher_placement="base", objectives=both)
    first, *_, last = [row for row in rows if row["kind"] == "validation"]
    assert first["kd"] == pytest.approx(0.0, abs=1e-6) and first["top1_agree"] == 1.0
    assert last["kd"] > 1e-4 and last["ce"] < first["ce"]


def test_what_the_student_writes_is_written_with_its_adapters(distil: Callable[..., Any], tmp_path: Path) -> None:
    own = {"every": 2, "prompt_tokens": 8, "max_new_tokens": 8, "objectives": [{"name": "policy_gradient"}]}
    rows = distil(tmp_path, **LORA, dtype="float32", on_policy={**own, "validate_prompts": 2})
    ratios = [row["on_policy_ratio"] for row in rows if row["kind"] == "train"]
    assert ratios[0] == pytest.approx(1.0, abs=1e-4) and ratios[2] == pytest.approx(1.0, abs=1e-4)  # written anew
    assert abs(ratios[1] - 1.0) > 1e-4


@pytest.mark.long
def test_two_ranks_that_share_all_weights_train_as_one_does_and_one_goes_on_from_them(
    run_parallel: Callable[..., None], make_config: Callable[..., Any], whole: Any, tmp_path: Path, student_dir: Path,
    tiny_llama_dir: Path, data_dir: Path,
) -> None:  # fmt: skip
    phases: list[dict[str, Any]] = [{"processes": 2, "zero_stage": 3}, {"processes": 1, "zero_stage": 1}]
    run = tmp_path / "shared"
    run.mkdir()
    job = {
        "run_dir": str(run), "student_dir": str(student_dir), "teacher_dir": str(tiny_llama_dir),
        "data_dir": str(data_dir),
        "phases": [
            {"config": make_config(**LORA, **settings).resolved(), "until": until}
            for settings, until in zip(phases, (3, None), strict=True)
        ],
    }  # fmt: skip
    run_parallel(tmp_path, [job])
    rows = list(read_metrics(run / "logs" / "metrics.jsonl"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole[1]], abs=1e-5)
    ours, alone = (load_file(folder / WEIGHTS) for folder in (run, whole[0]))
    assert all(torch.allclose(ours[name], alone[name], atol=1e-4) for name in alone)
