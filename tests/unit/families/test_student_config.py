"""The config of a student: the teacher's with other sizes, and per-layer fields of the layers that stay."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import load_family
from kdscale.families.cuttable import ending_well, may_end
from kdscale.prune.for_family import settled
from kdscale.prune.search.planning import make_plan
from tests.unit.families.small_configs import small_config, transformers_config


def test_student_config_changes_sizes_and_per_layer_fields_only() -> None:
    teacher = small_config(
        "qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        max_window_layers=2,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_theta=1e6,
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        eos_token_id=7,
    )
    before = json.dumps(teacher)
    family = load_family(teacher, "config.json")
    dims = family.dims(teacher).replace(hidden=40, ffn=32, heads=4, layers=2)
    student = family.student_config(teacher, dims, [0, 3])
    assert json.dumps(teacher) == before
    assert family.dims(student) == dims
    assert student["head_dim"] == 8  # the teacher's 48 // 6, not the student's 40 // 4
    assert student["layer_types"] == ["full_attention", "sliding_attention"]
    assert student["max_window_layers"] == 1
    changed = {key for key in student if student[key] != teacher.get(key)}
    assert changed == {
        "hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_hidden_layers", "layer_types",
        "max_window_layers",
    }  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), model_type=st.sampled_from(["qwen2", "qwen3"]), layers=st.integers(1, 6))
def test_kept_layers_keep_their_kind_of_attention(data: st.DataObject, model_type: str, layers: int) -> None:
    """Even when the kinds are implied by max_window_layers, each kept layer has in the student what it had."""
    config = small_config(model_type, num_hidden_layers=layers, use_sliding_window=True, sliding_window=16, head_dim=8)
    border = data.draw(st.none() | st.integers(0, 8))
    if border is not None:
        config["max_window_layers"] = border
    kept = sorted(data.draw(st.sets(st.integers(0, layers - 1), min_size=1)))
    family = load_family(config, "config.json")
    student = family.student_config(config, family.dims(config).replace(layers=len(kept)), kept)
    theirs = transformers_config(config).layer_types
    assert transformers_config(student).layer_types == [theirs[i] for i in kept]


@pytest.mark.parametrize(
    ("model_type", "every_field", "said_too", "list_field"),
    [
        ("gemma3_text", "sliding_window_pattern", "_sliding_window_pattern", "layer_types"),
        ("smollm3", "no_rope_layer_interval", "no_rope_layer_interval", "no_rope_layers"),
    ],
)
def test_no_field_contradicts_the_cut_list(model_type: str, every_field: str, said_too: str, list_field: str) -> None:
    config = small_config(model_type, num_hidden_layers=6, **{every_field: 3, said_too: 3})
    family = load_family(config, "config.json")
    values = family.student_config(config, family.dims(config), range(6)).get(list_field) or [0, 0, 1] * 2
    for kept, stays in (([0, 1, 2, 3], True), ([0, 1, 2, 3, 4, 5], True), ([0, 2, 3, 5], False), ([2, 4], False)):
        student = family.student_config(config, family.dims(config).replace(layers=len(kept)), kept)
        assert {every_field in student, said_too in student} == {stays}, kept
        assert student.get(list_field) is None or len(student[list_field]) == len(kept) <= len(values)
        ours, teachers = (getattr(transformers_config(one), list_field) for one in (student, config))
        assert ours == [teachers[layer] for layer in kept]


def test_a_pattern_in_letters_goes_with_the_layers_that_it_stood_for() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = small_config("exaone4", num_hidden_layers=4, layer_types=kinds, sliding_window_pattern="LLLG")
    family = load_family(config, "config.json")
    student = family.student_config(config, family.dims(config).replace(layers=2), [1, 3])
    assert student["layer_types"] == ["sliding_attention", "full_attention"]
    assert "sliding_window_pattern" not in student


@pytest.mark.parametrize(
    ("model_type", "field", "alias"),
    [("mixtral", "num_local_experts", "num_experts"), ("gpt2", "n_layer", "num_hidden_layers")],
)
def test_a_size_that_is_given_twice_is_changed_twice(model_type: str, field: str, alias: str) -> None:
    config = small_config(model_type, **{field: 4, alias: 4})
    family = load_family(config, "config.json")
    dims = family.dims(config).replace(**{"experts" if model_type == "mixtral" else "layers": 2})
    student = family.student_config(config, dims, range(dims.layers))
    assert student[field] == student[alias] == 2
    with pytest.raises(CheckpointError, match=f"{field} and {alias}"):
        family.dims({**config, alias: 5})


def test_student_config_refuses_wrong_layers_and_sizes() -> None:
    config = small_config("llama")
    family = load_family(config, "config.json")
    dims = family.dims(config)
    for kept in ([0, 1], [0, 2, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="kept_layers"):
            family.student_config(config, dims, kept)
    with pytest.raises(ValueError, match="never change"):
        family.student_config(config, dims.replace(head_dim=4), [0, 1, 2])
    with pytest.raises(ConfigError, match="not a multiple"):
        family.student_config(config, dims.replace(hidden=50), [0, 1, 2])
    broken = {**config, "layer_types": ["full_attention"]}
    with pytest.raises(CheckpointError, match="list of 3 entries"):
        family.student_config(broken, dims.replace(layers=1), [0])


def test_a_model_whose_last_layer_transformers_chooses_ends_with_that_layer() -> None:
    """Gemma 4: the last layer is full attention whatever the list says; newer configs number the layers that differ."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    overrides = {"1": {"head_dim": 20, "num_key_value_heads": 1}, "2": {"head_dim": 20, "num_key_value_heads": 1}}
    config = small_config("gemma4_text", layer_types=types, per_layer_config=overrides, global_head_dim=999)
    family = load_family(config, "config.json")
    assert (family.fixed_sizes["global_head_dim"], family.fixed_sizes["global_kv_heads"]) == (20, 1)
    # without values that are their keys all layers have as many kv heads, whatever the field says
    plain = small_config("gemma4_text", attention_k_eq_v=False)
    assert load_family(plain, "config.json").fixed_sizes["global_kv_heads"] == 2
    assert may_end(family, config) == [False, True, True]
    assert ending_well(family, config, [0]) == [2]
    dims = family.dims(config).replace(layers=2)
    student = family.student_config(config, dims, [0, 2])
    assert student["layer_types"] == ["sliding_attention", "full_attention"]
    assert student["per_layer_config"] == {"1": overrides["2"]}
    with pytest.raises(ConfigError, match=r"ends with layer 0(?s:.*)keep the last layer \(2\)"):
        family.student_config(config, dims.replace(layers=1), [0])
    scores = {"layers.one_by_one": np.array([3.0, 1.0, 2.0])}
    assert make_plan(config, family, scores, PruneConfig(layers=1)).kept.layers == [2]
    uneven = {**config, "per_layer_config": {"1": {"head_dim": 20}, "2": {"head_dim": 24}}}
    with pytest.raises(CheckpointError, match="each with the same fields and values"):
        load_family(uneven, "config.json")


