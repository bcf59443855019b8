"""Families against transformers: every tensor name and shape, defaults, constraints."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import kdscale.families
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import Dims, TensorSpec, load_family, read_families
from kdscale.families.schema import axis_size
from kdscale.families.windows import attention_windows
from kdscale.families.writers import layer_writers
from tests.unit.families.small_configs import FAMILIES, SIZES, small_config, tied_kv_heads, transformers_config

_VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention-bias": {"attention_bias": True, "tie_word_embeddings": True},
    "wide-heads": {"head_dim": 20},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1, "head_dim": 4},
    "null-kv-heads": {"num_key_value_heads": None},
    "rope-scaling": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
# Configs whose layers are of two kinds, as the fields of the family can say it.
SEVERAL_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"mlp_only_layers": [0, 3]}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen3_next", {"mlp_only_layers": [0, 3], "layer_types": ["full_attention"] * 6}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("llama4_text", {"moe_layers": [1, 2]}),
    ("glm4_moe", {"first_k_dense_replace": 2, "use_qk_norm": True, "attention_bias": True}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "n_group": 2, "topk_group": 1}),
    ("deepseek_v2", {"first_k_dense_replace": 1, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True}),
    ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_num_shared_experts": 0}),
    ("ernie4_5_moe", {"moe_layer_start_index": 2, "use_bias": True}),
    (
        "gemma4_text",
        {
            "attention_k_eq_v": False,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 10,
            "vocab_size_per_layer_input": 90,
        },
    ),
    ("modernbert", {"norm_bias": True, "classifier_bias": True, "decoder_bias": False}),
]
_NO_SCALING = {
    "phi3",
    "gemma4_text",
    "gemma4_text_moe",
    "gemma4_unified_text",
}  # families whose classes take other fields
_NOT_ANY_ORDER = {"ernie4_5_moe", "modernbert", "gemma4_text"}  # families whose config cannot say every order of kinds
_FAMILY_FILES = sorted(Path(kdscale.families.__file__).parent.glob("*.json"))
_LLAMA = next(file for file in _FAMILY_FILES if file.stem == "llama")


def _hf_state(
    config: dict[str, Any], tied: Collection[str], constants: Collection[str] = ()
) -> tuple[dict[str, tuple[int, ...]], int]:
    """(transformers' own parameters without the `tied` ones, their count with tied parameters counted once).

    Buffers that are stored count, but for `constants`: those that a family calls buffers.
    """
    import torch

    from kdscale.models.loading import auto_class

    with torch.device("meta"):
        model = auto_class(config).from_config(transformers_config(config))
        model.tie_weights()
    names: dict[int, str] = {}  # of what has several names the first that is not tied to another
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if name not in tied:
            names.setdefault(id(value), name)
    kept = {name: value for name, value in model.state_dict().items() if name in names.values()}
    buffers = (value for name, value in model.named_buffers() if name in kept and name not in constants)
    state = {name: tuple(value.shape) for name, value in kept.items()}
    return state, sum(value.numel() for value in (*model.parameters(), *buffers))


def _parameters(specs: Collection[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """What transformers makes of the tensors on disk: rows of one parameter together, then experts stacked."""
    rows: dict[str, dict[int | None, int]] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for spec in (spec for spec in specs if spec.shape):
        of_expert = rows.setdefault(spec.parameter, {})
        of_expert[spec.expert] = of_expert.get(spec.expert, 0) + spec.shape[0]
        rest[spec.parameter] = spec.shape[1:]
    out: dict[str, tuple[int, ...]] = {spec.parameter: () for spec in specs if not spec.shape}
    for name, by_expert in rows.items():
        stack = () if None in by_expert else (len(by_expert),)
        (height,) = set(by_expert.values())
        out[name] = (*stack, height, *rest[name])
    return out


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_tensors_and_counts_are_those_of_transformers(model_type: str, variant: str) -> None:
    config, data = small_config(model_type), FAMILIES[model_type]
    known = {field.field for field in (*data.dims.values(), *data.flags.values())} | {"rope_theta", "rope_scaling"}
    if not set(_VARIANTS[variant]) <= known or (variant == "rope-scaling" and model_type in _NO_SCALING):
        pytest.skip("transformers has no such variant of this family")
    config |= _VARIANTS[variant]
    if any(config.get(rule.field, rule.one_of[0]) not in rule.one_of for rule in data.requires):
        pytest.skip("the family file refuses it")
    family = load_family(config, "config.json")
    if variant == "null-kv-heads" and data.dims["kv_heads"].null is None:  # transformers' config wants an integer
        with pytest.raises(CheckpointError, match="num_key_value_heads"):
            family.dims(config)
        return
    specs, tied = family.tensors(config), family.tied(config)
    constants = {spec.parameter for spec in specs.values() if spec.buffer}
    theirs, count = _hf_state(config, {family.parameter(name) for name in tied}, constants)
    assert _parameters(specs.values()) == theirs
    counted = family.count_params(config)
    assert counted.total == count == counted.embedding + counted.non_embedding
    others = [spec for spec in specs.values() if spec.counts_as_embedding and spec.role not in ("embed", "head")]
    positions = sum(math.prod(spec.shape) for spec in others)
    assert counted.embedding == (1 if tied else 2) * SIZES["vocab"] * SIZES["hidden"] + positions


@pytest.mark.parametrize(("model_type", "changes"), SEVERAL_KINDS)
def test_layers_of_several_kinds_have_the_tensors_that_transformers_gives_them(
    model_type: str, changes: dict[str, Any]
) -> None:
    config = small_config(model_type, **{**changes, "num_hidden_layers": 6})
    family = load_family(config, "config.json")
    kinds = family.layer_kinds(config)
    assert len(set(kinds)) > 1
    for kept in ([0, 1, 2, 3, 4, 5], [1, 2, 5], [0, 3], [2], [5]):
        try:
            student = family.student_config(config, family.dims(config).replace(layers=len(kept)), kept)
        except ConfigError as error:
            assert re.search(r"has the kept layers|ends with layer", str(error))
            assert model_type in _NOT_ANY_ORDER
            continue
        assert family.layer_kinds(student) == [kinds[layer] for layer in kept]
        specs = family.tensors(student)
        constants = {spec.parameter for spec in specs.values() if spec.buffer}
        theirs, count = _hf_state(student, {family.parameter(name) for name in family.tied(student)}, constants)
        assert _parameters(specs.values()) == theirs
        assert family.count_params(student).total == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mlp_only_layers": "0"}, "a list of layer numbers"), ({"decoder_sparse_step": 0}, "decoder_sparse_step")],
)
def test_fields_that_say_no_kind_of_a_layer_are_named(changes: dict[str, Any], message: str) -> None:
    config = small_config("qwen3_moe", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_family(config, "config.json").tensors(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_components_are_the_modules_that_parameters_are_in(model_type: str) -> None:
    config = small_config(model_type, **(_VARIANTS["biases"] if model_type == "llama" else {}))
    family = load_family(config, "config.json")
    sites, components = family.sites, family.parameter_components(config)
    assert components[f"{sites.embed}.weight"] == "embedding"
    if sites.final_norm:
        assert components[f"{sites.final_norm}.weight"] == "norm"
    for layer in family.layers_by_kind(config):
        sites = family.layer_sites(config, layer)
        for spec in family.layer_tensors(config, layer).values():
            path = spec.parameter.removeprefix(family.layer_prefix(layer))
            expected = "attention" if sites.attention and path.startswith(f"{sites.attention}.") else "ffn"
            mixer = (sites.ssm or sites.conv).removesuffix("out_proj")
            expected = "mixer" if mixer and path.startswith(mixer) else expected
            expected = "norm" if "norm" in path.lower() or path.startswith("ln_") else expected
            assert components[spec.parameter] == spec.component == expected, path
            assert not spec.counts_as_embedding


@pytest.mark.parametrize("field", ["kv_heads", "head_dim"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_for(model_type: str, field: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if any(product.over for product in FAMILIES[model_type].products):
        pytest.skip("its hidden size goes with its mixers")
    if FAMILIES[model_type].layer_overrides:
        pytest.skip("transformers has no one value for all layers")
    fields = {dim: found.field for dim, found in FAMILIES[model_type].dims.items()}
    sizes = {"heads": 64, "hidden": 128, "kv_heads": 32}
    if tied_kv_heads(FAMILIES[model_type]):
        sizes |= {"heads": 128, "kv_heads": 128}
    config = small_config(model_type, **{fields[dim]: size for dim, size in sizes.items() if fields[dim]})
    config.pop(fields[field], None)
    family, hf = load_family(config, "config.json"), transformers_config(config)
    if (spec := family.data.dims[field]).field and spec.absent is None:  # transformers has no such model either
        with pytest.raises(CheckpointError, match="no such field"):
            family.dims(config)
        with pytest.raises(TypeError), torch.device("meta"):
            AutoModelForCausalLM.from_config(hf)
        return
    dims = family.dims(config)
    assert dims.kv_heads == getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    head_dim = getattr(hf, fields["head_dim"] or "head_dim", None)
    assert dims.head_dim == (head_dim or hf.hidden_size // hf.num_attention_heads)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sites_are_modules_of_the_model_and_have_the_axes(model_type: str) -> None:
    import torch

    from kdscale.models.loading import auto_class

    config = small_config(model_type)
    family = load_family(config, "config.json")
    sites, dims = family.sites, family.dims(config)
    with torch.device("meta"):
        model = auto_class(config).from_config(transformers_config(config))
    for path in (sites.embed, sites.final_norm, sites.rotary, sites.head, sites.pooler):
        model.get_submodule(path)
    assert len(model.get_submodule(sites.layers)) == dims.layers  # type: ignore[arg-type]
    for index in family.layers_by_kind(config):
        layer, sites = model.get_submodule(f"{sites.layers}.{index}"), family.layer_sites(config, index)
        for role, writer in layer_writers(family, config, index).items():
            if writer.of_experts:
                experts = layer.get_submodule(writer.path)
                turned = getattr(experts, "is_transposed", family.data.experts_weigh == "input")
                shape = (dims.ffn, dims.hidden) if turned else (dims.hidden, dims.ffn)
                assert experts.down_proj.shape == (dims.experts, *shape)
                specs = family.layer_tensors(config, index).values()
                router = next(spec.parameter for spec in specs if spec.role == "router")
                assert router.startswith(f"{family.layer_prefix(index)}{sites.router}.")
                assert model.get_parameter(router).shape == (dims.experts, dims.hidden)
            else:
                inputs = layer.get_submodule(writer.path).weight.shape[0 if family.transposed(role) else 1]
                assert inputs == axis_size(writer.axis, asdict(dims) | family.fixed_sizes)
        for path in (*sites.norms, sites.attention, sites.mlp):
            layer.get_submodule(path)
    assert set(family.layer_tensors(config, 1)) == {
        name for name, spec in family.tensors(config).items() if spec.parameter.startswith(family.layer_prefix(1))
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model_type=st.sampled_from(list(FAMILIES)),
    heads=st.integers(1, 8),
    groups=st.integers(1, 8),
    hidden=st.integers(1, 64),
)
def test_constraints_refuse_what_transformers_refuses(model_type: str, heads: int, groups: int, hidden: int) -> None:
    """Sizes that pass our rules build in transformers; sizes transformers refuses do not pass."""
    import torch

    from kdscale.models.loading import auto_class

    assume(not any(product.over for product in FAMILIES[model_type].products))  # whose hidden size has more rules
    fields = {dim: found.field for dim, found in FAMILIES[model_type].dims.items()}
    sizes = {"hidden": hidden, "heads": heads, "kv_heads": groups, "head_dim": 8}
    config = small_config(model_type, **{fields[dim]: size for dim, size in sizes.items() if fields[dim]})
    family = load_family(config, "config.json")
    dims = Dims(**sizes, ffn=80, layers=3, vocab=96, experts=SIZES["experts"] if "experts" in fields else 0)
    broken = family.violations(dims)
    if any("is not a multiple of heads" in rule for rule in broken):
        with pytest.raises(Exception, match=r"not a multiple|divisible|must divide"), torch.device("meta"):
            auto_class(config).from_config(transformers_config(config))
    elif fields["head_dim"] or hidden // heads % 2 == 0:  # a head size is the teacher's, and no cut makes it odd
        transformers_config(config)
    if fields["kv_heads"]:
        assert any("kv group" in rule for rule in broken) == bool(heads % groups)
    for dim in ("kv_heads", "head_dim"):  # without a field in the config there is no such model
        if not fields[dim]:
            there = {"kv_heads": heads, "head_dim": hidden // heads}[dim]
            assert any(rule.startswith(dim) for rule in broken) == (sizes[dim] != there)


def test_llama_refuses_a_hidden_size_that_its_heads_do_not_divide() -> None:
    config = small_config("llama", hidden_size=50, head_dim=8)
    with pytest.raises(CheckpointError, match=r"hidden \(50\) is not a multiple of heads \(6\)"):
        load_family(config, "config.json").dims(config)


def test_an_interval_may_begin_with_the_first_layer() -> None:
    """ModernBERT as the hub has it: the lists of transformers 5 are not there."""
    config = small_config("modernbert", num_hidden_layers=7, global_attn_every_n_layers=3)
    family = load_family(config, "config.json")
    assert attention_windows(family, config) == [None, 128, 128, None, 128, 128, None]
    student = family.student_config(config, family.dims(config).replace(layers=3), [0, 1, 3])
    assert student["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert "global_attn_every_n_layers" not in student
    for each in (config, student):
        windows = attention_windows(family, each)
        kinds = transformers_config(each).layer_types
        assert [kind == "full_attention" for kind in kinds] == [window is None for window in windows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"intermediate_size": "80"}, "positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": -4}, "head_dim"),
        ({"num_key_value_heads": 4}, "not a multiple of kv_heads"),
    ],
)
def test_sizes_that_make_no_sense_are_named(changes: dict[str, Any], message: str) -> None:
    config = small_config("llama", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_family(config, "some/config.json").dims(config)


def test_missing_size_and_odd_flag_are_named() -> None:
    config = small_config("llama")
    del config["vocab_size"]
    with pytest.raises(CheckpointError, match="no such field"):
        load_family(config, "config.json").dims(config)
    config = small_config("llama", tie_word_embeddings="yes")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_family(config, "config.json").tensors(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "opt"}, "llama, llama4_text, ministral"),
        ({}, "no such field"),
        ({"model_type": ["llama"]}, "model_type"),
        (small_config("llama", architectures=["LlamaForSequenceClassification"]), "LlamaForCausalLM"),
        (small_config("llama", architectures="LlamaForCausalLM"), "architectures"),
        ({"model_type": "shieldgemma2", "text_config": {"model_type": "gemma3_text"}}, "alone, as Gemma3ForCausalLM"),
        (
            {"model_type": "video_llava", "text_config": {"model_type": "opt"}},
            r"several modalities .* \('opt' in text_config",
        ),
        (small_config("llama", rms_norm_eps=float("nan")), "rms_norm_eps\n  expected: a finite"),
        (small_config("llama", rope_scaling={"factor": float("inf")}), r"rope_scaling\.factor"),
        (small_config("llama", rope_parameters={"rope_theta": -1}), r"rope_theta\n  expected: a positive"),
        (small_config("llama", max_position_embeddings=0), "max_position_embeddings"),
        (small_config("llama", quantization_config={"quant_method": "gptq"}), "quantis"),
    ],
)
def test_configs_that_are_not_supported_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_family(config, "config.json")


def _broken_family(tmp_path: Path, **changes: Any) -> Path:
    data = json.loads(_LLAMA.read_text())
    data.update(changes)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    return path


def test_family_files_are_checked_strictly(tmp_path: Path) -> None:
    data = json.loads(_LLAMA.read_text())
    tensors = data["tensors"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"colour": "red"}, "colour"),
        ({"tensors": [*tensors, tensors[0]]}, "repeat the name"),
        ({"tensors": [{**tensors[0], "axes": ["width"]}, *tensors[1:]]}, "axes"),
        ({"tensors": [{**tensors[0], "axes": []}, *tensors[1:]]}, "empty in a buffer only"),
        ({"flags": {}}, "flags"),
        ({"tensors": [{**tensors[0], "role": "wte"}, *tensors[1:]]}, "no such role"),
        ({"tensors": [{**tensors[0], "axes": ["vocab", "hidden*-2"]}, *tensors[1:]]}, "neither a dimension nor"),
        ({"sizes": {"positions": {"field": "n_positions", "absent": 8}}}, "not used by any tensor"),
        ({"experts_per_token": {"field": "num_experts_per_tok"}}, "lacks dims.experts"),
        ({"dims": {**data["dims"], "head_dim": {"absent": 8}}}, "either field or always"),
        ({"dims": {**data["dims"], "head_dim": {"field": "head_dim", "absent": "hidden / 2"}}}, "is not of the form"),
        ({"sites": {**data["sites"], "ffn": ""}}, "either ffn, or experts"),
        ({"dims": {key: value for key, value in data["dims"].items() if key != "ffn"}}, "lacks ffn"),
        (
            {"tensors": [{**tensors[0], "axes": ["vocab", "hidden by width"]}, *tensors[1:]]},
            "no dimension to have groups",
        ),
        ({"tensors": [{**tensors[0], "axes": ["vocab by heads", "hidden"]}, *tensors[1:]]}, "needs a constraint"),
        ({"ties": [{**data["ties"][0], "to": "model.wte.weight"}]}, "model.wte.weight"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            read_families([_broken_family(tmp_path, **changes)])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_families([tmp_path / "broken.json"])
    with pytest.raises(ConfigError, match="another family file"):
        read_families([_LLAMA, _broken_family(tmp_path)])


def test_neither_families_nor_opening_a_checkpoint_imports_torch() -> None:
    code = (
        "import sys, kdscale.families as f, kdscale.weights; f.supported_types();"
        "sys.exit(sorted(set(sys.modules) & {'torch', 'transformers'}) != [])"
    )
    root = Path(kdscale.families.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
