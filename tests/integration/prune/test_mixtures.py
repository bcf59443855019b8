"""What mixtures have besides one kind of layer and one way to store experts: shared experts, biases, groups, sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import load_family
from kdscale.models.loading import load_model
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.search.planning import make_plan
from kdscale.prune.search.shapes import Search
from kdscale.prune.search.space import columns
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint
from tests.integration.prune.family_table import random_scores, save_teacher

CPU = torch.device("cpu")


def whole_model(teacher: Any, watch: str) -> tuple[Any, list[tuple[Tensor, ...]]]:
    """The teacher in plain transformers, and what its modules whose names end with `watch` were called with."""
    model, seen = load_model(teacher.checkpoint.path, dtype=torch.float32, device=CPU), []
    for name, module in model.named_modules():
        if name.endswith(watch):
            module.register_forward_pre_hook(lambda _module, args: seen.append(args))
    with torch.inference_mode():
        for batch in teacher.batches:  # two documents a row, which gpt-oss itself does not keep apart
            for ids_BS in batch.input_ids_BS.split([20, 28], dim=1):
                model(input_ids=ids_BS, use_cache=False)
    return model, seen


def test_scores_of_experts_with_biases_are_what_the_model_computes(teacher_of, tmp_path):
    """gpt-oss stores experts transposed, interleaves gate and up, and gives them biases."""
    teacher = teacher_of("gpt_oss")
    scores = teacher.scores(tmp_path, experts=4)["experts.output_norm"]
    model, calls = whole_model(teacher, "mlp.experts")
    norms = torch.zeros(3, 5)
    for number, (hidden_ND, chosen_NT, weights_NT) in enumerate(calls):
        experts = model.model.layers[number % 3].mlp.experts
        alone_N1 = torch.ones(len(hidden_ND), 1)
        for expert in range(5):
            with torch.inference_mode():
                output_ND = experts.forward(hidden_ND, torch.full_like(chosen_NT[:, :1], expert), alone_N1)
            share_N = (weights_NT * (chosen_NT == expert)).sum(-1)
            norms[number % 3, expert] += (share_N * output_ND.norm(dim=-1)).sum()
    torch.testing.assert_close(torch.from_numpy(scores), norms, rtol=1e-4, atol=1e-6)


def test_scores_of_experts_that_weigh_their_input_are_what_the_model_computes(teacher_of, tmp_path):
    """Llama 4 gives every expert every token, times a weight that is 0 for most."""
    teacher = teacher_of("llama4_text")
    scores = teacher.scores(tmp_path, experts=4)["experts.output_norm"]
    model, calls = whole_model(teacher, "feed_forward.router")
    norms, mixtures = torch.zeros(3, 5), (0, 2)
    for number, (hidden_ND,) in enumerate(list(calls)):  # the router is called here too
        block = model.model.layers[mixtures[number % 2]].feed_forward
        with torch.inference_mode():
            weights_NE, _ = block.router(hidden_ND)
            read_END = hidden_ND * weights_NE.T[..., None]
            output_END = block.experts(read_END.flatten(0, 1)).unflatten(0, (5, -1))
        norms[mixtures[number % 2]] += output_END.norm(dim=-1).sum(-1)
    torch.testing.assert_close(torch.from_numpy(scores), norms, rtol=1e-4, atol=1e-6)


def test_scores_of_a_shared_expert_and_of_dense_layers_are_what_the_model_computes(teacher_of, tmp_path):
    teacher = teacher_of("glm4_moe")
    scores = teacher.scores(tmp_path, ffn=32)
    model, _ = whole_model(teacher, "no module")
    parts = {"shared_ffn": ((1, 2), "mlp.shared_experts.down_proj"), "dense_ffn": ((0,), "mlp.down_proj")}
    for axis, (layers, path) in parts.items():
        found = torch.from_numpy(scores[f"{axis}.output_energy"])
        assert [bool(found[layer].any()) for layer in range(3)] == [layer in layers for layer in range(3)]
        _, calls = whole_model(teacher, f"{layers[0]}.{path}")
        weight_DF = model.model.layers[layers[0]].get_submodule(path).weight
        squares_F = torch.stack([args[0].square().sum((0, 1)) for args in calls]).sum(0)
        torch.testing.assert_close(found[layers[0]], squares_F * weight_DF.square().sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "roles"),
    [
        ("ernie4_5_moe", {"o", "down", "shared_down"}),
        ("nemotron_h, experts in a latent", {"o", "down", "shared_down"}),
        pytest.param("gpt_oss", {"o", "down"}, marks=pytest.mark.long),
        pytest.param("llama4_text", {"o", "down", "shared_down"}, marks=pytest.mark.long),
        pytest.param("gemma4_text, experts", {"o", "down", "shared_down"}, marks=pytest.mark.long),
    ],
)
def test_regression_wins_errors_back_in_every_part(teacher_of, tmp_path, model_type, roles):
    """In the teacher's stream the errors of all parts fall; in both streams the files are what the plan says."""
    teacher, cut = teacher_of(model_type), {"ffn": 24, "heads": 2, "experts": 4}
    scores, silent = teacher.scores(tmp_path / "scores", **cut), Reporter(quiet=True)
    for compensate in ("ridge", "two_stream"):
        cfg = PruneConfig(**cut, compensate=compensate)
        plan = make_plan(teacher.config, teacher.family, scores, cfg)
        recovered, out = RecoveredErrors(), tmp_path / compensate
        out.mkdir()
        run = {"batches": teacher.batches, "reporter": silent, "recovered": recovered}
        apply_plan(teacher.checkpoint, teacher.family, plan, out, cfg, **run)
        assert {row["role"] for row in recovered.rows} == roles
        if compensate == "ridge":
            assert all(row["after"] < row["before"] for row in recovered.rows), recovered.rows
        figures = self_check.self_check(teacher.checkpoint, teacher.family, plan, out, teacher.ids)
        assert max(figures.values()) < 1e-5


