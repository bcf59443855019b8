"""The example in docs/kernels.md runs, by hand and under transformers' Trainer, and learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[3] / "benchmarks" / "kernels" / "trl_style_loop.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("trl_style_loop", EXAMPLE)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("how", [[], ["--trainer"]])
def test_it_learns(example, how):
    losses = example.main([*how, "--steps", "25"])
    assert len(losses) == 25
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_it_needs_nothing_of_kdscale():
    imported = [
        line.split()[1].split(".")[0] for line in EXAMPLE.read_text().splitlines() if line[:5] in ("from ", "impor")
    ]
    assert "kdscale_kernels" in imported
    assert "kdscale" not in imported
