"""Latencies of shapes: a linear machine is found, timings win over predictions, and no shape is timed twice."""

from __future__ import annotations

import numpy as np

from kdscale.config.prune import PruneConfig
from kdscale.prune.axes import Sizes
from kdscale.prune.search.latency import LatencyModel, Timing, TimingFile
from kdscale.prune.search.space import ShapeSpace, columns


def test_the_latency_model_finds_a_machine_that_is_linear(tmp_path, small_config, small_family):
    timed = []

    def time_shape(dims):
        timed.append(dims)
        layer = 1e-5 * dims.hidden * (dims.ffn + 64 * dims.heads) + 0.01
        return Timing(
            {"decode": layer, "prefill": 9 * layer}, {"decode": 0.02, "prefill": 0.1}, {"decode": 0.0, "prefill": 0.0}
        )

    cfg = PruneConfig(target_decode="50%", axes=("ffn", "heads", "kv_heads", "hidden", "layers"), tolerance=0.1)
    teacher = small_family.dims(small_config)
    shapes = columns(ShapeSpace(teacher, small_family, cfg).all())
    model = LatencyModel(time_shape, TimingFile("here", tmp_path / "speed.json"))
    model.fit(teacher, shapes)
    expected = 0.02 + shapes["layers"] * (1e-5 * shapes["hidden"] * (shapes["ffn"] + 64 * shapes["heads"]) + 0.01)
    np.testing.assert_allclose(model.milliseconds("decode", shapes), expected, rtol=1e-3)
    assert model.error["decode"] < 1e-3
    assert len(timed) == 8
    odd = teacher.replace(ffn=96, heads=4, kv_heads=2)  # not what the fit says of it: its own timing counts
    model._time_shape = lambda _: Timing(
        {"decode": 7.0, "prefill": 9.0}, {"decode": 1.0, "prefill": 1.0}, {"decode": 0.0}
    )
    model.timing(odd)
    assert model.milliseconds("decode", columns([Sizes.of(odd)]))[0] == 7.0 * odd.layers + 1.0
    again = LatencyModel(time_shape, TimingFile("here", tmp_path / "speed.json"))
    again.fit(teacher, shapes)
    assert len(timed) == 8  # from the file
    LatencyModel(time_shape, TimingFile("elsewhere", tmp_path / "speed.json")).fit(teacher, shapes)
    assert len(timed) == 16
