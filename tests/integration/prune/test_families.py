"""The table that every family passes: names and shapes on disk, identity, every axis, reload, decoding with a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale import families
from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError, DataError
from kdscale.families import load_family, supported_types
from kdscale.models.loading import load_model
from kdscale.models.parameter_map import trained_tensors
from kdscale.prune import self_check
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.prune.slicing import Slicer
from kdscale.weights import Checkpoint
from tests.integration.prune.family_table import (
    VARIANTS,
    architectures,
    cut_of_all,
    cuts_of,
    edit_config,
    random_scores,
    save_teacher,
)

CPU = torch.device("cpu")
STRANGERS = Path(__file__).parents[2] / "fixtures" / "families"


def names_shapes_and_identity(teacher, out: Path) -> None:
    before = load_file(teacher.checkpoint.path / "model.safetensors")
    expected = {name: spec.shape for name, spec in teacher.family.tensors(teacher.config).items()}
    assert expected == {name: tuple(value.shape) for name, value in before.items()}
    plan = teacher.prune(out, {}, ffn=teacher.family.dims(teacher.config).ffn)
    assert plan.cut_axes() == []
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape, name
        assert torch.equal(value.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)), name


def masked_is_sliced(teacher, cut: dict[str, int]) -> None:
    scores = random_scores(teacher.config, teacher.family)
    plan = make_plan(teacher.config, teacher.family, scores, PruneConfig(**cut))
    assert set(cut) <= set(plan.cut_axes())
    figures = self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)
    assert max(figures.values()) < 1e-5, cut


def self_checked_student(teacher, out: Path, compensate: str) -> None:
    """Importance of the teacher's own, all axes cut, and what a user's run checks: masks, files, reload, decoding."""
    plan = teacher.prune(out, **cut_of_all(teacher.family), compensate=compensate)
    figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, out, teacher.ids)
    assert max(figures.values()) < 1e-5
    student = teacher.family.student_config(teacher.config, plan.student.dims(), plan.kept.layers)
    model = load_model(out, dtype=torch.float32, device=CPU)
    assert sum(value.numel() for value in model.parameters()) == teacher.family.count_params(student).total


@pytest.mark.parametrize("model_type", [*supported_types(), *VARIANTS])
def test_names_and_shapes_are_those_on_disk_and_identity_copies_every_byte(teacher_of, tmp_path, model_type):
    names_shapes_and_identity(teacher_of(model_type), tmp_path / "same")


@pytest.mark.parametrize("model_type", [*supported_types(), *VARIANTS])
def test_masked_teacher_is_the_sliced_student_on_every_axis(teacher_of, model_type):
    teacher = teacher_of(model_type)
    for cut in cuts_of(teacher.family):
        masked_is_sliced(teacher, cut)


@pytest.mark.parametrize(
    ("model_type", "compensate"),
    [*((model_type, "ridge") for model_type in [*supported_types(), *VARIANTS]), ("llama", "none")],
)
def test_a_student_cut_on_all_axes_passes_the_self_check(teacher_of, tmp_path, model_type, compensate):
    self_checked_student(teacher_of(model_type), tmp_path / "student", compensate)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert"])
def test_an_encoder_that_tells_classes_is_cut_with_its_head(teacher_class, tmp_path, model_type):
    name = next(name for name in architectures(model_type) if name.endswith("ForSequenceClassification"))
    changes = {"classifier_pooling": "mean"} if model_type == "modernbert" else {}
    teacher = teacher_class(save_teacher(model_type, tmp_path / "teacher", name, num_labels=3, **changes))
    assert teacher.family.fixed_sizes["classes"] == 3
    for cut in cuts_of(teacher.family):
        masked_is_sliced(teacher, cut)
    self_checked_student(teacher, tmp_path / "student", "ridge")


@pytest.mark.parametrize("model_type", [file.stem for file in sorted(STRANGERS.glob("*.json"))])
def test_one_new_file_is_a_new_family(teacher_class, tmp_path, monkeypatch, model_type):
    """A JSON in a folder of the user's own, and nothing else, goes through the whole table."""
    monkeypatch.delenv("KDSCALE_FAMILIES", raising=False)
    assert model_type not in supported_types()
    (tmp_path / "mine").mkdir()
    shutil.copy(STRANGERS / f"{model_type}.json", tmp_path / "mine")
    monkeypatch.setenv("KDSCALE_FAMILIES", str(tmp_path / "mine"))
    assert model_type in supported_types()
    teacher = teacher_class(save_teacher(model_type, tmp_path / "teacher"))
    names_shapes_and_identity(teacher, tmp_path / "same")
    for cut in cuts_of(teacher.family):
        masked_is_sliced(teacher, cut)
    self_checked_student(teacher, tmp_path / "student", "ridge")


