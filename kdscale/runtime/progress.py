"""Progress for people: a bar with rate and time left on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from kdscale.escaping import for_terminal
from kdscale.units import compact_duration, format_duration, format_rate
from kdscale_launch.watchdog import beat, enter

_LINE_EVERY_SECONDS = 10.0
_RATE_LINES = 6
_RATE_SECONDS = 240.0  # a round may take a minute, and one that is forgotten leaves no rate


class _RateColumn(ProgressColumn):
    """`1,234 tok/s`, of the last few seconds; empty until there is a rate."""

    def render(self, task: Task) -> Text:
        """The rate of a task."""
        speed = task.finished_speed or task.speed
        return Text(format_rate(speed, task.fields["unit"]) if speed else "", style="cyan")


class _LeftColumn(ProgressColumn):
    """`14 min left`; empty until there is a rate, and at the end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """The time that a task still takes."""
        left = task.time_remaining
        return Text(f"{compact_duration(left)} left" if left else "", style="cyan")


class Bar:
    """One task's progress; `advance` takes the units done since the last call and an optional note to show."""

    def __init__(self, title: str, total: float, unit: str, done: float, bars: Progress | None, console: Console):
        self._title, self._total, self._unit = title, total, unit
        self._console, self._bars = console, bars
        self._done = done
        self._started = time.monotonic()
        # (time, done) at the last few lines: the rate shown is the recent one, as on a terminal
        self._marks: deque[tuple[float, float]] = deque([(self._started, done)], maxlen=_RATE_LINES)
        self._task: TaskID | None = None
        if bars is not None:
            self._task = bars.add_task(title, total=total, completed=int(done), unit=unit, note="")

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more units as done, and tell the watchdog that there is progress."""
        beat()
        self._done += amount
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._marks[-1][0] >= _LINE_EVERY_SECONDS:
            self._console.print(self._line(note), highlight=False)
            self._marks.append((time.monotonic(), self._done))

    def _line(self, note: str) -> str:
        then, before = self._marks[0]
        rate = (self._done - before) / max(time.monotonic() - then, 1e-9)
        left = self._total - self._done
        parts = [f"{100 * self._done / self._total:.0f} %"] if self._total else []
        parts += [format_rate(rate, self._unit)] if rate > 0 else []
        parts += [f"{format_duration(left / rate)} left"] if rate > 0 and left > 0 else []
        return f"{self._title}: " + " · ".join([*parts, *([note] if note else [])])

    def finish(self, note: str = "") -> None:
        """Print the last line, where there is no terminal."""
        if self._bars is None:
            seconds = time.monotonic() - self._started
            self._console.print(
                f"{self._title}: done in {format_duration(seconds)}" + (f" · {note}" if note else ""), highlight=False
            )


class Reporter:
    """Prints how far a stage is. `quiet=True` (ranks other than 0, tests) prints nothing."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, soft_wrap=True, quiet=quiet)

    def say(self, message: str) -> None:
        """Print a line, without markup; control characters are written out."""
        self.console.print(for_terminal(message), highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, total: float, unit: str = "tok", done: float = 0) -> Iterator[Bar]:
        """A bar over `total` units, `done` of them already done (a resumed stage)."""
        enter(title)
        if self.console.is_terminal and not self.console.quiet:
            text, share = TextColumn("{task.description:<18}"), TextColumn("{task.percentage:>3.0f} %")
            note = TextColumn("{task.fields[note]}", style="dim")
            one_line = {"table_column": Column(no_wrap=True)}  # so that the bar alone gives way on a narrow terminal
            columns = (text, BarColumn(30), share, _RateColumn(**one_line), _LeftColumn(**one_line), note)
            with Progress(*columns, console=self.console, speed_estimate_period=_RATE_SECONDS) as bars:
                yield Bar(title, total, unit, done, bars, self.console)
        else:
            bar = Bar(title, total, unit, done, None, self.console)
            yield bar
            bar.finish()
