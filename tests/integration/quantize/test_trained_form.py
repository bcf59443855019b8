"""A form whose student is trained on, on its grid: killed and gone on with, and the model that its folder holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenStore
from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import load_model
from kdscale.pipeline.runner import run_until
from kdscale.quantize import calibrated
from kdscale.runs.folder import RunFolder, training_metrics
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from kdscale.weights.integer_grid import IntegerGrid

QUIET = Reporter(quiet=True)
LABEL = "int4_distilled_g32"
TRAINED = (
    "quantize.forms=[{name: int4, method: rtn, group: 32}, {name: int4, method: distilled, group: 32, %stokens: 2048, "
    "lr_share: 1.0, distill: {objectives: [{name: cross_entropy}]}}]"
)


@pytest.fixture
def config_in(tiny_config: Path, tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    """The config of a run in a folder of this name, on a teacher in bf16, whose rounding is the same on disk."""
    pytest.importorskip("compressed_tensors")
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_llama_dir, teacher)
    tensors = {name: value.bfloat16() for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))

    def make(name: str, more: str = "") -> Config:
        sets = [f"teacher.path={teacher}", "distill.dtype=bfloat16", "runtime.threads=1", TRAINED % more]
        return load_config(tiny_config, [*sets, f"run_dir={tmp_path / name}"])

    return make


def held_out_loss(folder: Path, data: Path) -> float:
    model: Any = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu")).requires_grad_(False)
    total, count = 0.0, 0
    for batch in eval_batches(TokenStore.open(data).split("heldout"), 64, 2, 128):
        hidden_BSH = final_hidden(model, batch.input_ids_BS, batch.position_ids_BS)
        kept_BS = batch.labels_BS != IGNORED_LABEL
        logits_NV, labels_N = head_of(model).logits(hidden_BSH[kept_BS]), batch.labels_BS[kept_BS]
        total += float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"))
        count += len(labels_N)
    return total / count


def logit_change(folder: Path, run: RunFolder) -> float:
    """The squared change of the student's logits when the weights in `folder` are rounded."""
    student: Any = load_model(run.student, dtype=torch.float32, device=torch.device("cpu")).requires_grad_(False)
    rounded: Any = load_model(folder, dtype=torch.float32, device=torch.device("cpu")).requires_grad_(False)
    for layer in rounded.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = IntegerGrid(4, 32).nearest(module.weight.data, torch.bfloat16)
    (batch, *_) = eval_batches(TokenStore.open(run.data).split("heldout"), 64, 2, 128)
    one, two = (model(input_ids=batch.input_ids_BS).logits for model in (student, rounded))
    return float((one - two).square().mean())


@pytest.mark.long
def test_a_killed_training_goes_on_and_the_form_is_the_model_that_was_trained(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dies_when_a_checkpoint_is_sealed: Callable[[], AbstractContextManager[None]],
) -> None:  # fmt: skip
    """The training dies when its first checkpoint is there; with its text in an order of its own."""
    config = config_in("whole")
    run_until(config, "distill", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True)
    run_until(config, "quantize", QUIET)
    run, model = RunFolder(tmp_path / "whole"), Path("quantized") / LABEL
    rows = list(read_metrics(run.at(training_metrics(LABEL))))
    last = next(row["loss"] for row in reversed(rows) if row["kind"] == "validation")
    assert held_out_loss(run.path / model, run.data) == pytest.approx(last, abs=3e-3)
    assert abs(held_out_loss(run.quantized / "int4_rtn_g32", run.data) - last) > 1e-2
    assert read_json(run.path / model / "config.json")["quantization_config"]["format"] == "pack-quantized"
    assert not run.work.exists()
    assert config.quantize is not None
    inner = config.training_on_grid(config.quantize.trained[0])
    assert (inner.seed, inner.distill.tokens) == (config.seed + 1, 2048)

    layer_matrices = calibrated.layer_matrices

    def die_in_a_layer(config: Any, family: Any, layer: int) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return layer_matrices(config, family, layer)

    other = config_in("killed")
    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "layer_matrices", die_in_a_layer)
        with pytest.raises(KeyboardInterrupt):
            run_until(other, "quantize", QUIET)
    with dies_when_a_checkpoint_is_sealed():
        run_until(other, "quantize", QUIET)
    assert list((tmp_path / "killed" / "work").rglob("step-*"))
    start = tmp_path / "killed" / "work" / "quantize" / f"start-{LABEL}"
    assert logit_change(start, run) < 0.7 * logit_change(run.student, run)
    with pytest.raises(RunFolderError, match=r"model\.safetensors was changed"):  # it began elsewhere
        run_until(config_in("killed", "start: rtn, "), "quantize", QUIET)
    run_until(other, "quantize", QUIET)
    assert not run_until(other, "quantize", QUIET)
    one, two = (tmp_path / name / model / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
