"""`kdscale token`: who may use a service. Works on the service's database, also while it runs."""

from __future__ import annotations

import contextlib
import getpass
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdscale.errors import ConfigError
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from kdscale.service.database.accounts import Accounts, Token

_DAY, _LONGEST, _SHOWN = 86_400.0, 200, 24
HomeOption = Annotated[Path, typer.Option(metavar="DIR", help="The home folder of the service.")]
_HOME = Path("kdscale-service")


def create_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the token is for, as the list shows it.")],
    owner: Annotated[
        str | None, typer.Option(metavar="OWNER", help="Whose runs its runs are; your name on this machine unless set.")
    ] = None,
    scope: Annotated[
        Literal["read", "run", "admin"],
        typer.Option(help="read: look. run: also submit, and stop one's own runs. admin: everything."),
    ] = "run",
    days: Annotated[
        float, typer.Option(min=0.0, max=36_500.0, metavar="N", help="It ends after N days; 0: never.")
    ] = 90.0,
    home: HomeOption = _HOME,
) -> None:
    """Make a token and show it, this once: the service keeps only its hash."""
    owner = owner or _user()
    for what, text in (("NAME", name), ("--owner", owner)):
        if not text.strip() or not text.isprintable() or len(text) > _LONGEST:
            raise ConfigError(what, expected=f"1 to {_LONGEST} characters that can be printed", got=repr(text)[:200])
    with _accounts(home) as accounts:
        token, secret = accounts.new_token(name, owner, (scope,), time.time() + days * _DAY if days else None)
        _audit(accounts, "token create", token)
    typer.echo(secret)
    ends = f"it ends on {_date(token.expires)}" if token.expires else "it does not end"
    text = f"token {token.id} of {owner} may {scope}; {ends}; kdscale token revoke {token.id} ends it at once"
    typer.echo(for_terminal(text), err=True)


def list_command(home: HomeOption = _HOME) -> None:
    """List all tokens: id, name, owner, scope, when they were made, last used, and end."""
    from rich.console import Console

    from kdscale.cli.tables import table

    with _accounts(home) as accounts:
        tokens = accounts.tokens()
    now = time.time()
    rows = [
        (
            token.id, _short(token.name), _short(token.owner), ", ".join(token.scopes), _date(token.created),
            _date(token.used) if token.used else "never", _end(token, now),
        )
        for token in tokens
    ]  # fmt: skip
    Console().print(table("", ("id", "name", "owner", "scope", "made", "used", "ends"), rows, nowrap=True))


def revoke_command(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As kdscale token list shows it.")],
    home: HomeOption = _HOME,
) -> None:
    """End a token at once, and every sign-in that was made with it."""
    with _accounts(home) as accounts:
        found = next((token for token in accounts.tokens() if token.id == token_id), None)
        if found is None or not accounts.revoke(token_id):
            got = "no token of this id" if found is None else "a token that was revoked before"
            raise ConfigError("ID", expected="the id of a token", got=got, hint="kdscale token list shows them")
        _audit(accounts, "token revoke", found)
    typer.echo(for_terminal(f"token {found.id} ({found.name}, of {found.owner}) opens nothing any more"))


HELP = "Make, list and revoke the tokens of a service."
COMMANDS: dict[str, Callable[..., None]] = {"create": create_command, "list": list_command, "revoke": revoke_command}


@contextlib.contextmanager
def _accounts(home: Path) -> Iterator[Accounts]:
    """The accounts of the service in `home`. Raises ConfigError where there is none."""
    from kdscale.runtime.packages import require_packages

    require_packages("kdscale token", ("sqlalchemy", "alembic"), "service")
    from kdscale.service.database.accounts import Accounts
    from kdscale.service.database.connection import open_database
    from kdscale.service.settings import load_settings

    if not home.is_dir():
        hint = "name it with --home; kdscale serve makes one"
        raise ConfigError(f"there is no service in {home}", expected="its home folder", hint=hint)
    database = open_database(load_settings(home))
    try:
        yield Accounts(database)
    finally:
        database.close()


def _audit(accounts: Accounts, action: str, token: Token) -> None:
    detail = {"token_id": token.id, "name": token.name, "owner": token.owner, "scopes": list(token.scopes)}
    accounts.audit(_user(), action, detail=detail, address="command line")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return "admin"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _date(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _end(token: Token, now: float) -> str:
    if token.revoked is not None:
        return f"revoked {_date(token.revoked)}"
    if token.expires is None:
        return "never"
    return f"{'ended ' if token.expires <= now else ''}{_date(token.expires)}"
