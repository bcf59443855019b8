"""Text from files and configs that others wrote, made safe for the place where it is shown.

A folder, a tensor or a token may be named anything: ESC sequences that rewrite a terminal's screen, marks that reverse
the order of what is read, Markdown that makes links. HTML is escaped by the report's templates.
"""

from __future__ import annotations

import re

# C0 and C1 controls except tab and newline, marks of direction, line separators, and halves of surrogate pairs (Python
# reads file names that are not UTF-8 as these, and no stream can print them).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# An underscore inside a word means nothing in Markdown.
_MARKDOWN = re.compile(r"[\\`*<>\[\]|~]|(?<!\w)_|_(?!\w)|&(?=[#\w])|(?<=:)//|(?<=www)\.")


def for_terminal(text: str) -> str:
    r"""`text` with every control character but tab and newline written out: `\x1b`, `\u202e`."""
    return _UNPRINTABLE.sub(lambda match: _written_out(ord(match[0])), text)


def for_markdown(text: str) -> str:
    """`text` as one line of a Markdown table or sentence: no markup, no links, no end of the cell."""
    line = for_terminal(" ".join(text.split("\n")).replace("\t", " "))
    return _MARKDOWN.sub(lambda match: "".join(f"\\{character}" for character in match[0]), line)


def _written_out(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
