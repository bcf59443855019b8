"""A narrower stream, and all that reads and writes it refitted: a plain model of its family, a tied head still tied."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_stream import LayerStream
from kdscale.models.loading import load_model
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.plan import Plan
from kdscale.prune.search.hidden_basis import hidden_bases
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.prune.slicing import Slicer
from kdscale.prune.stream_cut import CutStudent, StreamBasis, refit_obstacle
from kdscale.runs.importance_scores import DIRECTIONS, FINAL_COVARIANCE
from kdscale.runtime.progress import Reporter

CPU = torch.device("cpu")


class Killed(BaseException):
    """What a kill is to the code."""


def _plan(one, scores, **cut) -> Plan:
    (basis,) = hidden_bases(one.config, one.family, PruneConfig(**cut))
    return make_plan(basis.config, one.family, scores, basis.cfg)


def _write(one, plan, scores, folder, scratch=None, **cut):
    folder.mkdir(exist_ok=True)
    basis, quiet = StreamBasis.of(scores, plan.student.hidden), Reporter(quiet=True)
    apply_plan(
        one.checkpoint, one.family, plan, folder, PruneConfig(**cut),
        batches=one.batches, reporter=quiet, basis=basis, scratch=scratch or Scratch(),
    )  # fmt: skip
    return folder


def _logits(folder, ids):
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32, device=CPU)(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("tiny", {}),
        ("biased", {}),
        ("tiny", {"ffn": 48, "heads": 3, "layers": 2, "layer_repair": "none"}),
        ("gemma3", {}),
    ],
)
def test_a_refitted_student_passes_every_check_and_is_nearer(teacher, other_teachers, tmp_path, kind, more):
    one = teacher if kind == "tiny" else other_teachers(kind)
    cut = {"hidden": one.family.dims(one.config).hidden - 24, "hidden_method": "refit", **more}
    if "heads" in cut:
        cut["heads"] = one.family.dims(one.config).kv_heads
    scores = one.scores(tmp_path / "scores", **cut)
    plan = _plan(one, scores, **cut)
    assert plan.methods.hidden == "refit"
    assert plan.kept.hidden == list(range(cut["hidden"]))
    folder = _write(one, plan, scores, tmp_path / "student", **cut)
    assert Plan.from_json(plan.to_json(), config=one.config, family=one.family) == plan
    self_check.self_check(one.checkpoint, one.family, plan, folder, one.ids)
    one.prune(tmp_path / "channels", scores, **cut | {"hidden_method": "activation"})
    want = _logits(one.checkpoint.path, one.ids)
    errors = [float((_logits(at, one.ids) - want).square().mean()) for at in (folder, tmp_path / "channels")]
    assert errors[0] < 0.8 * errors[1]


def test_sizes_that_a_norm_takes_away_do_not_count(other_teachers, teacher_class, tmp_path):
    """Tokens' MLP outputs differ in size a hundredfold, and the norm behind them makes all of one size: a regression
    of sizes has 0.19 of the logits' variance as its error, one of directions 0.13."""
    model = load_model(other_teachers("gemma3").checkpoint.path, dtype=torch.float32, device=CPU)
    for name, weight in model.named_parameters():
        if "gate_proj" in name:
            weight.data *= 30
    model.save_pretrained(tmp_path / "teacher")
    one, cut = teacher_class(tmp_path / "teacher"), {"hidden": 72, "hidden_method": "refit"}
    scores = one.scores(tmp_path / "scores", **cut)
    folder = _write(one, _plan(one, scores, **cut), scores, tmp_path / "student", **cut)
    want = _logits(one.checkpoint.path, one.ids)
    assert (_logits(folder, one.ids) - want).square().mean() < 0.15 * want.var()


