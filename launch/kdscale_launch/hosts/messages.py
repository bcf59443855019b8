"""One JSON object per line between the launcher and its agents; a line that holds none (a login banner) is skipped.

The launcher sends orders, {"order": NAME, ...}; an agent sends reports, {"report": NAME, ...}.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
# How many signs of life each side sends within the silence after which the other counts as gone.
BEATS_PER_DEADLINE = 4


def encode(message: Message) -> bytes:
    """The message as one line."""
    return json.dumps(message, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """The message on this line, or None when it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and ("order" in message or "report" in message) else None


class LineBuffer:
    """Splits a stream of bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines
