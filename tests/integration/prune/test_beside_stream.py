"""Layers that read more than the stream: an input of their own, and the keys and values of an earlier layer."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from kdscale.families import load_family
from kdscale.models.layer_stream import LayerStream
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.weights import Checkpoint, read_config
from tests.integration.prune.family_table import random_scores, save_teacher

CPU = torch.device("cpu")


def test_a_layer_reads_keys_and_values_of_the_last_one_that_is_left(teacher_class, tmp_path):
    """Gemma 4 E2B: layer 3 read those of layer 2, and reads those of layer 0 where that is gone."""
    kinds = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]
    folder = save_teacher("gemma4_text, small", tmp_path / "teacher", num_hidden_layers=5, layer_types=kinds)
    file, own = folder / "model.safetensors", "model.layers.{}.self_attn.k_proj.weight"
    tensors = load_file(file)  # published files have such tensors, which no model reads
    assert own.format(3) not in tensors
    save_file(tensors | {own.format(3): tensors[own.format(0)].clone()}, file, {"format": "pt"})
    assert len(Checkpoint.open(folder).verify_against(load_family(read_config(folder), "config.json"))) == 1
    teacher = teacher_class(folder)
    scores = random_scores(teacher.config, teacher.family)
    scores["layers.one_by_one"][:] = [3.0, 4.0, 1.0, 2.0, 5.0]
    plan = teacher.prune(tmp_path / "student", scores, layers=4, ffn=24, compensate="two_stream")
    assert plan.kept.layers == [0, 1, 3, 4]
    figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    assert max(figures.values()) < 1e-5
    # documents side by side in a row, layer by layer, and each alone in the whole model
    stream = LayerStream(teacher.config, teacher.family, teacher.checkpoint.tensor, dtype=torch.float32, device=CPU)
    model, (batch, *_) = load_model(folder, dtype=torch.float32, device=CPU), teacher.batches
    with torch.inference_mode():
        state = stream.embed([batch])[0]
        for layer in stream.layers():
            state = layer(state, batch.position_ids_BS)
        logits = stream.head()(stream.final_norm()(stream.stream(state)))
        alone = [model(input_ids=part).logits for part in (batch.input_ids_BS[:, :20], batch.input_ids_BS[:, 20:])]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
