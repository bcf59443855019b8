"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

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


def test_the_bar_fits_eighty_columns_with_all_it_shows() -> None:
    out, clock = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=True, width=80, get_time=lambda: clock[0])
    with Reporter(console=console).bar("speed and memory", total=1000, unit="round") as bar:
        for _ in range(3):
            clock[0] += 50.0
            bar.advance(1, "loss 1.2345 · MFU 41.2 %")
    last = Text.from_ansi(out.getvalue()).plain.splitlines()[-1].rstrip()
    assert len(last) <= 80
    assert "50.0 s a round" in last
    assert "14 h left" in last
    assert last.endswith("loss 1.2345 · MFU 41.2 %")


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
    assert lines[0] == "distil: 0 % · 6.0 s a tok · 3 h 19 min left · loss 2"
    assert lines[18] == "distil: 59 % · 2.0 tok/s · 6 min 50 s left · loss 1"
    assert lines[20] == "distil: done in 20 min 00 s"


def test_a_line_without_a_rate_or_at_the_end_says_nothing_silly(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Reporter(console=Console(file=out, width=160)).bar("evaluate", total=4, unit="round") as bar:
        for amount in (0, 4):
            clock[0] += 60
            bar.advance(amount, "teacher")
    assert out.getvalue().splitlines()[:2] == ["evaluate: 0 % · teacher", "evaluate: 100 % · 30.0 s a round · teacher"]


def test_a_quiet_reporter_says_nothing() -> None:
    out = io.StringIO()
    reporter = Reporter(console=Console(file=out, quiet=True))
    reporter.say("hello")
    with reporter.bar("work", total=1) as bar:
        bar.advance(1)
    assert out.getvalue() == ""
