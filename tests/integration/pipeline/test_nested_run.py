"""A whole run on a model of several modalities: text alone is learnt, and the student is the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.load import load_config
from kdscale.files import read_json
from kdscale.pipeline.runner import run_until
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.integration.prune.nested_table import load_whole, save_whole

QUIET = Reporter(quiet=True)


@pytest.mark.long
def test_the_language_model_learns_and_the_rest_goes_along(
    tiny_config: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    teacher = save_whole("gemma3", tmp_path / "teacher", vocab_size=320, hidden_size=48)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama_dir / name, teacher / name)
    (teacher / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    quick = [
        f"teacher.path={teacher}", "prune={ffn: 32, hidden: 32, hidden_divisor: 16, ffn_divisor: 16}",
        "eval.efficiency=false", "eval.prompts=[]", "distill.tokens=1280",
    ]  # fmt: skip
    config = load_config(tiny_config, quick)
    assert run_until(config, "report", QUIET)
    run = RunFolder(Path(config.run_dir))
    before, pruned, after = (load_file(folder / "model.safetensors") for folder in (teacher, run.pruned, run.student))
    assert before.keys() == pruned.keys() == after.keys()
    vision = [name for name in before if name.startswith("vision_tower.")]
    assert len(vision) > 10
    assert all(torch.equal(before[name], after[name]) for name in vision)
    projector = "multi_modal_projector.mm_input_projection_weight"
    assert after[projector].shape == (16, 32)
    assert torch.equal(after[projector], pruned[projector])
    learnt = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[learnt], pruned[learnt])
    assert read_json(run.student / "preprocessor_config.json") == read_json(teacher / "preprocessor_config.json")
    text = load_whole(run.student).config.text_config
    assert (text.hidden_size, text.intermediate_size, text.head_dim) == (32, 32, 8)
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation"]
    assert rows[-1]["kd"] < rows[0]["kd"]
    card = (run.student / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "image-text-to-text" in card
    assert not run_until(config, "report", QUIET)
