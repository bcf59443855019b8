"""The style sheet: text can be told from what is behind it, by day and in the dark; and the vendored script is the one
that its note names."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from kdscale.service import page

STATIC = Path(page.__file__).parent / "static"
PAIRS = [
    ("ink", "paper"), ("ink", "card"), ("ink", "soft"), ("ink", "note"), ("muted", "paper"), ("muted", "card"),
    ("muted", "soft"), ("link", "paper"), ("link", "card"), ("link", "soft"), ("good", "card"), ("good", "paper"),
    ("bad", "card"), ("bad", "paper"), ("warn", "card"), ("warn", "paper"), ("button-ink", "button"), ("paper", "ink"),
    ("card", "bad"),
]  # fmt: skip


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out(scheme: int) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1; lines and edges of fields 3 to 1 (1.4.11)."""
    blocks = re.findall(r":root \{(.*?)\}", (STATIC / "page.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    weak = {pair: _contrast(colours[pair[0]], colours[pair[1]]) for pair in PAIRS}
    assert {pair: value for pair, value in weak.items() if value < 4.5} == {}
    lines = {name: _contrast(colours[name], colours["card"]) for name in ("a", "b", "c", "d", "e", "f", "edge")}
    assert {name: value for name, value in lines.items() if value < 3} == {}


def test_the_vendored_script_is_what_its_note_says() -> None:
    note = (STATIC / "htmx.ORIGIN.txt").read_text()
    assert hashlib.sha256((STATIC / "htmx.min.js").read_bytes()).hexdigest() in note
    assert "Zero-Clause BSD" in (STATIC / "htmx.LICENSE.txt").read_text()
