"""Which tensor on disk is which part of which parameter, for every way that families join and stack them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from kdscale.errors import CheckpointError
from kdscale.models.parameter_map import ParameterRange, ParameterReader, trained_tensors
from kdscale.weights import Checkpoint
from tests.integration.prune.family_table import save_teacher


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "mixtral", "qwen3_moe", "olmoe"])
def test_every_tensor_is_its_range_of_the_models_parameter(tmp_path: Path, model_type: str) -> None:
    folder = save_teacher(model_type, tmp_path / "teacher")
    parameters = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    source, reader = Checkpoint.open(folder), ParameterReader.open(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    trained = trained_tensors(source, shapes, {})
    assert trained.keys() == set(source.names)
    for name, span in trained.items():
        values = parameters[span.name].detach().reshape(-1)[span.offset : span.offset + span.length]
        assert torch.equal(values, source.tensor(name).reshape(-1)), name
    assert reader.names() == set(parameters)
    for name, parameter in parameters.items():
        values = torch.empty(reader.numel(name) - 3)
        reader.fill(name, 2, values)  # across the borders of the tensors on disk
        assert torch.equal(values, parameter.detach().reshape(-1)[2:-1]), name


def test_a_tied_parameter_that_the_model_calls_by_its_heads_name_is_the_embedding(tmp_path: Path) -> None:
    """As XLM-R's: what is trained under that name goes into the embedding's tensor."""
    folder = save_teacher("xlm-roberta", tmp_path / "teacher")
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    head, source = "lm_head.decoder.weight", Checkpoint.open(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert head in shapes
    trained = trained_tensors(source, shapes, {})
    assert trained.keys() == set(source.names)
    assert trained["roberta.embeddings.word_embeddings.weight"] == ParameterRange(head, 0, 64 * 32)
    values, reader = torch.empty(64 * 32), ParameterReader.open(folder)
    assert reader.numel(head) == values.numel()
    reader.fill(head, 0, values)
    assert torch.equal(values, model.lm_head.decoder.weight.detach().flatten())


@pytest.fixture
def llama(model_dir: Callable[..., Path]) -> tuple[Path, dict[str, tuple[int, ...]]]:
    folder = model_dir()
    tensors = load_file(folder / "model.safetensors")
    return folder, {name: tuple(value.shape) for name, value in tensors.items()}


def test_names_of_a_tied_parameter_are_one_range_and_buffers_none(llama: Any) -> None:
    folder, shapes = llama
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "inv_freq": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    trained = trained_tensors(Checkpoint.open(folder), shapes, {"lm_head.weight": "model.embed_tokens.weight"})
    assert trained["lm_head.weight"] == trained["model.embed_tokens.weight"]
    assert trained["model.norm.weight"] == ParameterRange("model.norm.weight", 0, 8)
    assert "inv_freq" not in trained


def test_a_trained_parameter_that_would_not_be_written_is_refused(llama: Any) -> None:
    folder, shapes = llama
    source = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"not \(wholly\) on disk"):
        trained_tensors(source, {**shapes, "model.extra.weight": (2,)}, {})
    with pytest.raises(CheckpointError, match=r"parameter model\.layers\.0\.mlp\.up_proj\.weight"):
        trained_tensors(source, {**shapes, "model.layers.0.mlp.up_proj.weight": (8, 12)}, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 17}))
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight"):
        trained_tensors(Checkpoint.open(folder), shapes, {})
