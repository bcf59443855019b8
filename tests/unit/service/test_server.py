"""Starting a service: what is refused before anything is made, its first token, and threads that must not end alone."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdscale.cli.service.serve import serve_command
from kdscale.errors import ConfigError
from kdscale.runtime import packages
from kdscale.runtime.listening import listen
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import Runs
from kdscale.service.ids import new_run_id
from kdscale.service.server import FIRST_TOKEN, Workers, announce, first_token, has_unknown_runs
from kdscale.service.settings import ServiceSettings


@pytest.fixture
def home(settings: ServiceSettings, database: Database) -> Path:
    return settings.folder


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return Accounts(database)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "insecure_http"), ({"host": "192.0.2.1"}, "open to other machines"),
        ({"tls_certificate": Path("cert.pem")}, "tls_key"),
        ({"host": "no such name"}, "open to other machines"),
        ({"host": "192.0.2.1", "insecure_http": True}, "--host and --port"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        serve_command(home=tmp_path / "home", port=0, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_an_error_in_words(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as other, pytest.raises(ConfigError, match="Address already in use"):
        serve_command(home=tmp_path / "home", port=other.getsockname()[1])
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_is_there", lambda name: name != "alembic")
    with pytest.raises(ConfigError, match=r"alembic(.|\n)*pip install 'kdscale\[service\]'"):
        serve_command(home=tmp_path / "home")


def test_the_first_token_is_an_admins_made_once_and_private(home: Path, accounts: Accounts) -> None:
    made = first_token(home, accounts)
    assert made is not None and made.secret is not None
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert made.path.read_text() == made.secret + "\n"
    found = accounts.by_secret(made.secret)
    assert found is not None and found.scopes == ("admin",)
    again = first_token(home, accounts)
    assert again is not None and (again.path, again.secret) == (made.path, None)
    made.path.unlink()  # whoever has it may delete the file
    assert first_token(home, accounts) is None
    assert len(accounts.tokens()) == 1


def test_a_kill_between_the_token_and_its_file_leaves_no_token_that_nobody_knows(
    home: Path, accounts: Accounts
) -> None:
    _, lost = accounts.new_token(FIRST_TOKEN, "somebody", ("admin",))
    made = first_token(home, accounts)
    assert made is not None and made.secret is not None
    assert [token.name for token in accounts.tokens() if token.revoked is None] == [FIRST_TOKEN]
    assert accounts.by_secret(lost) is None


def test_a_service_with_other_tokens_makes_none(home: Path, accounts: Accounts) -> None:
    accounts.new_token("laptop", "ada", ("admin",))
    assert first_token(home, accounts) is None


def test_the_token_is_shown_to_a_terminal_and_never_to_a_log(
    settings: ServiceSettings, home: Path, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = first_token(home, accounts)
    assert made is not None and made.secret is not None
    for terminal in (True, False):
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda terminal=terminal: terminal))
        said: list[str] = []
        with listen("127.0.0.1", 0) as listener:
            announce(settings, listener, made, said.append)
            assert f"http://127.0.0.1:{listener.getsockname()[1]}" in "\n".join(said)
        assert any(made.secret in line for line in said) == terminal
        assert any(str(made.path) in line for line in said)


def test_run_folders_that_the_database_lacks_are_noticed(settings: ServiceSettings, database: Database) -> None:
    (settings.runs / "notes").mkdir(parents=True)
    assert not has_unknown_runs(settings, Runs(database))
    (settings.runs / new_run_id()).mkdir()
    assert has_unknown_runs(settings, Runs(database))


def test_a_thread_that_ends_by_an_error_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    ended, server = threading.Event(), SimpleNamespace(should_exit=False)

    def fails(_stop: threading.Event) -> None:
        ended.set()
        raise OSError("the disk is gone")

    workers = Workers({"scheduler": fails, "watcher": lambda stop: stop.wait()})
    with workers.beside(server):  # type: ignore[arg-type]
        assert ended.wait(60)
    assert server.should_exit
    assert isinstance(workers.failure, OSError)
    assert not workers.is_alive()
    assert "the scheduler ended" in caplog.text