@pytest.mark.parametrize(
    ("prune", "told"),
    [
        ({"kv_heads": 1}, r"kv_heads \(1\) is not the teacher's 2"),
        ({"target_params": "60%", "axes": ("ffn", "kv_heads")}, "leave kv_heads out"),
        ({"layers": 2, "layer_repair": "linear"}, "which scale it too"),
    ],
)
def test_what_gemma_4_cannot_do_is_said(prune: dict[str, Any], told: str) -> None:
    config = small_config("gemma4_text")
    with pytest.raises(ConfigError, match=told):
        make_plan(config, load_family(config, "config.json"), None, PruneConfig(**prune))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size_per_layer_input", None), ("num_kv_shared_layers", 2)],
)
def test_mixtures_of_gemma_4_have_no_inputs_of_layers(field: str, value: Any) -> None:
    """A missing field stands for what transformers takes then."""
    config = {**small_config("gemma4_text_moe"), field: value}
    config = {name: given for name, given in config.items() if given is not None}
    with pytest.raises(CheckpointError, match=rf"{field}(?s:.*)not described"):
        load_family(config, "config.json")


def test_layers_that_read_keys_and_values_of_others_keep_some_to_read() -> None:
    """Gemma 4 E2B: whatever the scores say, and where a plan says otherwise it is refused."""
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = small_config(
        "gemma4_text", layer_types=types, num_hidden_layers=5, num_kv_shared_layers=2, attention_k_eq_v=False
    )
    family = load_family(config, "config.json")
    assert family.cached_numbers(config) == 2 * 2 * (256 + 20 + 256)
    kept = {}
    for count in range(1, 6):
        scores = {"layers.one_by_one": np.array([2.0, 1.0, 3.0, 4.0, 5.0])}
        kept[count] = make_plan(config, family, scores, PruneConfig(layers=count)).kept.layers
    assert kept == {1: [1], 2: [1, 4], 3: [1, 2, 4], 4: [1, 2, 3, 4], 5: [0, 1, 2, 3, 4]}
    student = family.student_config(config, family.dims(config).replace(layers=3), [1, 2, 4])
    assert student["num_kv_shared_layers"] == 1
    assert family.student_config(config, family.dims(config).replace(layers=2), [0, 1])["num_kv_shared_layers"] == 0
    with pytest.raises(ConfigError, match=r"layer of the kinds full, own, whose keys and values others read"):
        family.student_config(config, family.dims(config).replace(layers=2), [0, 4])
    assert ending_well(family, config, [0, 2, 3]) == [0, 1, 4]
    with pytest.raises(CheckpointError, match="keys and values of earlier ones"):
        load_family({**config, "num_kv_shared_layers": 4}, "config.json").layer_kinds(
            {**config, "num_kv_shared_layers": 4}
        )
    timed = PruneConfig(target_decode="80%", axes=("ffn",))
    with pytest.raises(ConfigError, match="not timed without those before them"):
        make_plan(config, family, scores, timed)
    plain = small_config("gemma4_text")
    assert settled(timed, load_family(plain, "config.json"), plain).target == timed.target
