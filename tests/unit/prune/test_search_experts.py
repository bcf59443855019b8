"""The number of experts as an axis of the search: what it costs, which numbers are tried, and what it cannot change."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family, load_family
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.plan import Plan
from kdscale.prune.search.cost import CostModel
from kdscale.prune.search.planning import make_plan
from kdscale.prune.search.shapes import Search

PER_TOKEN = 3


@pytest.fixture(params=[8, 64])
def config(request):
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "num_experts": request.param,
        "num_experts_per_tok": PER_TOKEN,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }


@pytest.fixture
def family(config) -> Family:
    return load_family(config, "config.json")


@pytest.fixture
def scores(config, family):
    dims, rng = family.dims(config), np.random.default_rng(3)
    return {
        "ffn.output_energy": rng.random((dims.layers, dims.experts, dims.ffn)) ** 4,
        "experts.output_norm": rng.random((dims.layers, dims.experts)),
        "layers.one_by_one": rng.random(dims.layers),
    }


def test_costs_of_every_shape_are_the_familys_counts(config, family):
    cost, teacher = CostModel.of(config, family), family.dims(config)
    for ffn, layers, experts in product((32, 64), (2, 4), (PER_TOKEN, 5, 8)):
        dims = teacher.replace(ffn=ffn, layers=layers, experts=experts)
        shape = {axis: np.array([getattr(dims, axis)]) for axis in SHAPE_AXES}
        student = family.student_config(config, dims, list(range(layers)))
        counted = family.count_params(student)
        assert int(cost.params(shape, "total")[0]) == counted.total
        assert int(cost.params(shape, "non_embedding")[0]) == counted.non_embedding
        assert int(cost.active(shape)[0]) == counted.active < counted.total + (experts == PER_TOKEN)
        assert int(cost.bytes(shape)[0]) == 2 * counted.total


@pytest.mark.parametrize("target", ["params", "bytes"])
def test_a_target_is_met_by_fewer_experts(config, family, scores, target):
    axes = ("ffn", "experts")
    cfg = PruneConfig(**{f"target_{target}": "60%"}, axes=axes, ffn_divisor=8, tolerance=0.2)
    plan = make_plan(config, family, scores, cfg)
    whole, step = config["num_experts"], 8 if config["num_experts"] == 64 else 1
    tried = {item.experts for item in plan.candidates}
    assert len(tried) > 1
    assert all(experts % step == 0 and PER_TOKEN <= experts <= whole for experts in tried)
    for item in plan.candidates:
        dims = family.dims(config).replace(**dict(zip(SHAPE_AXES, item.sizes(), strict=True)))
        counted = family.count_params(family.student_config(config, dims, list(range(4))))
        assert (item.params, item.active) == (counted.total, counted.active)
    assert (plan.teacher_params.active, plan.student_params.active) == (
        family.count_params(config).active,
        plan.candidates[0].active,
    )
    assert Plan.from_json(plan.to_json(), config=config, family=family) == plan


def test_experts_alone_keep_the_best_of_each_layer(config, family, scores):
    plan = make_plan(config, family, scores, PruneConfig(target_params="80%", axes=("experts",), tolerance=0.2))
    assert plan.cut_axes() == ["experts"]
    for row, kept in zip(scores["experts.output_norm"], plan.kept.experts, strict=True):
        assert kept == sorted(np.argsort(-row)[: plan.student.experts].tolist())
    share = np.mean([np.sort(row**2)[::-1][: plan.student.experts].sum() / (row**2).sum()
                     for row in scores["experts.output_norm"]])  # fmt: skip
    assert plan.retained["experts"] == pytest.approx(share)


def test_the_divisor_of_the_config_counts(config, family):
    cfg = PruneConfig(target_params="60%", axes=("experts",), experts_divisor=4)
    stays = {row[SHAPE_AXES.index("experts")] for row in Search(config, family, None, cfg).space.all().tolist()}
    assert stays == set(range(4, config["num_experts"] + 1, 4))


def test_an_edited_count_of_active_parameters_is_refused(config, family):
    plan = make_plan(config, family, None, PruneConfig(experts=4))
    wrong = plan.student_params.model_copy(update={"active": 7})
    with pytest.raises(ConfigError, match=r"student_params\.active: expected \d+, got 7"):
        Plan.from_json(plan.model_copy(update={"student_params": wrong}).to_json(), config=config, family=family)


@pytest.mark.parametrize("target", ["target_decode", "target_kv_bytes"])
def test_targets_that_experts_do_not_change_refuse_them_alone(config, family, target):
    with pytest.raises(ConfigError, match=r"prune\.axes"):
        make_plan(config, family, None, PruneConfig(**{target: "50%"}, axes=("experts",)))
