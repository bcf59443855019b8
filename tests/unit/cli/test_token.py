"""kdscale token: what it prints is what opens the service, and nothing else is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError
from kdscale.service.database.accounts import PREFIX, Accounts
from kdscale.service.database.connection import open_database
from kdscale.service.settings import load_settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def call(*arguments: str | Path) -> None:
    make_app()(["token", *map(str, arguments)], standalone_mode=False)


def accounts(home: Path) -> Accounts:
    return Accounts(open_database(load_settings(home)))


def test_a_token_is_made_listed_and_revoked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("create", "ci", "--owner", "ada", "--scope", "run", "--home", home)
    printed = capsys.readouterr()
    secret = printed.out.strip()
    token = accounts(home).by_secret(secret)
    assert secret.startswith(PREFIX)
    assert token is not None
    assert (token.name, token.owner, token.scopes) == ("ci", "ada", ("run",))
    assert token.expires is not None
    assert round(token.expires - token.created) == 90 * 86_400
    assert token.id in printed.err
    assert secret not in printed.err
    assert not any(secret.encode() in file.read_bytes() for file in home.iterdir())

    call("list", "--home", home)
    listed = capsys.readouterr().out
    assert all(word in listed for word in (token.id, "ci", "ada", "run"))

    call("revoke", token.id, "--home", home)
    assert accounts(home).by_secret(secret) is None
    assert [entry.action for entry in accounts(home).audit_log()] == ["token revoke", "token create"]
    with pytest.raises(ConfigError, match="revoked before"):
        call("revoke", token.id, "--home", home)


def test_a_token_may_have_no_end(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("create", "ci", "--days", "0", "--home", home)
    assert accounts(home).tokens()[0].expires is None
    assert "does not end" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[2J", "x" * 201])
def test_names_can_be_printed(home: Path, name: str) -> None:
    for arguments in ([name], ["ci", "--owner", name]):
        if arguments != ["ci", "--owner", ""]:
            with pytest.raises(ConfigError, match="characters that can be printed"):
                call("create", *arguments, "--home", home)
    assert not (home / "service.db").exists()


def test_there_must_be_a_service(tmp_path: Path) -> None:
    for arguments in (["create", "x"], ["list"], ["revoke", "x"]):
        with pytest.raises(ConfigError, match="there is no service in"):
            call(*arguments, "--home", tmp_path / "none")
    (tmp_path / "home").mkdir()
    with pytest.raises(ConfigError, match="no token of this id"):
        call("revoke", "x", "--home", tmp_path / "home")
