"""No secret in what is shown, and nothing else taken away."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.root import Config
from kdscale.service.database.accounts import PREFIX
from kdscale.service.redaction import redacted, redacted_text
from tests.hostile.test_config import whole_tree


@pytest.mark.parametrize(
    "text",
    [
        f"{PREFIX}Zm9vYmFyYmF6cXV4", "hf_abcdefghijklmnopqrst", "Authorization: Bearer abcdefgh.ijk",
        "sk-abcdefghijklmnop",
        "http://me:secret@host/x", "http://host/x?a=1&token=abcdef", "AKIAABCDEFGHIJKLMNOP", "x Basic dXNlcjpwYXNz y",
    ],
)  # fmt: skip
def test_secrets_are_taken_out(text: str) -> None:
    shown = redacted_text(f"before {text} behind")
    assert "***" in shown
    assert not any(word in shown for word in ("Zm9v", "abcdef", "secret", "ABCDEF", "dXNl"))
    assert shown.startswith("before ")
    assert shown.endswith(" behind")


@pytest.mark.parametrize(
    "text", ["task kds_x", "sk-learn", "the bearer of it", "http://host/x?page=2", "hf_hub", "1,000 tokens"]
)
def test_other_texts_stay(text: str) -> None:
    assert redacted_text(text) == text


def test_fields_by_their_names() -> None:
    value: Any = {"request": {"api_key": "abc", "x": [{"password": "p"}]}, "key_variable": "A_KEY", "tokens": 5}
    assert redacted(value) == {
        "request": {"api_key": "***", "x": [{"password": "***"}]}, "key_variable": "A_KEY", "tokens": 5,
    }  # fmt: skip


def test_counts_of_tokens_are_no_secrets() -> None:
    facts = {"train tokens": "1,623,838", "tokens": "32,768"}
    assert redacted(facts) == facts
    assert redacted({"token": "1,623,838"}) == {"token": "***"}


def test_a_config_without_secrets_is_shown_whole() -> None:
    tree = whole_tree()
    Config.model_validate(tree)
    assert redacted(tree) == tree


def test_the_columns_of_a_comparison_stay() -> None:
    tree = {"columns": [{"key": "perplexity"}]}
    assert redacted(tree) == tree
    assert redacted({"api_key": "a"}) == {"api_key": "***"}
