"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kdscale.runtime import progress
from kdscale.runtime.progress import Reporter


def test_a_terminal_gets_a_bar_with_rate_time_left_and_note() -> None:
    out = io.StringIO()
    reporter = Reporter(console=Console(file=out, force_terminal=True, width=160))
    with reporter.bar("distil", total=1000, done=400) as bar:
        for _ in range(3):
            bar.advance(200, "loss 1.2345")
    shown = out.getvalue()
    assert "distil" in shown
    assert "100 %" in shown
    assert "loss 1.2345" in shown
    assert "tok/s" in shown


def test_a_log_file_gets_lines_with_the_recent_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    reporter = Reporter(console=Console(file=out, width=160))
    with reporter.bar("distil", total=2000, done=0) as bar:
        for _ in range(10):  # ten slow minutes, then ten fast ones
            clock[0] += 60
            bar.advance(10, "loss 2")
        for _ in range(10):
            clock[0] += 60
            bar.advance(120, "loss 1")
    lines = out.getvalue().splitlines()
    assert len(lines) == 21  # one an advance, as each is more than ten seconds after the last, and the closing one
    assert "2 tok/s" in lines[19]
    assert "5.8 min left" in lines[19]
    assert "done in 1200.0 s" in lines[20]


def test_a_quiet_reporter_says_nothing() -> None:
    out = io.StringIO()
    reporter = Reporter(console=Console(file=out, quiet=True))
    reporter.say("hello")
    with reporter.bar("work", total=1) as bar:
        bar.advance(1)
    assert out.getvalue() == ""
