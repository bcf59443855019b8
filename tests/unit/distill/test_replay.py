"""Where a replay begins, how it names parameters, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.distill.replay import find_start, parameter_groups, replay_step
from kdscale.errors import RunFolderError
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter


def config(run_dir: Path) -> Config:
    tree = {"name": "a", "run_dir": str(run_dir), "teacher": {"path": "t"}, "prune": {"target_params": "50%"}}
    return build_config(tree, "test")


def test_a_folder_that_has_trained_nothing_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"overrides": (), "max_steps": 1, "nearest": False, "reporter": Reporter(quiet=True)}
    with pytest.raises(RunFolderError, match="not a run folder"):
        replay_step(tmp_path, 1, **settings)
    run = RunFolder(tmp_path)
    run.adopt_config(config(tmp_path), accept_changes=False)
    with pytest.raises(RunFolderError, match="no step was trained yet"):
        replay_step(tmp_path, 1, **settings)


def test_a_replay_starts_at_the_newest_sealed_checkpoint_before_its_step(tmp_path: Path) -> None:
    for number in (3, 6, 9):
        folder = tmp_path / f"step-{number:08d}"
        folder.mkdir()
        if number != 6:  # torn
            (folder / "manifest.json").write_text("{}")
    assert [find_start(tmp_path, step).step for step in (1, 3, 4, 9, 10)] == [0, 0, 3, 3, 9]


_SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (
            {"model_type": "qwen3", **_SIZES},
            {
                "model.embed_tokens.weight": "embed_tokens",
                "model.layers.1.self_attn.q_proj.weight": "layer 1 attention",
                "model.layers.1.self_attn.q_norm.weight": "layer 1 norm",
                "model.layers.1.mlp.up_proj.weight": "layer 1 ffn",
                "model.layers.1.post_attention_layernorm.weight": "layer 1 norm",
                "model.norm.weight": "norm",
                "lm_head.weight": "lm_head",
            },
        ),
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8},
            {"transformer.h.0.ln_1.bias": "layer 0 norm", "transformer.h.0.mlp.c_fc.weight": "layer 0 ffn"},
        ),
        (
            {"model_type": "mixtral", **_SIZES, "num_local_experts": 2, "num_experts_per_tok": 1},
            {"model.layers.0.mlp.experts.gate_up_proj": "layer 0 ffn", "model.layers.0.mlp.gate.weight": "layer 0 ffn"},
        ),
    ],
    ids=["qwen3", "gpt2", "mixtral"],
)
def test_the_family_names_groups_of_parameters(tmp_path: Path, config: dict[str, Any], groups: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parameter_groups(tmp_path).items() >= groups.items()
