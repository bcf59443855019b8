"""A figure at the top of a page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A figure with its title and a note below it. `share`, 0 to 1, draws a bar."""

    title: str
    value: str
    note: str = ""
    share: float | None = None
