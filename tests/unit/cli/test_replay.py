"""What `kdscale replay` prints."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.cli import replay

_SEQUENCE: dict[str, Any] = {"loss": 1.5, "documents": [{"id": 7, "source": "books"}], "text": "Once\n upon"}
_RESULT: dict[str, Any] = {
    "step": 3, "of_this_step": True, "loss": 2.0, "grad_norm": 1.0, "logged_loss": 2.0, "logged_grad_norm": 1.0,
    "same_bits": True, "losses": ["loss"], "gradient_norms": {"layer 0 ffn": 1.0},
    "sequences": [{**_SEQUENCE, "number": 8}, {**_SEQUENCE, "number": 9, "loss": None}],
}  # fmt: skip


def test_the_worst_sequence_comes_first_and_objectives_without_cross_entropy_have_no_such_column(
    capsys: pytest.CaptureFixture[str],
) -> None:
    replay._show(_RESULT)
    printed = capsys.readouterr().out
    header, first, second, *rest = printed.splitlines()
    assert header.split() == ["sequence", "loss", "documents", "beginning"]
    assert (first.split()[0], second.split()[0]) == ("9", "8")
    assert "not finite" in first and "7 (books)" in second and "Once upon" in second
    assert "the same bits" in rest[-1]
