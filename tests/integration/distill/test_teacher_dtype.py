"""Distillation from a teacher in another dtype than the student's."""

from __future__ import annotations

import pytest

from kdscale.distill import engine
from kdscale.errors import ConfigError, RunFolderError
from kdscale.runtime.progress import Reporter

SHORT = {"tokens": 2 * 4 * 48, "validate_every": 2, "validate_tokens": 100, "checkpoint_every": 1}


def losses(rows):
    return [row["loss"] for row in rows]


def test_8_bits_teach_nearly_the_same_and_their_error_is_said(distil, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="teacher_dtype"):
        distil(tmp_path / "refused", teacher_dtype="float8", **SHORT)
    monkeypatch.setattr(engine, "check_eight_bits", lambda name, device: None)
    said = []
    monkeypatch.setattr(Reporter, "say", lambda self, text: said.append(text))
    own = distil(tmp_path / "own", **SHORT)
    for name, close in (("float8", 0.05), ("int8", 0.005)):
        rows = distil(tmp_path / name, teacher_dtype=name, **SHORT)
        assert losses(rows) == pytest.approx(losses(own), rel=close)
        assert losses(rows) != losses(own)
        assert any(text.startswith(f"teacher in {name}: 8") and "KL of " in text for text in said), said
    with pytest.raises(RunFolderError, match="teacher_dtype"):
        distil(tmp_path / "float8", teacher_dtype="auto", **{**SHORT, "tokens": 3 * 4 * 48})


def test_a_teacher_may_be_more_exact_than_its_student(distil, tmp_path):
    """With both heads in one loss, each in its own dtype."""
    settings = {**SHORT, "dtype": "bfloat16", "objectives": [{"name": "token_divergence", "targets": "full"}]}
    own = distil(tmp_path / "own", **settings)
    rows = distil(tmp_path / "exact", teacher_dtype="float32", **settings)
    assert losses(rows) == pytest.approx(losses(own), rel=0.02)
    assert losses(rows) != losses(own)
