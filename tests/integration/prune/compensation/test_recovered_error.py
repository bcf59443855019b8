"""Recovered errors in the report are those of the weights that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdscale.config.prune import PruneConfig
from kdscale.models.layer_stream import LayerStream
from kdscale.prune.apply import apply_plan
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

SHAPE = {"ffn": 64, "heads": 4, "layers": 3, "layer_repair": "none"}


def test_recorded_errors_are_those_of_the_files(teacher, tmp_path: Path) -> None:
    cfg = PruneConfig(**SHAPE)
    plan = make_plan(teacher.config, teacher.family, teacher.scores(tmp_path / "scores", **SHAPE), cfg)
    recovered, out = RecoveredErrors(tmp_path / "repair.json"), tmp_path / "out"
    out.mkdir()
    apply_plan(
        teacher.checkpoint, teacher.family, plan, out, cfg,
        batches=teacher.batches, reporter=Reporter(quiet=True), recovered=recovered,
    )  # fmt: skip
    rows = recovered.rows
    assert [(row["layer"], row["role"]) for row in rows] == [
        (layer, role) for layer in plan.kept.layers for role in ("down", "o")
    ]
    assert RecoveredErrors(tmp_path / "repair.json").rows == rows

    position = 1
    stream = LayerStream(
        teacher.config, teacher.family, teacher.checkpoint.tensor, dtype=torch.float32, device=torch.device("cpu")
    )
    states, seen = list(stream.embed(teacher.batches)), []
    for index in range(plan.kept.layers[position] + 1):
        layer = stream.layer(index)
        if index == plan.kept.layers[position]:
            layer.site("mlp.down_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
        with torch.inference_mode():
            states = [layer(s, b.position_ids_BS) for s, b in zip(states, teacher.batches, strict=True)]
    x_NU, kept = torch.cat(seen), plan.kept.ffn[position]  # fewer tokens than the sample holds: all of them
    name = "model.layers.{}.mlp.down_proj.weight"
    whole_DU = teacher.checkpoint.tensor(name.format(plan.kept.layers[position]))
    written_DK = Checkpoint.open(out).tensor(name.format(position))
    target = x_NU @ whole_DU.T
    row = rows[2 * position]
    assert row["before"] == pytest.approx(float((x_NU[:, kept] @ whole_DU[:, kept].T - target).norm() / target.norm()))
    assert row["after"] == pytest.approx(float((x_NU[:, kept] @ written_DK.T - target).norm() / target.norm()))
    assert row["after"] < row["before"]
    assert (row["kept"], row["of"]) == (64, 128)

    recovered.keep_layers(plan.kept.layers[:1])
    assert {row["layer"] for row in RecoveredErrors(tmp_path / "repair.json").rows} == {plan.kept.layers[0]}
