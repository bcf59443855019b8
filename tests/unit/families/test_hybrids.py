"""What hybrids ask of a family file: layers listed in letters, widths that go together, layers with attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import load_family
from kdscale.prune.plan import Plan
from kdscale.prune.search.cost import CostModel
from kdscale.prune.search.planning import make_plan
from kdscale.prune.search.space import columns

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
_NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h", **_SIZES, "intermediate_size": 48, "hybrid_override_pattern": "M-*M-", "n_groups": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16,
}  # fmt: skip
_GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid", **_SIZES, "shared_intermediate_size": 48, "num_hidden_layers": 4,
    "num_local_experts": 0, "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 6,
    "mamba_d_head": 16, "mamba_expand": 3, "mamba_n_groups": 1, "mamba_d_state": 16,
}  # fmt: skip


def test_a_text_of_letters_says_how_many_layers_there_are_and_of_which_kinds() -> None:
    family = load_family(_NEMOTRON, "config.json")
    assert family.dims(_NEMOTRON).layers == 5
    assert [sorted(kinds) for kinds in family.layer_kinds(_NEMOTRON)] == [
        ["mamba"], ["mlp"], ["attention"], ["mamba"], ["mlp"]
    ]  # fmt: skip
    student = family.student_config(_NEMOTRON, family.dims(_NEMOTRON).replace(layers=3), [1, 2, 3])
    assert student["layers_block_type"] == ["mlp", "full_attention", "linear_attention"]
    assert "hybrid_override_pattern" not in student
    assert family.dims(student).layers == 3


def test_the_file_of_a_hybrid_is_that_of_its_layers() -> None:
    """A model type with two files: a config says which of them is about it, as transformers reads it."""
    moe = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 16}
    for pattern, name in (("M-*", "nemotron_h"), ("ME*", "nemotron_h_moe"), ("ME*-", "nemotron_h_moe")):
        config = {**_NEMOTRON, "hybrid_override_pattern": pattern, **moe}
        family = load_family(config, "config.json")
        assert family.name == name
        assert family.dims(config).ffn == (24 if "E" in pattern else 48)
    for experts, name in ((0, "granitemoehybrid"), (4, "granitemoehybrid_moe")):
        assert load_family({**_GRANITE, "num_local_experts": experts}, "config.json").name == name
    assert load_family({"model_type": "granitemoehybrid"}, "config.json").name == "granitemoehybrid_moe"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hybrid_override_pattern": "M-x"}, "a text of the letters M"),
        ({"num_hidden_layers": 7}, r"as many layers as are listed\n  got:      7, and 5 layers"),
        ({"layers_block_type": ["moe", "rwkv"]}, r"layers_block_type\n  expected: entries of linear_attention"),
    ],
)
def test_layers_that_are_not_described_are_named(changes: dict[str, Any], told: str) -> None:
    config = {**_NEMOTRON, **changes}
    with pytest.raises(CheckpointError, match=told):
        load_family(config, "config.json").tensors(config)


def test_the_mixers_width_stays_a_multiple_of_the_hidden_size() -> None:
    family = load_family(_GRANITE, "config.json")
    plan = make_plan(_GRANITE, family, None, PruneConfig(hidden=24, ssm_heads=3))
    assert family.student_config(_GRANITE, plan.student.dims(), plan.kept.layers)["mamba_expand"] == 2
    with pytest.raises(ConfigError, match=r"\(64\) is not a multiple of hidden \(24\)"):
        make_plan(_GRANITE, family, None, PruneConfig(hidden=24, ssm_heads=4))


def test_a_layer_with_attention_stays_however_little_it_counts() -> None:
    family = load_family(_GRANITE, "config.json")
    scores = {"layers.one_by_one": np.array([3.0, 2.0, 0.5, 4.0])}
    plan = make_plan(_GRANITE, family, scores, PruneConfig(layers=2))
    assert plan.kept.layers == [2, 3]
    assert [bool(heads) for heads in plan.kept.heads] == [True, False]
    assert [bool(heads) for heads in plan.kept.ssm_heads] == [False, True]
    assert Plan.from_json(plan.to_json(), config=_GRANITE, family=family) == plan
    block = {"layers.block_influence": np.array([3.0, 2.0, 0.5, 4.0])}
    contiguous = PruneConfig(layers=1, layer_method="block_influence", contiguous_layers=True)
    with pytest.raises(ConfigError, match="leaves one with attention"):
        make_plan(_GRANITE, family, block, contiguous)
    # that a student of so few layers is none is no reason to refuse one of more
    angles = np.ones((4, 5))
    angles[1, 2] = 0.1
    for asked in (PruneConfig(layers=3), PruneConfig(target_params="85%", tolerance=0.15, axes=("layers",))):
        cfg = asked.model_copy(update={"layer_method": "angular"})
        assert make_plan(_GRANITE, family, {"layers.angular": angles}, cfg).kept.layers in ([0, 2, 3], [0, 1, 2, 3])


def test_keys_and_values_are_those_of_layers_with_attention() -> None:
    family = load_family(_GRANITE, "config.json")
    assert family.cached_numbers(_GRANITE) == 2 * 2 * 8
    shape = [32, 48, 4, 2, 4, 0, 6, 16, 12]
    assert CostModel.of(_GRANITE, family).kv_bytes(columns([shape])).tolist() == [2 * 2 * 1 * 2 * 8]


def test_a_student_says_its_width_and_not_what_it_is_made_from() -> None:
    config = {
        "model_type": "lfm2", **_SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
        "intermediate_size": 70, "block_ff_dim": 70, "block_multiple_of": 16, "full_attn_idxs": [1],
    }  # fmt: skip
    family = load_family(config, "config.json")
    assert family.dims(config).ffn == 48  # 70 · 2 / 3 = 46, up to a multiple of 16
    student = family.student_config(config, family.dims(config).replace(ffn=40, layers=2), [1, 2])
    assert (student["intermediate_size"], student["block_ff_dim"]) == (40, 40)
    assert (student["block_auto_adjust_ff_dim"], student["layer_types"]) == (False, ["full_attention", "conv"])
    assert "full_attn_idxs" not in student
    assert family.dims(student).ffn == 40
