"""Merging adapters, for families that store their maps in other ways, beside peft's own merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdscale.config.distill.lora import LoraConfig
from kdscale.distill.checkpoint.merge_adapters import AdaptersOnDisk
from kdscale.distill.parallel.checks import check_lora
from kdscale.errors import CheckpointError, ConfigError, TrainingError
from kdscale.models.lora.adapters import add_adapters, without_adapters
from kdscale.models.parameter_map import ParameterRange
from kdscale.weights import Checkpoint

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
_KV = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**_KV, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
    "phi3": transformers.Phi3Config(**_KV, original_max_position_embeddings=64, max_position_embeddings=64),
    "mixtral": transformers.MixtralConfig(**_KV, num_local_experts=2, num_experts_per_tok=1),
}
LORA = LoraConfig(rank=3, alpha=5.0, rank_stabilised=True)
MAPS = {"llama": 7 * 2, "gpt2": 4 * 2, "phi3": 4 * 2, "mixtral": 4 * 2}  # a mixture's attention alone


class Values:
    """What a checkpoint's reader gives of a model's parameters."""

    def __init__(self, model: torch.nn.Module):
        self.values = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def fill(self, quantity: str, span: ParameterRange, out: torch.Tensor) -> None:
        assert quantity == "master"
        out.copy_(self.values[span.name].flatten()[span.offset : span.offset + span.length])


def trained(folder: Path, family: str) -> tuple[Any, Values]:
    """A model with adapters that do something, and these; the plain model is in `folder`."""
    torch.manual_seed(1)
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    model.save_pretrained(folder)
    add_adapters(model, LORA, check_lora(LORA, folder), seed=2)
    values = Values(model)
    for value in values.values.values():
        torch.nn.init.normal_(value, std=0.3)
    return model, values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_are_those_that_the_adapted_model_computes_with(tmp_path: Path, family: str) -> None:
    model, values = trained(tmp_path, family)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with without_adapters(model):
            before = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, adapted)  # switched on again
    source = Checkpoint.open(tmp_path)
    adapters = AdaptersOnDisk(source, LORA, {name: tuple(value.shape) for name, value in values.values.items()})
    assert sum(name in adapters for name in source.names) == MAPS[family]
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name in source.names:
        if name in adapters:
            whole = torch.cat(list(adapters.merged(source, name, values)))  # type: ignore[arg-type]
            parameter = dict(merged.named_parameters()).get(name)
            parameter = merged.get_parameter(f"transformer.{name}") if parameter is None else parameter
            parameter.data.copy_(whole)
    with torch.no_grad():
        found = merged(input_ids=ids).logits
    assert torch.allclose(found, adapted, atol=2e-5)
    assert (found - before).abs().max() > 1e-2


def test_only_adapters_are_trainable_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    _, values = trained(tmp_path, "llama")
    assert len(values.values) == 2 * MAPS["llama"] and all(".lora_" in name for name in values.values)
    first, second, other = (transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]) for _ in range(3))
    for model, seed in ((first, 7), (second, 7), (other, 8)):
        add_adapters(model, LORA, check_lora(LORA, tmp_path), seed)
    name = "model.layers.1.mlp.down_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    _, values = trained(tmp_path, "llama")
    source, shapes = Checkpoint.open(tmp_path), {name: tuple(value.shape) for name, value in values.values.items()}
    with pytest.raises(CheckpointError, match=r"28 matrices of rank 4"):
        AdaptersOnDisk(source, LoraConfig(rank=4), shapes)
    values.values["model.layers.0.self_attn.q_proj.lora_A.default.weight"][0, 0] = torch.nan
    adapters = AdaptersOnDisk(source, LORA, shapes)
    with pytest.raises(TrainingError, match=r"q_proj.lora_A.default.weight has NaN"):
        list(adapters.merged(source, "model.layers.0.self_attn.q_proj.weight", values))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_poj", "gate"])
def test_a_target_that_is_no_linear_map_is_refused_by_name(tmp_path: Path, target: str) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"(?s)q_proj, k_proj.*{target}.*a head \(tied"):
        check_lora(LoraConfig(targets=("q_proj", target)), tmp_path)