@pytest.fixture
def curious_moe(tmp_path, monkeypatch) -> str:
    """A mixture whose names on disk nobody has: transformers is told how to read them, kdscale by one JSON alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    class CuriousMoeConfig(MixtralConfig):
        model_type = "curious_moe"

    class CuriousMoeForCausalLM(MixtralForCausalLM):
        config_class = CuriousMoeConfig

    AutoConfig.register("curious_moe", CuriousMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(CuriousMoeConfig, CuriousMoeForCausalLM, exist_ok=True)
    merge, join = MergeModulelist(dim=0), Concatenate(dim=1)
    conversion_mapping.register_checkpoint_conversion_mapping(
        "curious_moe",
        [
            WeightRenaming(".guild.porter.", ".mlp.gate."),
            WeightConverter(
                [".guild.smiths.*.anvil", ".guild.smiths.*.bellows"], ".mlp.experts.gate_up_proj", [merge, join]
            ),
            WeightConverter([".guild.smiths.*.quench"], ".mlp.experts.down_proj", [merge]),
        ],
        overwrite=True,
    )
    text = (Path(families.__file__).parent / "mixtral.json").read_text()
    experts = "block_sparse_moe.experts.{expert}"
    for old, new in {
        '"mixtral"': '"curious_moe"',
        "MixtralForCausalLM": "CuriousMoeForCausalLM",
        "block_sparse_moe.gate.weight": "guild.porter.weight",
        f"{experts}.w1.weight": "guild.smiths.{expert}.anvil",
        f"{experts}.w3.weight": "guild.smiths.{expert}.bellows",
        f"{experts}.w2.weight": "guild.smiths.{expert}.quench",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "curious_moe.json").write_text(text)
    monkeypatch.setenv("KDSCALE_FAMILIES", str(tmp_path / "own"))
    return "curious_moe"


def test_experts_of_any_name_are_pruned_and_found_by_distillation(curious_moe, teacher_class, tmp_path):
    teacher = teacher_class(save_teacher(curious_moe, tmp_path / "teacher"))
    assert "model.layers.0.guild.smiths.3.anvil" in teacher.checkpoint.names
    self_checked_student(teacher, tmp_path / "student", "ridge")
    student = Checkpoint.open(tmp_path / "student")
    parameters = dict(load_model(student.path, dtype=torch.float32, device=CPU).named_parameters())
    trained = trained_tensors(student, {name: tuple(value.shape) for name, value in parameters.items()}, {})
    assert trained.keys() == set(student.names)
    for name, span in trained.items():
        values = parameters[span.name].detach().flatten()[span.offset : span.offset + span.length]
        assert torch.equal(values, student.tensor(name).flatten()), name


def test_a_folder_of_families_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KDSCALE_FAMILIES", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        supported_types()


@pytest.mark.parametrize(
    ("model_type", "absent"),
    [("gemma2", ["layer_types"]), ("gemma3_text", ["layer_types"]), ("smollm3", ["layer_types", "no_rope_layers"])],
)
def test_layers_keep_their_kind_when_the_config_leaves_it_to_transformers(teacher_class, tmp_path, model_type, absent):
    """Configs on the hub lack the lists that transformers 5 writes: the kind follows the layer's number there."""
    folder = save_teacher(model_type, tmp_path / "teacher", num_hidden_layers=4)
    edit_config(folder, **dict.fromkeys(absent), sliding_window_pattern=2)
    teacher = teacher_class(folder)
    scores = random_scores(teacher.config, teacher.family)
    scores["layers.one_by_one"][:] = [1.0, 3.0, 0.5, 2.0]
    plan = make_plan(teacher.config, teacher.family, scores, PruneConfig(layers=2))
    assert plan.kept.layers == [1, 3]
    self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)
    student = teacher.family.student_config(teacher.config, plan.student.dims(), plan.kept.layers)
    assert student.get("layer_types", ["full_attention"] * 2) == ["full_attention"] * 2
    assert student.get("no_rope_layers", [0, 0]) == [0, 0]


def test_gpt2_as_the_hub_has_it_gets_its_prefix_and_loses_its_buffers(teacher_class, tmp_path):
    folder = save_teacher("gpt2", tmp_path / "teacher")
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(tensors, path, {"format": "pt"})
    teacher = teacher_class(folder)
    assert "transformer.h.0.attn.c_attn.weight" in teacher.checkpoint.names
    self_checked_student(teacher, tmp_path / "student", "ridge")


def test_more_tokens_than_learned_positions_are_refused(teacher_of):
    teacher = teacher_of("gpt2")
    plan = make_plan(teacher.config, teacher.family, None, PruneConfig(ffn=24))
    with pytest.raises(DataError, match=r"128 positions of transformer\.wpe\.weight"):
        self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, torch.zeros(1, 129, dtype=torch.long))


