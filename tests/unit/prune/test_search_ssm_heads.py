"""The axes of recurrent mixers: which sizes a search lists, which heads stay, and what is refused; no torch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import load_family
from kdscale.prune.plan import Plan
from kdscale.prune.search.planning import make_plan
from tests.unit.families.small_configs import small_config

_CONFIG: dict[str, Any] = {
    "model_type": "falcon_h1", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "mamba_n_heads": 12, "mamba_d_head": 32,
    "mamba_d_ssm": 384, "mamba_n_groups": 2, "mamba_d_state": 16,
}  # fmt: skip
_FAMILY = load_family(_CONFIG, "config.json")


def _scores() -> dict[str, np.ndarray]:
    # the first group's heads are all stronger than the second's, and still each keeps as many
    heads_M = np.array([9.0, 1, 8, 2, 7, 3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.3])
    return {"ssm_heads.output_energy": np.stack([heads_M, heads_M[::-1]])}


def test_each_group_keeps_its_strongest_heads() -> None:
    plan = make_plan(_CONFIG, _FAMILY, _scores(), PruneConfig(ssm_heads=6))
    assert plan.kept.ssm_heads == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert plan.cut_axes() == ["ssm_heads"]
    assert plan.methods.ssm_heads == "output_energy"
    assert plan.retained["ssm_heads"] == pytest.approx(26.4 / 33.0)
    student = _FAMILY.student_config(_CONFIG, plan.student.dims(), plan.kept.layers)
    assert (student["mamba_n_heads"], student["mamba_d_ssm"], student["mamba_n_groups"]) == (6, 192, 2)
    assert plan.student_params.total == _FAMILY.count_params(student).total


def test_the_heads_of_a_layer_lose_the_same_channels() -> None:
    energy_LP = np.stack([np.arange(32.0), np.arange(32.0)[::-1]])
    plan = make_plan(_CONFIG, _FAMILY, {"ssm_head_dim.output_energy": energy_LP}, PruneConfig(ssm_head_dim=24))
    assert plan.kept.ssm_head_dim == [list(range(8, 32)), list(range(24))]
    assert plan.kept.ssm_heads == [list(range(12))] * 2
    assert plan.cut_axes() == ["ssm_head_dim"]
    student = _FAMILY.student_config(_CONFIG, plan.student.dims(), plan.kept.layers)
    assert (student["mamba_d_head"], student["mamba_n_heads"], student["mamba_d_ssm"]) == (24, 12, 288)
    assert plan.student_params.total == _FAMILY.count_params(student).total
    searched = make_plan(_CONFIG, _FAMILY, None, PruneConfig(target_params="85%", axes=("ssm_heads", "ssm_head_dim")))
    assert {candidate.ssm_head_dim % 8 for candidate in searched.candidates} == {0}


def test_the_groups_of_a_layer_lose_the_same_state_channels() -> None:
    energy_LZ = np.stack([np.arange(16.0), np.arange(16.0)[::-1]])
    plan = make_plan(_CONFIG, _FAMILY, {"ssm_state.output_energy": energy_LZ}, PruneConfig(ssm_state=8))
    assert plan.kept.ssm_state == [list(range(8, 16)), list(range(8))]
    assert plan.cut_axes() == ["ssm_state"]
    assert plan.retained["ssm_state"] == pytest.approx(92 / 120)
    student = _FAMILY.student_config(_CONFIG, plan.student.dims(), plan.kept.layers)
    assert (student["mamba_d_state"], student["mamba_n_groups"], student["mamba_d_ssm"]) == (8, 2, 384)
    assert plan.student_params.total == _FAMILY.count_params(student).total
    # of two layers: rows of B and C of both groups in the projection (256 wide) and the convolution (4 wide, a bias)
    assert plan.teacher_params.total - plan.student_params.total == 2 * (2 * 2 * 8) * (256 + 4 + 1)
    searched = make_plan(
        _CONFIG, _FAMILY, None, PruneConfig(target_params="98%", axes=("ssm_state",), ssm_state_divisor=4)
    )
    assert {candidate.ssm_state % 4 for candidate in searched.candidates} == {0}
    assert searched.student.ssm_state < 16


def test_the_width_of_a_delta_nets_keys_is_refused_with_its_reason() -> None:
    config = small_config("qwen3_5_text")
    family = load_family(config, "config.json")
    for asked in (PruneConfig(ssm_state=4), PruneConfig(target_params="90%", axes=("ssm_state",))):
        with pytest.raises(ConfigError, match="brought to length 1 over all channels of a key"):
            make_plan(config, family, None, asked)


def test_a_search_lists_multiples_of_the_groups_and_meets_the_budget() -> None:
    plan = make_plan(_CONFIG, _FAMILY, _scores(), PruneConfig(target_params="80%", axes=("ssm_heads",)))
    assert plan.student.ssm_heads % 2 == 0
    assert plan.student.ssm_heads < 12
    assert plan.target.off_by is not None
    assert abs(plan.target.off_by) <= 0.03
    assert {candidate.ssm_heads % 2 for candidate in plan.candidates} == {0}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"ssm_heads": 5}, r"ssm_heads \(5\) is not a multiple of ssm_groups \(2\)"),
        ({"ssm_heads": 14}, "at most the teacher's 12"),
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_plan(_CONFIG, _FAMILY, None, PruneConfig(**sizes))


def test_models_without_such_heads_have_no_such_axis(small_config: dict[str, Any], small_family: Any) -> None:
    for asked in (PruneConfig(ssm_heads=4), PruneConfig(target_params="80%", axes=("ffn", "ssm_heads"))):
        with pytest.raises(ConfigError, match=r"no layers with ssm heads|whose layers have no ssm heads"):
            make_plan(small_config, small_family, None, asked)


def test_an_edited_plan_whose_groups_differ_is_refused() -> None:
    plan = json.loads(make_plan(_CONFIG, _FAMILY, _scores(), PruneConfig(ssm_heads=6)).to_json())
    plan["kept"]["ssm_heads"][1] = [0, 1, 2, 3, 6, 7]
    with pytest.raises(ConfigError, match=r"kept\.ssm_heads\[1\]: expected 3 heads in group 0, got 4"):
        Plan.from_json(json.dumps(plan), config=_CONFIG, family=_FAMILY)


def test_a_width_that_is_said_twice_must_agree() -> None:
    config = {**_CONFIG, "mamba_d_ssm": 400}
    with pytest.raises(CheckpointError, match=r"mamba_d_ssm \(400\) is not 384"):
        load_family(config, "config.json").dims(config)
