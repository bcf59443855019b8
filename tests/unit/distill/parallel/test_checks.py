"""Models and lengths that ranks cannot share are refused before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdscale import families
from kdscale.distill.parallel.checks import check_sequence_parallel, unshareable_tensor
from kdscale.errors import ConfigError
from kdscale.families import decoder_types, load_family
from tests.integration.prune.family_table import tiny_config


@pytest.mark.parametrize(
    ("ranks", "seq_len", "heads", "kv_heads", "told"),
    [
        (3, 64, 6, 3, r"divisor of distill\.seq_len \(64\)"),
        (4, 64, 6, 2, "divisor of the teacher's 6 query heads"),
        (4, 64, 12, 3, "divisor or a multiple of the teacher's 3 kv heads"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, ranks, seq_len, heads, kv_heads, told):
    config = {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=told):
        check_sequence_parallel(ranks, seq_len, {"teacher": tmp_path})
    check_sequence_parallel(1, seq_len, {"teacher": tmp_path})


def test_ranks_share_the_sequences_of_a_soft_capped_attention_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma2")))
    check_sequence_parallel(2, 64, {"teacher": tmp_path})


@pytest.mark.parametrize(
    ("model_type", "told"), [("falcon_h1", "without recurrent mixers"), ("gpt_oss", "without attention sinks")]
)
def test_ranks_cannot_share_the_sequences_of_mixers_and_sinks(tmp_path, model_type, told):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(model_type)))
    with pytest.raises(ConfigError, match=told):
        check_sequence_parallel(2, 64, {"teacher": tmp_path})


SHAREABLE = {
    "cohere2", "ernie4_5", "exaone4", "gemma2", "gemma3_text", "granite", "hunyuan_v1_dense", "llama", "ministral",
    "ministral3", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3",
}  # fmt: skip


@pytest.mark.parametrize("name", decoder_types())
def test_the_tensors_of_a_family_say_whether_ranks_can_share_its_layers(name):
    config = tiny_config(name)
    unshareable = unshareable_tensor(load_family(config, "test"), config)
    assert (unshareable is None) == (name in SHAREABLE), unshareable


def test_a_new_family_needs_no_change_of_the_code(tmp_path, monkeypatch):
    """Other names of the same tensors: what they are for decides."""
    text = (Path(families.__file__).parent / "llama.json").read_text()
    text = text.replace('"llama"', '"renamed"').replace("_proj", "_matrix")
    (tmp_path / "renamed.json").write_text(text)
    monkeypatch.setenv("KDSCALE_FAMILIES", str(tmp_path))
    config = {**tiny_config("llama"), "model_type": "renamed"}
    assert unshareable_tensor(load_family(config, "test"), config) is None
