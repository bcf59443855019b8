"""Pruning on a GPU, a fake one: no step mixes devices, also after a kill, and all numbers are those of a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.criteria import CRITERIA
from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_stream import LayerStream
from kdscale.prune.apply import apply_plan
from kdscale.prune.importance import collect
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.prune.self_check import self_check
from kdscale.runs.importance_scores import DIRECTIONS, ROTATION
from kdscale.runtime.device import resolve_device
from kdscale.runtime.progress import Reporter
from tests.fake_gpu.cuda import fake_gpu
from tests.integration.prune.family_table import ALL, EXPERTS, random_scores, save_teacher

CPU, SILENT = torch.device("cpu"), Reporter(quiet=True)
METHOD_FIELDS = {"ffn": "ffn_method", "heads": "head_method", "hidden": "hidden_method", "layers": "layer_method"}
CUTS = {axis: {axis: size} for axis, size in {**ALL, **EXPERTS}.items()}


class Killed(BaseException):
    """What a kill is to the code: nothing that it could catch."""


@pytest.fixture(scope="module")
def dense(teacher_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return teacher_class(save_teacher("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def mixture(teacher_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return teacher_class(save_teacher("mixtral", tmp_path_factory.mktemp("mixtral")))


def die_once_at(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """The first time that `layer` is read nothing goes on."""
    read, died = LayerStream.layer, []

    def layer_or_death(self: LayerStream, index: int) -> Any:
        if index == layer and not died:
            died.append(index)
            raise Killed
        return read(self, index)

    monkeypatch.setattr(LayerStream, "layer", layer_or_death)


def scores(teacher: Any, cut: dict[str, Any], device: torch.device, scratch: Scratch) -> dict[str, np.ndarray]:
    cfg = ImportanceConfig(dtype="float32")
    return collect.score_teacher(
        teacher.checkpoint, teacher.family, teacher.batches, cfg, PruneConfig(**cut), None, device, SILENT, scratch
    )  # fmt: skip


@pytest.mark.parametrize("row", [row for row in CRITERIA if row.axis in CUTS], ids=lambda row: row.name)
def test_every_criterion_is_measured_and_resumed(row, dense, mixture, tmp_path, monkeypatch):
    model = mixture if row.axis == "experts" else dense
    cut: dict[str, Any] = dict(CUTS[row.axis])
    if row.axis in METHOD_FIELDS:
        cut[METHOD_FIELDS[row.axis]] = row.method
    expected = scores(model, cut, CPU, Scratch())
    die_once_at(monkeypatch, 2)
    scratch = Scratch(tmp_path / "scratch")
    with fake_gpu():
        device = resolve_device("cuda")
        with pytest.raises(Killed):
            scores(model, cut, device, scratch)
        got = scores(model, cut, device, scratch)
    assert got.keys() == expected.keys()
    for name in expected:
        # eigenvectors of neighbouring eigenvalues turn into each other at the least change
        tolerance = 2e-3 if name in (ROTATION, DIRECTIONS) else 1e-4
        assert np.abs(got[name] - expected[name]).max() <= tolerance * np.abs(expected[name]).max(), name


COMPENSATIONS = {
    "one stream": {"compensate": "ridge"},
    "two streams": {"compensate": "two_stream"},
    "layer gaps": {"compensate": "none", "layer_repair": "linear", "layer_method": "last"},
    "gaps and two streams": {"compensate": "two_stream", "layer_repair": "linear", "layer_method": "last"},
}


def same_tensors(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("kind", "how"), [
    (kind, how) for kind in ("dense", "mixture") for how in COMPENSATIONS if kind == "dense" or "gaps" not in how
])  # fmt: skip
def test_students_are_compensated_resumed_and_checked(kind, how, request, tmp_path, monkeypatch):
    model = request.getfixturevalue(kind)
    cut = {"ffn": ALL["ffn"], "heads": ALL["heads"], "hidden": ALL["hidden"], "layers": 2, **COMPENSATIONS[how]}
    if kind == "mixture":
        cut |= EXPERTS
    cfg = PruneConfig(**cut, hidden_method="activation")
    plan = make_plan(model.config, model.family, random_scores(model.config, model.family), cfg)

    def write(out: Path, device: torch.device, scratch: Scratch) -> None:
        apply_plan(model.checkpoint, model.family, plan, out, cfg, batches=model.batches, device=device,
                   reporter=SILENT, scratch=scratch)  # fmt: skip

    for name in ("whole", "student"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", CPU, Scratch())
    scratch = Scratch(tmp_path / "scratch")
    dropped = set(range(plan.teacher.layers)) - set(plan.kept.layers)
    die_once_at(monkeypatch, max(dropped) if "layer_repair" in cut else plan.kept.layers[1])
    with fake_gpu():
        device = resolve_device("cuda")
        with pytest.raises(Killed):
            write(tmp_path / "student", device, scratch)
        write(tmp_path / "student", device, scratch)
        self_check(model.checkpoint, model.family, plan, tmp_path / "student", model.ids, device=device)
    same_tensors(tmp_path / "student", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_candidates_are_scored_masked(kind, request):
    model = request.getfixturevalue(kind)
    batch = SimpleNamespace(**vars(model.batches[0]), labels_BS=model.batches[0].input_ids_BS.roll(-1, 1))
    cuts: list[dict[str, Any]] = [{"ffn": ALL["ffn"]}, {"hidden": ALL["hidden"], "hidden_method": "activation"}]
    cuts += [EXPERTS] if kind == "mixture" else [{"heads": ALL["heads"], "layers": 2}]
    given = random_scores(model.config, model.family)
    plans = [make_plan(model.config, model.family, given, PruneConfig(**cut)) for cut in cuts]

    def score(device: torch.device) -> list[float]:
        found = score_masked(
            model.checkpoint, model.family, plans, [batch], calibration=model.batches, ridge=0.01, device=device
        )
        return [score.kl for score in found]

    expected = score(CPU)
    with fake_gpu():
        assert score(resolve_device("cuda")) == pytest.approx(expected, rel=1e-4)
