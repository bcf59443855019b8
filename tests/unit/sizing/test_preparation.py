"""How long one node prepares: what each part depends on, and that an 8B model takes minutes, not hours."""

from __future__ import annotations

from dataclasses import replace

from kdscale.sizing.model_shape import ModelShape
from kdscale.sizing.preparation import Preparation, estimate_preparation

LLAMA_8B = ModelShape(
    params=8_030_261_248, layer=218_112_000, products=7_504_658_432, layers=32, hidden=4096, ffn=14336, heads=32,
    head_dim=128, kv_heads=8, vocab=128_256, tied=False, gated=True, qk_norm=False, windows=((None, 32),), linears=0,
)  # fmt: skip


def estimate(**changes: float) -> Preparation:
    settings: dict[str, float] = {"text_tokens": 0, "calibration_tokens": 1 << 20, "probe_tokens": 0, "gpus": 8}
    return estimate_preparation(LLAMA_8B, **(settings | changes))  # type: ignore[arg-type]


def test_an_8b_model_is_pruned_in_minutes() -> None:
    assert 60 < estimate().seconds < 1200
    assert estimate().text == 0 and estimate(text_tokens=10**10).pruning == estimate().pruning


def test_each_part_costs_what_it_reads_and_computes() -> None:
    disk = 2 * 5 * LLAMA_8B.params / 1e9
    one, two = (estimate(calibration_tokens=tokens).pruning - disk for tokens in (1 << 20, 2 << 20))
    assert abs(two / one - 2) < 1e-9
    assert abs((estimate(gpus=1).pruning - disk) / one - 8) < 1e-9
    assert estimate(text_tokens=2e9).text == 2 * estimate(text_tokens=1e9).text
    wide = estimate_preparation(
        replace(LLAMA_8B, ffn=2 * 14336), text_tokens=0, calibration_tokens=1 << 20, probe_tokens=0, gpus=8
    )
    assert wide.pruning - estimate().pruning > 2 * 4 * 32 * (1 << 20) * 14336**2 / 50e12 / 8
    assert estimate(probe_tokens=1e8).pruning - estimate().pruning > 1000