def test_the_start_is_the_teacher_where_nothing_is_cut(other_teachers, tmp_path):
    """An untied model with plain norms, its stream turned by a whole rotation: the same function, in fp64."""
    one = other_teachers("biased")
    hidden = one.family.dims(one.config).hidden
    rotation = torch.linalg.qr(torch.randn(hidden, hidden, dtype=torch.float64, generator=torch.Generator()))[0]
    plan = make_plan(one.config, one.family, None, PruneConfig(hidden=hidden))
    slicer = Slicer(one.config, one.family, plan)
    start = CutStudent(slicer, one.checkpoint.tensor, StreamBasis(rotation, rotation.T.contiguous()))
    batch = SimpleNamespace(input_ids_BS=one.ids, position_ids_BS=torch.arange(one.ids.shape[1]).expand_as(one.ids))
    outputs = []
    for source in (one.checkpoint.tensor, start.tensor):
        stream = LayerStream(one.config, one.family, source, dtype=torch.float64, device=CPU)
        with torch.inference_mode():
            state = stream.embed([batch])[0]
            for layer in stream.layers():
                state = layer(state, batch.position_ids_BS)
            outputs.append(stream.head()(stream.final_norm()(state)))
    assert (outputs[1] - outputs[0]).norm() < 1e-5 * outputs[0].norm()


def test_a_killed_refit_goes_on_with_the_same_bytes(teacher, tmp_path, monkeypatch):
    cut = {"hidden": 72, "hidden_method": "refit", "max_shard_bytes": 60_000}
    scores = teacher.scores(tmp_path / "scores", **cut)
    plan = _plan(teacher, scores, **cut)
    whole = _write(teacher, plan, scores, tmp_path / "whole", **cut)
    scratch, read = Scratch(tmp_path / "scratch"), LayerStream.layer

    def die(self, index):
        if index == 2:
            raise Killed
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "layer", die)
        with pytest.raises(Killed):
            _write(teacher, plan, scores, tmp_path / "student", scratch, **cut)
    again = _write(teacher, plan, scores, tmp_path / "student", scratch, **cut)
    hashes = [
        {at.name: hashlib.sha256(at.read_bytes()).digest() for at in folder.iterdir()} for folder in (whole, again)
    ]
    assert hashes[0] == hashes[1]


def test_candidates_are_scored_in_the_directions_that_stay(teacher, tmp_path):
    ids = teacher.ids[:, :40]
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    batch = SimpleNamespace(input_ids_BS=ids, position_ids_BS=torch.arange(40).expand(2, -1), labels_BS=labels)
    plans, scores = [], {}
    for hidden in (84, 48):
        cut = {"hidden": hidden, "ffn": 96}
        scores = teacher.scores(tmp_path / f"scores-{hidden}", **cut)
        plans.append(_plan(teacher, scores, **cut))
    found = score_masked(
        teacher.checkpoint, teacher.family, plans, [batch], calibration=teacher.batches, ridge=1e-2, importance=scores
    )
    assert 0 < found[0].kl < found[1].kl
    with pytest.raises(ConfigError, match=r"hidden\.directions"):
        score_masked(teacher.checkpoint, teacher.family, plans, [batch], calibration=teacher.batches, ridge=1e-2)


def test_where_it_is_not_done(teacher, other_teachers, tmp_path):
    auto = {"hidden": 72}
    assert hidden_bases(teacher.config, teacher.family, PruneConfig(**auto))[0].cfg.hidden_method == "refit"
    for settings, reason in (
        ({"compensate": "ridge"}, "compensate=ridge"),
        ({"layer_repair": "linear", "layers": 3}, "layer_repair"),
    ):
        assert (
            hidden_bases(teacher.config, teacher.family, PruneConfig(**auto, **settings))[0].cfg.hidden_method == "pca"
        )
        with pytest.raises(ConfigError, match=reason):
            hidden_bases(teacher.config, teacher.family, PruneConfig(**auto, **settings, hidden_method="refit"))
    scaled = {**teacher.config, "residual_multiplier": 0.5}
    assert "residual_multiplier" in str(refit_obstacle(teacher.family, scaled))
    gemma = other_teachers("gemma3")
    assert refit_obstacle(gemma.family, gemma.config) is None
    assert hidden_bases(gemma.config, gemma.family, PruneConfig(**auto))[0].cfg.hidden_method == "refit"
    scores = teacher.scores(tmp_path, **auto)
    assert np.array_equal(scores[DIRECTIONS], scores["hidden.rotation"])
    assert scores[FINAL_COVARIANCE].trace() > 0
    plan = _plan(teacher, scores, **auto)
    with pytest.raises(ConfigError, match="refit"):
        apply_plan(
            teacher.checkpoint, teacher.family, plan, tmp_path / "out", PruneConfig(**auto), batches=teacher.batches
        )
