"""The note about a training of few steps."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.settings import DistillConfig
from kdscale.pipeline.stages.distill import few_steps


@pytest.mark.parametrize(
    ("fields", "is_said"),
    [
        ({"tokens": 16_384, "seq_len": 256}, True),  # 8 steps of 8 sequences
        ({"tokens": 16_384, "seq_len": 256, "global_batch": 1, "micro_batch": 1}, False),  # one sequence
        ({"tokens": 16_384, "seq_len": 256, "processes": 8, "micro_batch": 1}, False),  # one sequence a rank
        ({"tokens": 102_400, "seq_len": 256}, False),  # 50 steps
        ({"tokens": 100_352, "seq_len": 256}, True),  # 49 steps
    ],
)
def test_few_steps_of_many_sequences_are_said(fields: dict[str, Any], is_said: bool) -> None:
    note = few_steps(DistillConfig(**fields))
    assert bool(note) == is_said


def test_the_note_has_the_figures_and_what_to_do() -> None:
    note = few_steps(DistillConfig(tokens=16_384, seq_len=256))
    assert note.startswith("16,384 tokens are 8 steps of 8 sequences")
    assert "a smaller distill.global_batch" in note