def test_heads_that_predict_several_tokens_are_left_out_with_a_notice(tmp_path):
    folder = save_teacher("qwen3", tmp_path / "teacher")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"mtp.layers.0.fc.weight": torch.ones(3, 3)}, path, {"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    teacher = Checkpoint.open(folder)
    family = load_family(teacher.config, "config.json")
    assert teacher.verify_against(family) == ["1 tensors of the multi-token-prediction head are left out"]
    assert "mtp.layers.0.fc.weight" not in teacher.names
    assert (
        family.student_config(teacher.config, family.dims(teacher.config), [0, 1, 2])["num_nextn_predict_layers"] == 0
    )
    load_model(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_multiplier_is_folded(tmp_path, teacher_class, tied):
    """Gemma multiplies by √hidden of its own config: what enters the student's first layer is the teacher's."""
    teacher = teacher_class(save_teacher("gemma2", tmp_path / "teacher", tie_word_embeddings=tied))
    plan = teacher.prune(tmp_path / "student", hidden=24, compensate="none")
    self_check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    models = [load_model(p, dtype=torch.float32, device=CPU) for p in (teacher.checkpoint.path, tmp_path / "student")]
    with torch.no_grad():
        theirs, ours = (model.get_input_embeddings()(teacher.ids) for model in models)
    torch.testing.assert_close(theirs[..., plan.kept.hidden], ours, rtol=1e-5, atol=1e-6)


def test_norm_gains_of_one_plus_the_weight_are_scaled_as_a_whole(teacher_of):
    teacher = teacher_of("gemma3_text")
    plan = make_plan(teacher.config, teacher.family, None, PruneConfig(hidden=24))
    slicer, name = Slicer(teacher.config, teacher.family, plan), "model.layers.0.input_layernorm.weight"
    weight = teacher.checkpoint.tensor(name)
    sliced = slicer.slice(weight, teacher.family.tensors(teacher.config)[name], 0)
    torch.testing.assert_close(1 + sliced, (1 + weight[:24]) * (32 / 24) ** 0.5)


def test_experts_scores_are_what_the_layer_computes(teacher_of, tmp_path):
    """The definitions, from a whole model's own calls of its experts, one token at a time."""
    teacher = teacher_of("qwen3_moe")
    scores = teacher.scores(tmp_path, experts=4, ffn=32)
    model = load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU)
    seen = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    with torch.inference_mode():
        for batch in teacher.batches:
            model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
    disk = load_file(teacher.checkpoint.path / "model.safetensors")
    norms, energy = torch.zeros(3, 5), torch.zeros(3, 5, 48)
    for call, (hidden, chosen, weights) in enumerate(seen):
        layer = call % 3
        for x, experts, shares in zip(hidden, chosen.tolist(), weights, strict=True):
            for expert, share in zip(experts, shares, strict=True):
                w = {
                    r: disk[f"model.layers.{layer}.mlp.experts.{expert}.{r}_proj.weight"]
                    for r in ("gate", "up", "down")
                }
                units = torch.nn.functional.silu(w["gate"] @ x) * (w["up"] @ x)
                norms[layer, expert] += share * (w["down"] @ units).norm()
                energy[layer, expert] += (w["down"] * (share * units)).square().sum(0)
    torch.testing.assert_close(torch.from_numpy(scores["experts.output_norm"]), norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(scores["ffn.output_energy"]), energy, rtol=1e-4, atol=1e-6)
    assert set(scores) == {"experts.output_norm", "ffn.output_energy", "ffn.activation", "ffn.expert_tokens"}


def test_each_kept_expert_keeps_its_own_units(teacher_of, tmp_path):
    teacher = teacher_of("olmoe")
    scores = random_scores(teacher.config, teacher.family)
    plan = teacher.prune(tmp_path / "student", scores=scores, experts=3, ffn=24, layers=2, compensate="none")
    before = load_file(teacher.checkpoint.path / "model.safetensors")
    after = load_file(tmp_path / "student" / "model.safetensors")
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    for position, layer in enumerate(plan.kept.layers):
        assert plan.kept.experts[position] == sorted(scores["experts.output_norm"][layer].argsort()[-3:].tolist())
        for place, expert in enumerate(plan.kept.experts[position]):
            units = sorted(scores["ffn.output_energy"][layer, expert].argsort()[-24:].tolist())
            assert torch.equal(after[name.format(position, place)], before[name.format(layer, expert)][units])


def test_experts_cannot_be_fewer_than_a_token_is_routed_to(teacher_of):
    teacher = teacher_of("mixtral")
    with pytest.raises(ConfigError, match="fewer than the 2 that each token is routed to"):
        make_plan(teacher.config, teacher.family, None, PruneConfig(experts=1))
    with pytest.raises(ConfigError, match=r"prune\.experts"):
        make_plan(teacher.config, teacher.family, None, PruneConfig(experts=5))
    dense = teacher_of("llama")
    with pytest.raises(ConfigError, match="no mixture of experts"):
        make_plan(dense.config, dense.family, None, PruneConfig(experts=2))
    with pytest.raises(ConfigError, match=r"(?s)prune\.axes.*axes of a dense teacher"):
        make_plan(dense.config, dense.family, None, PruneConfig(target_params="70%", axes=("ffn", "experts")))


def test_a_target_counts_what_the_kept_experts_cost(teacher_of):
    teacher = teacher_of("olmoe")
    cfg = PruneConfig(target_params="70%", experts=3, axes=("ffn",), ffn_divisor=1)
    plan = make_plan(teacher.config, teacher.family, random_scores(teacher.config, teacher.family), cfg)
    assert plan.student.experts == 3
    assert plan.student_params.total == pytest.approx(0.7 * plan.teacher_params.total, rel=0.03)
    assert len(plan.kept.ffn) == 3 * 3
    assert plan.kept.ffn[0] != plan.kept.ffn[1]


def test_active_parameters_are_those_of_the_experts_that_a_token_gets(teacher_of):
    teacher = teacher_of("qwen3_moe")  # 2 of 5 experts, 3 layers, three matrices of 48 × 32
    counted = teacher.family.count_params(teacher.config)
    assert counted.total - counted.active == 3 * 3 * 3 * 48 * 32
    dense = teacher_of("gpt2").family.count_params(teacher_of("gpt2").config)
    assert dense.active == dense.total


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "would change with its number"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only causal"),
    ],
)
def test_models_that_a_file_does_not_describe_are_refused(teacher_of, model_type, changes, message):
    config = {**teacher_of(model_type).config, **changes}
    with pytest.raises(CheckpointError, match=message):
        load_family(config, "config.json")


