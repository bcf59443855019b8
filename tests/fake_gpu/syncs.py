"""What the host waited for on the fake GPU, and who asked for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)


class Syncs:
    """For what the host waited: how often, by operation and caller (file:line function)."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.streams: list[str] = []  # "side waits for main": what streams were told, in order

    def by_function(self) -> Counter[str]:
        """How often, by the function that asked for it."""
        found: Counter[str] = Counter()
        for (_, where), count in self.seen.items():
            found[where.rpartition(" ")[2]] += count
        return found

    def note(self, what: str) -> None:
        """Count a wait, asked for by the innermost caller outside torch and these tests' own files."""
        self.seen[what, _caller()] += 1

    def total(self) -> int:
        return sum(self.seen.values())

    def clear(self) -> None:
        self.seen.clear()

    def __str__(self) -> str:
        return "\n".join(f"{count} × {what} in {where}" for (what, where), count in sorted(self.seen.items()))


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and "/torch/" not in name and "<" not in name:
            return f"{'/'.join(Path(name).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
