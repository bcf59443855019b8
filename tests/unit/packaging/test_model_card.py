"""The model card says what the student learnt from, whatever the objectives are."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.packaging.model_card import card_facts, model_card

MANIFEST = {"step": 3, "fingerprint": {"distill": {"dtype": "bfloat16"}}, "state": {"guard": {"total": 1}}}


def card(**settings: Any) -> str:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "models/big"}, "prune": {"ffn": 8}}
    tree["distill"] = {"objectives": [{"name": "token_divergence", **settings}]}  # type: ignore[assignment]
    return model_card(card_facts(build_config(tree, "test"), MANIFEST))


@pytest.mark.parametrize(
    ("settings", "learnt_from", "loss"),
    [
        (
            {"ce_weight": 0.25},
            "top-K probabilities",
            "0.25·CE + 0.75·T²·forward_kl, T = 1, teacher's top 64, tail: buck",
        ),
        ({"targets": "full"}, "probabilities over the whole vocabulary", "T = 1, whole vocabulary"),
    ],
)
def test_the_card_names_what_was_learnt_from(settings: dict[str, Any], learnt_from: str, loss: str) -> None:
    text = card(**settings)
    assert f"distilled on the teacher's {learnt_from} with kdscale" in text
    assert loss in text
    assert ("top-K" in text) == (settings.get("targets") != "full")
    assert "| teacher | big |" in text and "| skipped steps | 1 |" in text


def test_a_name_cannot_leave_its_cell() -> None:
    facts = {"teacher": "x| |\n\n# [go](http://evil)\x1b[2J", "learnt from": "text"}
    (row,) = [line for line in model_card(facts).splitlines() if line.startswith("| teacher")]
    assert row == r"| teacher | x\| \|  # \[go\](http:\/\/evil)\\x1b\[2J |"
