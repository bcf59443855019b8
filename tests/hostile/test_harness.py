"""The harness finds what it is there for, and counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import KdscaleError
from tests.hostile import nasty


def _compute_for_ever() -> None:
    while True:
        pass


def _refuse(message: str) -> Any:
    raise KdscaleError(message)


def test_every_outcome_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nasty, "COUNTS", {})
    monkeypatch.setattr(nasty, "_MOST_SECONDS", 0.3)
    monkeypatch.setattr(nasty, "_MOST_WAITING", 1.0)
    os.mkfifo(tmp_path / "fifo")
    cases = nasty.HostileCases("here")
    cases.run("fine", lambda: 1, must="accept")
    cases.run("refused", lambda: _refuse("no"), must="refuse")
    assert cases.failures == []
    cases.run("computes", _compute_for_ever)
    cases.run("waits", (tmp_path / "fifo").read_bytes)
    cases.run("memory", lambda: bytearray(1 << 40))
    cases.run("accepted", lambda: 1, must="refuse")
    cases.run("refused", lambda: _refuse("no"), must="accept")
    cases.run("traceback", lambda: 1 / 0)
    assert [failure.partition(":")[0] for failure in cases.failures] == [
        "computes", "waits", "memory", "accepted", "refused", "traceback",
    ]  # fmt: skip
    (line, total) = nasty.counts_in_words()
    expected = (
        "8 cases in {} s: 1 accepted, 1 refused, 1 traceback, 2 hung, 1 memory, 1 wrongly accepted, 1 wrongly refused"
    )
    for text, name in ((line, "here"), (total, "hostile input")):
        seconds = text.partition(" in ")[2].partition(" s")[0]
        assert text == f"{name}: {expected.format(seconds)}"
    with pytest.raises(AssertionError, match="6 cases"):
        cases.report()
