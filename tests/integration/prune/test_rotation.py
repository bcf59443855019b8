"""The rotated teacher is the teacher, and its first channels are the ones to keep."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families.tensor_specs import TensorSpec
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.plan import Plan
from kdscale.prune.rotation import RotatedTeacher, rotated_teacher, rotation_obstacle, untied_config
from kdscale.prune.search.hidden_basis import hidden_bases
from kdscale.prune.search.planning import make_plan
from kdscale.runs.importance_scores import ROTATION, load_scores
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")


def _plan_in_basis(teacher, scores, **prune) -> Plan:
    """As the plan stage does: the plan of the first basis that it suits."""
    for basis in hidden_bases(teacher.config, teacher.family, PruneConfig(**{"hidden_method": "pca", **prune})):
        plan = make_plan(basis.config, teacher.family, scores, basis.cfg)
        if basis.suits(plan):
            break
    plan.warnings.extend(basis.warnings(plan))
    return plan


def _plan(teacher, tmp_path, **prune) -> tuple[Plan, RotatedTeacher]:
    scores = teacher.scores(tmp_path / "scores", **prune)
    plan = _plan_in_basis(teacher, scores, **prune)
    return plan, rotated_teacher(teacher.checkpoint, teacher.family, scores)


def _write(teacher, plan, rotated, folder, **prune):
    folder.mkdir()
    cfg = PruneConfig(**prune)
    apply_plan(rotated, teacher.family, plan, folder, cfg, batches=teacher.batches, reporter=Reporter(quiet=True))
    return folder


def _logits(folder, ids):
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32, device=CPU)(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["tiny", "qwen3", "biased"])
def test_the_turned_teacher_computes_the_same(teacher, other_teachers, tmp_path, kind):
    one = teacher if kind == "tiny" else other_teachers(kind)
    hidden = one.family.dims(one.config).hidden
    _, rotated = _plan(one, tmp_path, hidden=hidden - 12)
    whole = make_plan(rotated.config, one.family, None, PruneConfig(hidden=hidden))
    folder = _write(one, whole, rotated, tmp_path / "whole", hidden=hidden)
    want = _logits(one.checkpoint.path, one.ids)
    assert (_logits(folder, one.ids) - want).norm() < 1e-5 * want.norm()
    assert not one.family.tied(rotated.config)
    for name, spec in one.family.tensors(rotated.config).items():
        assert rotated.tensor(name).shape == spec.shape == rotated.spec(name).shape


@pytest.mark.parametrize("kind", ["tiny", "qwen3", "biased"])
@pytest.mark.parametrize("more", [{}, {"ffn": 48, "heads": 3, "layers": 2}])
def test_a_student_of_principal_components_passes_every_check(teacher, other_teachers, tmp_path, kind, more):
    one = teacher if kind == "tiny" else other_teachers(kind)
    dims = one.family.dims(one.config)
    cut = {"hidden": dims.hidden - 24, **more}
    if "heads" in cut:
        cut["heads"] = dims.kv_heads
    plan, rotated = _plan(one, tmp_path, **cut)
    assert plan.methods.hidden == "pca"
    assert plan.kept.hidden == list(range(cut["hidden"]))
    assert any("tie" in warning for warning in plan.warnings) == bool(one.family.tied(one.config))
    folder = _write(one, plan, rotated, tmp_path / "student", **cut)
    text = plan.to_json()
    assert Plan.from_json(text, config=rotated.config, family=one.family) == plan
    self_check.self_check(rotated, one.family, plan, folder, one.ids)


def test_principal_components_are_nearer_to_the_teacher_than_channels(teacher, tmp_path):
    cut = {"hidden": 72, "compensate": "ridge"}
    plan, rotated = _plan(teacher, tmp_path, **cut)
    student = _write(teacher, plan, rotated, tmp_path / "pca", **cut)
    teacher.prune(tmp_path / "channels", **cut)
    want = _logits(teacher.checkpoint.path, teacher.ids)
    errors = [
        float((_logits(folder, teacher.ids) - want).square().mean()) for folder in (student, tmp_path / "channels")
    ]
    assert errors[0] < 0.9 * errors[1]


def test_energies_fall_and_the_matrix_is_orthogonal_and_repeatable(teacher, tmp_path):
    one, two = (teacher.scores(tmp_path / name, hidden=72) for name in ("one", "two"))
    assert np.array_equal(one[ROTATION], two[ROTATION])
    assert (np.diff(one["hidden.pca"]) <= 0).all()
    assert np.allclose(one[ROTATION] @ one[ROTATION].T, np.eye(len(one[ROTATION])), atol=1e-5)
    # every token at every norm has a mean square of one, except where the padding token has just been embedded
    tokens = sum(batch.input_ids_BS.numel() for batch in teacher.batches)
    sites = 2 * teacher.family.dims(teacher.config).layers + 1
    assert one["hidden.pca"].sum() == pytest.approx(tokens * sites * len(one[ROTATION]), rel=2e-3)


def test_methods_and_what_they_need(teacher, tmp_path):
    scores = teacher.scores(tmp_path, hidden=72)
    plain = _plan_in_basis(teacher, scores, hidden=72, hidden_method="activation")
    assert plain.methods.hidden == "activation"
    assert plain.student_params.total < _plan_in_basis(teacher, scores, hidden=72).student_params.total
    missing = {name: value for name, value in scores.items() if name != ROTATION}
    with pytest.raises(ConfigError, match=r"hidden\.rotation"):
        rotated_teacher(teacher.checkpoint, teacher.family, missing)
    skewed = scores | {ROTATION: scores[ROTATION] * 1.01}
    with pytest.raises(ConfigError, match="orthogonal"):
        rotated_teacher(teacher.checkpoint, teacher.family, skewed)
    assert set(load_scores(tmp_path)) == set(scores)


def test_an_open_hidden_axis_that_the_search_leaves_whole_changes_nothing(teacher, tmp_path):
    prune = {"target_params": "80%", "count": "non_embedding", "axes": ("ffn", "hidden"), "ffn_divisor": 8}
    scores = teacher.scores(tmp_path, **prune)
    for name in ("ffn.output_energy", "ffn.activation"):
        scores[name] = np.zeros_like(scores[name])  # any unit may go for nothing
        scores[name][:, :2] = 1
    plan = _plan_in_basis(teacher, scores, **prune)
    assert plan.student.hidden == plan.teacher.hidden
    assert plan.methods.hidden == "uncut"
    assert Plan.from_json(plan.to_json(), config=teacher.config, family=teacher.family) == plan


@pytest.mark.parametrize(
    ("role", "axes", "reason"),
    [
        ("attn_post_norm", ("hidden",), "not right before"),
        ("attn_norm_bias", ("hidden",), "LayerNorm"),
        ("position_embed", ("positions", "hidden"), "learned positions"),
    ],
)
def test_families_that_cannot_be_rotated(teacher, role, axes, reason):
    family = teacher.family
    extra = {"model.extra.weight": TensorSpec(shape=(96,), axes=axes, layer=None, role=role, parameter="extra")}
    other = SimpleNamespace(
        name="other",
        data=family.data,
        dims=family.dims,
        tied=family.tied,
        tensors=lambda config: family.tensors(config) | extra,
    )
    assert rotation_obstacle(family, teacher.config) is None
    assert reason in rotation_obstacle(other, teacher.config)
    with pytest.raises(ConfigError, match="hidden_method=activation"):
        hidden_bases(teacher.config, other, PruneConfig(hidden=72, hidden_method="pca"))
    (basis,) = hidden_bases(teacher.config, other, PruneConfig(hidden=72, compensate="ridge"))
    assert basis.cfg.hidden_method == "activation"
    assert untied_config(teacher.config, family) | teacher.config == teacher.config
