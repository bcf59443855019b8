"""Names that others chose, in a terminal, an error and the model card."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kdscale.errors import CheckpointError
from kdscale.escaping import for_markdown, for_terminal
from kdscale.runtime.progress import Reporter

NASTY = "a\x1b[2Jb\x9b31m\rc\x07\u202ed\udcffe"


@given(st.text(st.characters(codec=None)))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = for_terminal(text)
    assert all(character.isprintable() or character in "\n\t" or ord(character) > 0x9F for character in shown)
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("SmolLM2-135M_instruct", "forward_kl, T = 1 → 0.25·CE", "modèle 東京 🙂", "a (b) {c} #1"):
        assert for_terminal(name) == for_markdown(name) == name


def test_errors_and_progress_show_no_control_characters() -> None:
    stream = io.StringIO()
    Reporter(console=Console(file=stream, soft_wrap=True)).say(NASTY)
    for text in (str(CheckpointError(NASTY, got=NASTY, hint="two\nlines")), stream.getvalue()):
        assert "a\\x1b[2Jb\\x9b31m\\x0dc\\x07\\u202ed\\udcffe" in text
    assert "two\nlines" in str(CheckpointError("x", hint="two\nlines"))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("x](http://evil)", r"x\](http:\/\/evil)"),
        ("a | b\n---\n# c", r"a \| b --- # c"),
        ("<img src=x>", r"\<img src=x\>"),
        ("**big** _and_ `code`", r"\*\*big\*\* \_and\_ \`code\`"),
        ("&lt;b&gt; \\|", r"\&lt;b\&gt; \\\|"),
        ("www.evil.org", r"www\.evil.org"),
    ],
)
def test_markdown_is_only_text(name: str, written: str) -> None:
    assert for_markdown(name) == written
