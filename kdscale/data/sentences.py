"""Sentences of a text, for encoders that embed sentences: by their ends, without a model or a word list of a language.

A sentence ends at `.`, `!`, `?` or `…` (and closing quotes or brackets) before white space and a capital letter, a
digit or an opening quote, and at an empty line. A title or an initial (`Mr. Brown`, `J. Smith`) ends none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOUNDARY = re.compile(r"(?<=[.!?…])[\"'”’)\]]*(\s+)(?=[\"'“‘(\[_]*[A-Z0-9À-Þ])|(\s*\n\s*\n\s*)")
_NO_END = re.compile(r"(?:^|[\s(\"'“‘])(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Rev|Hon|Col|Capt|Gen|vs|cf|No|[A-Z])\.$")


def sentences(text: str) -> Iterator[str]:
    """The sentences of `text` in order, each on one line, white space at its ends taken off; none of them is empty."""
    begin = 0
    for match in _BOUNDARY.finditer(text):
        if match[2] is None and _NO_END.search(text, max(0, match.start() - 12), match.start()):
            continue
        yield from _line(text[begin : match.start(1) if match[2] is None else match.start(2)])
        begin = match.end()
    yield from _line(text[begin:])


def _line(piece: str) -> Iterator[str]:
    words = " ".join(piece.split())
    if words:
        yield words
