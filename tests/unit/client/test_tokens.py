"""Where a token comes from, and who can read the file that keeps it."""

from __future__ import annotations

import stat

import pytest

from kdscale.client.tokens import find_token, keep_token, tokens_file
from kdscale.errors import ConfigError

URL, OTHER = "https://kdscale.example.org", "http://127.0.0.1:8765"


def test_kept_tokens_are_found_by_address_and_readable_by_the_owner_alone() -> None:
    assert find_token(URL) is None
    path = keep_token(URL, "one")
    keep_token(OTHER, "two")
    assert (find_token(URL), find_token(OTHER)) == ("one", "two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [item.name for item in path.parent.iterdir()] == ["tokens"]


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_token(URL, "one")
    monkeypatch.setenv("KDSCALE_TOKEN", " other ")
    assert find_token(URL) == "other"


def test_a_file_that_others_can_read_is_refused() -> None:
    keep_token(URL, "one").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        find_token(URL)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "[" * 9999, "\x00"])
def test_a_damaged_file_is_refused_in_words(text: str) -> None:
    keep_token(URL, "one").write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        keep_token(URL, "two")


@pytest.mark.parametrize("token", ["a b", "a\nX-Evil: 1", "é", "x" * 5000])
def test_what_cannot_stand_in_a_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("KDSCALE_TOKEN", token)
    with pytest.raises(ConfigError, match="KDSCALE_TOKEN") as caught:
        find_token(URL)
    assert token not in str(caught.value)


def test_the_file_is_in_the_folder_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    assert tokens_file().parts[-3:] == (".config", "kdscale", "tokens")