def test_experts_are_kept_group_by_group(teacher_of):
    teacher = teacher_of("deepseek_v3")  # 6 experts in 2 groups, of which a token chooses one and 2 experts in it
    scores = random_scores(teacher.config, teacher.family)
    scores["experts.output_norm"][:] = [1, 2, 3, 7, 8, 9]
    plan = make_plan(teacher.config, teacher.family, scores, PruneConfig(experts=4))
    assert plan.kept.experts == [[], [], [1, 2, 4, 5]]
    for count, message in ((5, "not a multiple of the 2 groups"), (2, "leave 1 in each of 2 groups")):
        with pytest.raises(ConfigError, match=message):
            make_plan(teacher.config, teacher.family, None, PruneConfig(experts=count))
    cfg = PruneConfig(target_params="60%", axes=("experts", "ffn"), ffn_divisor=8, tolerance=0.2)
    shapes = Search(teacher.config, teacher.family, scores, cfg).space.all()
    assert set(columns(shapes)["experts"].tolist()) == {4, 6}


def test_what_a_token_leaves_in_the_cache_of_latent_attention_does_not_depend_on_the_heads():
    config = {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "num_attention_heads": 16, "vocab_size": 102400, "num_experts_per_tok": 6, "q_lora_rank": None,
    }  # fmt: skip
    family = load_family(config, "config.json")
    assert family.cached_numbers(config) == 27 * (512 + 64)
    costs = Search(config, family, None, PruneConfig(target_kv_bytes="50%", axes=("layers",))).costs.model
    shapes = {axis: torch.tensor([size]).numpy() for axis, size in {"layers": 27, "kv_heads": 4}.items()}
    assert int(costs.kv_bytes(shapes)[0]) == 27 * 2 * 576


def test_a_budget_counts_the_layers_that_stay_and_not_a_mean_layer(teacher_of):
    """With a dense layer among mixtures the count of a student depends on which layers go."""
    teacher = teacher_of("glm4_moe")
    scores = random_scores(teacher.config, teacher.family)
    for order in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]):
        scores["layers.one_by_one"][:] = order
        plan = make_plan(teacher.config, teacher.family, scores, PruneConfig(layers=2, ffn=32))
        assert plan.candidates[0].params == plan.student_params.total
        assert plan.candidates[0].active == plan.student_params.active


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v2"])
def test_heads_of_latent_attention_are_cut_with_their_keys_and_values(teacher_of, model_type):
    teacher = teacher_of(model_type)
    with pytest.raises(ConfigError, match="heads"):
        make_plan(teacher.config, teacher.family, None, PruneConfig(heads=2))
    plan = make_plan(teacher.config, teacher.family, None, PruneConfig(kv_heads=2))
    assert (plan.student.heads, plan.student.kv_heads) == (2, 2)


def test_a_layer_behind_the_last_one_predicts_further_tokens_and_is_left_out(tmp_path):
    folder = save_teacher("glm4_moe", tmp_path / "teacher")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.3.eh_proj.weight": torch.ones(3, 3)}, path, {"format": "pt"})
    teacher = Checkpoint.open(folder)
    family = load_family(teacher.config, "config.json")
    assert teacher.verify_against(family) == ["1 tensors of the multi-token-prediction head are left out"]
    student = family.student_config(teacher.config, family.dims(teacher.config).replace(layers=2), [0, 2])
    assert student.get("num_nextn_predict_layers", 0) == 0
    load_model(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma4_text"])
def test_what_is_stored_and_no_parameter_is_read_with_a_model_in_parts(teacher_of, model_type):
    """A router's correction, a layer's scale: buffers, which the constructor would leave at 0 and 1."""
    path = teacher_of(model_type).checkpoint.path
    whole = load_model(path, dtype=torch.float32, device=CPU)
    parts = dict(build_skeleton(ParameterReader.open(path), dtype=torch.float32).named_buffers())
    stored = [name for name in parts if name.endswith(("correction_bias", "layer_scalar"))]
    assert stored
    for name, value in whole.named_buffers():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    assert all(float((parts[name] - parts[name].round()).abs().max()) > 0 for name in stored)
