"""Distillation with compiled layers: the losses of the same run without, and the same bytes after a kill."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from kdscale.models import compiling
from kdscale.runtime import kernel_backend

# the hardest surroundings that one process has: weights come and go around each layer of both models
SETTINGS = {
    "tokens": 2 * 4 * 48, "checkpoint_every": 1, "validate_every": 2, "validate_tokens": 100, "zero_stage": 3,
    "teacher_placement": "partitioned", "gradient_checkpointing": True,
    "zero": {"keep_gathered": 0},
}  # fmt: skip


def test_a_compiled_run_is_the_plain_one_and_resumes_to_the_same_bytes(distil, tmp_path, monkeypatch, dies_at_step):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    monkeypatch.setattr(kernel_backend, "_compiler_obstacle", lambda: None)
    plain = distil(tmp_path / "plain", **SETTINGS)
    torch._dynamo.reset()
    counters.clear()
    rows = distil(tmp_path / "whole", compile="layers", **SETTINGS)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], abs=2e-6)
    # 4 regions, of the student in training and measured and of the teacher; validation's last batch is smaller
    assert 0 < counters["stats"]["unique_graphs"] <= 4 * 5
    with dies_at_step(1):
        distil(tmp_path / "broken", compile="layers", **SETTINGS)
    distil(tmp_path / "broken", compile="layers", **SETTINGS)
    whole, broken = ((tmp_path / run / "student" / "model.safetensors").read_bytes() for run in ("whole", "broken"))
    assert whole == broken
