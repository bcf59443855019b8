"""Targets that are stored: the stage that writes them, and distillations from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.teacher import online

Write = Callable[..., dict[str, Any]]
Distil = Callable[..., list[dict[str, Any]]]


TOP_K = [{"name": "token_divergence", "top_k": 16}]
SAMPLED = [{"name": "token_divergence", "targets": "sampled", "draws": 20}]


@pytest.mark.parametrize(
    ("objectives", "codec"),
    [
        (TOP_K, {"name": "topk", "top_k": 16, "bits": 32}),
        (TOP_K, {"name": "topk", "top_k": 24, "bits": 32}),
        (SAMPLED, {"name": "sampled", "draws": 20}),
        (TOP_K, {"name": "hidden", "dtype": "float32"}),
    ],
    ids=["topk", "more entries than needed", "sampled", "hidden"],
)
def test_stored_targets_give_the_losses_of_an_online_teacher(
    distil: Distil, store_targets: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: Any, codec: Any
) -> None:
    """Bit for bit where the codec is exact, and no weight of the teacher but its head is read."""
    here = distil(tmp_path / "here", objectives=objectives)
    targets = {"codec": codec, "micro_batch": 2}
    assert store_targets(tmp_path / "there", targets, objectives=objectives)["positions"] == "1,719"
    monkeypatch.setattr(online, "place_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    there = distil(tmp_path / "there", objectives=objectives, targets=targets, teacher_placement="cached")
    assert [row["loss"] for row in there] == [row["loss"] for row in here]
