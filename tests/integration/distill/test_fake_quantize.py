"""A student trained on the grid that it will be stored on, in whole distillations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenStore
from kdscale.errors import ConfigError, Interrupted
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import load_model
from kdscale.weights.integer_grid import IntegerGrid

ON_GRID: dict[str, Any] = {
    "fake_quantize": {"bits": 4, "group": 32}, "tokens": 5 * 4 * 48, "validate_every": 5,
    "objectives": [{"name": "cross_entropy"}],
}  # fmt: skip
WEIGHTS = Path("student") / "model.safetensors"


@pytest.fixture(scope="module")
def student_in_bf16(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "pruned"
    shutil.copytree(student_dir, folder)
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def held_out_loss(folder: Path, data_dir: Path, dtype: torch.dtype, grid: IntegerGrid) -> float:
    """Of a student as it is stored, once its layers are quantised."""
    model: Any = load_model(folder, dtype=dtype, device=torch.device("cpu")).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            weight_OI = module.weight.detach()
            scales_OG = grid.scales(weight_OI)
            module.weight.data = grid.values(grid.integers(weight_OI, scales_OG), scales_OG)
    total, count = 0.0, 0
    for batch in eval_batches(TokenStore.open(data_dir).split("heldout"), 48, 2, 200):
        hidden_BSH = final_hidden(model, batch.input_ids_BS, batch.position_ids_BS)
        kept_BS = batch.labels_BS != IGNORED_LABEL
        total += float(torch.nn.functional.cross_entropy(
            head_of(model).logits(hidden_BSH[kept_BS]), batch.labels_BS[kept_BS], reduction="sum"))  # fmt: skip
        count += int(kept_BS.sum())
    return total / count


@pytest.mark.parametrize(("dtype", "zero_stage", "error"), [("float32", 0, 1e-6), ("bfloat16", 1, 3e-3)])
def test_the_last_validation_is_of_the_student_that_is_exported(
    distil: Callable[..., Any], tmp_path: Path, student_dir: Path, student_in_bf16: Path, data_dir: Path, dtype: str,
    zero_stage: int, error: float,
) -> None:  # fmt: skip
    pruned = student_in_bf16 if dtype == "bfloat16" else student_dir
    rows = distil(tmp_path, pruned, **ON_GRID, dtype=dtype, zero_stage=zero_stage)
    validation = [row["loss"] for row in rows if row["kind"] == "validation"][-1]
    found = {
        name: held_out_loss(tmp_path / "student", data_dir, getattr(torch, dtype), grid)
        for name, grid in {"same": IntegerGrid(4, 32), "other": IntegerGrid(4)}.items()
    }
    assert found["same"] == pytest.approx(validation, abs=error)
    assert abs(found["other"] - validation) > 2 * error


def test_stages_and_recomputing_change_nothing_and_a_killed_run_goes_on_with_the_same_bytes(
    distil: Callable[..., Any], tmp_path: Path, student_in_bf16: Path, dies_at_step: Callable[..., Any]
) -> None:
    """ZeRO-3 with nothing kept gathered and everything computed again is the hardest for what a layer reads."""
    hardest = {"zero_stage": 3, "zero": {"keep_gathered": 0}, "gradient_checkpointing": "full"}
    plain = distil(tmp_path / "plain", student_in_bf16, **ON_GRID, zero_stage=0)
    selective = {"zero_stage": 2, "gradient_checkpointing": "selective"}
    for name, settings in {"hardest": hardest, "selective": selective}.items():
        rows = distil(tmp_path / name, student_in_bf16, **ON_GRID, **settings)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], abs=5e-6)
    with dies_at_step(4, Interrupted):
        distil(tmp_path / "killed", student_in_bf16, **ON_GRID, **hardest)
    distil(tmp_path / "killed", student_in_bf16, **ON_GRID, **hardest)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "hardest" / WEIGHTS).read_bytes()


def test_a_group_that_does_not_divide_a_layer_is_refused_by_name(distil: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)group \(64\).*layers\.0\.self_attn\.q_proj: .*in_features=96"):
        distil(tmp_path, **{**ON_GRID, "fake_quantize": {"bits": 4, "group": 64}})
