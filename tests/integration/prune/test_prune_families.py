"""The table that every family passes: names and shapes on disk, identity, every axis, reload, decoding with a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdscale.config import PruneConfig
from kdscale.families import supported_types
from kdscale.prune import check
from kdscale.prune.plan import make_plan
from tests.integration.prune.family_table import TEACHERS, cuts_of, save_teacher


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory, teacher_class) -> Callable:
    made = {}

    def get(model_type):
        if model_type not in made:
            folder = save_teacher(model_type, tmp_path_factory.mktemp(model_type))
            made[model_type] = teacher_class(folder)
        return made[model_type]

    return get


def random_scores(teacher) -> dict[str, np.ndarray]:
    """Scores that keep units scattered over each axis, so that a slice of the first ones would show."""
    dims, rng = teacher.family.dims(teacher.config), np.random.default_rng(3)
    shapes = {
        "ffn.output_energy": (dims.layers, dims.experts, dims.ffn) if dims.experts else (dims.layers, dims.ffn),
        "heads.output_energy": (dims.layers, dims.heads),
        "kv_heads.output_energy": (dims.layers, dims.kv_heads),
        "hidden.activation": (dims.hidden,),
        "layers.block_influence": (dims.layers,),
        "experts.output_norm": (dims.layers, dims.experts),
    }
    return {name: rng.random(shape) for name, shape in shapes.items()}


def test_every_family_is_in_the_table():
    assert set(TEACHERS) == set(supported_types())


@pytest.mark.parametrize("model_type", TEACHERS)
def test_names_and_shapes_are_those_on_disk_and_identity_copies_every_byte(teacher_of, tmp_path, model_type):
    teacher = teacher_of(model_type)
    before = load_file(teacher.checkpoint.path / "model.safetensors")
    expected = {name: spec.shape for name, spec in teacher.family.tensors(teacher.config).items()}
    assert expected == {name: tuple(value.shape) for name, value in before.items()}
    plan = teacher.prune(tmp_path / "same", ffn=teacher.family.dims(teacher.config).ffn)
    assert plan.cut_axes() == []
    after = load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
    figures = check.reload_parity(tmp_path / "same", teacher.family, teacher.ids)
    assert max(figures.values()) < 1e-5


@pytest.mark.parametrize("model_type", TEACHERS)
def test_masked_teacher_is_the_sliced_student_on_every_axis(teacher_of, model_type):
    teacher = teacher_of(model_type)
    for axis, cut in cuts_of(teacher.family).items():
        plan = make_plan(teacher.config, teacher.family, random_scores(teacher), PruneConfig(**cut))
        assert set(cut) <= set(plan.cut_axes())
        figures = check.masked_equals_sliced(teacher.checkpoint, teacher.family, plan, teacher.ids)
        assert max(figures.values()) < 1e-5, axis


@pytest.mark.parametrize("compensate", ["none", "ridge"])
@pytest.mark.parametrize("model_type", TEACHERS)
def test_a_student_cut_on_all_axes_passes_the_self_check(teacher_of, tmp_path: Path, model_type, compensate):
    teacher = teacher_of(model_type)
    plan = teacher.prune(tmp_path / "student", **cuts_of(teacher.family)["all"], compensate=compensate)
    figures = check.self_check(teacher.checkpoint, teacher.family, plan, tmp_path / "student", teacher.ids)
    assert max(figures.values()) < 1e-5