@pytest.mark.parametrize(
    ("model_type", "cut", "message"),
    [
        ("gpt2", {"hidden": 24}, r"head_dim \(8\) is not hidden // heads \(6\)"),
        ("olmoe", {"hidden": 24}, "head_dim"),
        ("gemma2", {"hidden": 30}, "not a multiple of heads"),
    ],
)
def test_axes_that_hang_together_say_so(teacher_of, model_type, cut, message):
    teacher = teacher_of(model_type)
    with pytest.raises(ConfigError, match=message):
        make_plan(teacher.config, teacher.family, None, PruneConfig(**cut))


def test_longrope_ties_the_hidden_size_to_the_heads(teacher_of):
    teacher = teacher_of("phi3")
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    config = json.loads(json.dumps({**teacher.config, "rope_parameters": rope}))
    family = load_family(config, "config.json")
    with pytest.raises(ConfigError, match="longrope"):
        make_plan(config, family, None, PruneConfig(hidden=24))
    make_plan(config, family, None, PruneConfig(ffn=24))


@pytest.mark.parametrize("model_type", ["gpt2", "olmoe", "gemma2", "granite"])
def test_a_candidates_masked_score_is_that_of_its_student(teacher_of, tmp_path, model_type):
    """The search scores candidates before they are written: transposed, stacked, folded and scaled weights too."""
    teacher = teacher_of(model_type)
    plan = teacher.prune(tmp_path / "student", **cut_of_all(teacher.family), compensate="ridge", layer_repair="none")
    labels = torch.cat([teacher.ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    positions = torch.arange(labels.shape[1]).expand_as(labels)
    batch = SimpleNamespace(input_ids_BS=teacher.ids, position_ids_BS=positions, labels_BS=labels)
    ridge = PruneConfig(ffn=1).ridge_lambda
    (found,) = score_masked(
        teacher.checkpoint, teacher.family, [plan], [batch], calibration=teacher.batches, ridge=ridge
    )
    models = [load_model(p, dtype=torch.float32, device=CPU) for p in (teacher.checkpoint.path, tmp_path / "student")]
    with torch.no_grad():
        logits = [model(input_ids=teacher.ids, use_cache=False).logits[:, :-1] for model in models]
    theirs, ours = (torch.log_softmax(values, dim=-1) for values in logits)
    assert found.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), abs=2e-5)
    assert found.kl > 1e-3


def test_a_search_stays_with_shapes_that_the_family_has(teacher_of):
    """GPT-2's hidden size is heads · head_dim: a target that needs both cuts them together."""
    teacher = teacher_of("gpt2")
    cfg = PruneConfig(target_params="50%", axes=("ffn", "kv_heads", "hidden"), hidden_divisor=8, ffn_divisor=8)
    plan = make_plan(teacher.config, teacher.family, random_scores(teacher.config, teacher.family), cfg)
    assert plan.student.hidden == plan.student.heads * 8 < 32
    self_check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)
