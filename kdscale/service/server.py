"""Starts a service: its home folder, database, first token, scheduler and HTTP server, and stops them in order.

Stopping never touches runs: their processes go on, and the next service finds them.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from kdscale.files import explain_os_errors, write_private
from kdscale.runtime.listening import address_of, listen
from kdscale.service.access.serving import server_options
from kdscale.service.app import make_app
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.runs import Runs
from kdscale.service.engines.engine import Engines
from kdscale.service.ids import is_run_id
from kdscale.service.notices.sender import check_settings as check_notices
from kdscale.service.operations.logs import set_up_logs
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.settings import ServiceSettings
from kdscale.service.watching.rebuild import rebuild
from kdscale.service.watching.watcher import Watcher

FIRST_TOKEN = "first-token"  # in the home folder
_STOP_SECONDS = 10  # in which answers that are under way are finished
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstToken:
    """The token that a new service begins with: where it is kept, and itself when it was made just now."""

    path: Path
    secret: str | None


def serve(settings: ServiceSettings, *, anew: bool, say: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM. `anew`: first make the database anew from the run folders.

    What it has of runs already is kept; runs that it lacks come back also without being asked for.

    Raises ConfigError for an address that cannot be used, ServiceError for a database that cannot be opened.
    """
    listener = listen(settings.host, settings.port)  # a port that is taken is reported before anything is changed
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        check_notices(settings)
        make_home(settings.folder)
        set_up_logs(settings)
        database = open_database(settings)
        stack.callback(database.close)
        if anew or has_unknown_runs(settings, Runs(database)):
            say(f"{len(rebuild(settings, database))} runs came into the database from their folders")
        token = first_token(settings.folder, Accounts(database))
        engines = Engines(settings)
        scheduler = Scheduler(settings, database, engines)
        workers = Workers(background(settings, database, scheduler))
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(settings, database, scheduler, engines, workers.is_alive), log_config=None, access_log=False,
                timeout_graceful_shutdown=_STOP_SECONDS, **server_options(settings),
            )
        )  # fmt: skip
        announce(settings, listener, token, say)
        with stopping_quietly(), workers.beside(server):
            server.run(sockets=[listener])
        say("stopped answering; runs go on, and kdscale serve finds them again")
        if workers.failure is not None:
            raise workers.failure


def has_unknown_runs(settings: ServiceSettings, runs: Runs) -> bool:
    """Whether a run folder has no row: the database was lost, or a kill came between the two."""
    return any(is_run_id(folder.name) and runs.find(folder.name) is None for folder in settings.runs.glob("*"))


def background(
    settings: ServiceSettings, database: Database, scheduler: Scheduler
) -> dict[str, Callable[[threading.Event], None]]:
    """What works beside the server, by name; each is told to stop by an event."""
    watcher = Watcher(settings, database)
    return {
        "scheduler": scheduler.run_forever,
        "watcher": lambda stop: watcher.run_forever(stop, scheduler.leads),
    }


class Workers:
    """Threads that work beside the server. When one ends by an error, the server ends too: another one starts anew."""

    def __init__(self, jobs: Mapping[str, Callable[[threading.Event], None]]):
        self._stop = threading.Event()
        self._server: uvicorn.Server | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(job,), name=name, daemon=True) for name, job in jobs.items()
        ]
        self.failure: BaseException | None = None

    def is_alive(self) -> bool:
        """Whether all of them work."""
        return all(thread.is_alive() for thread in self._threads)

    @contextlib.contextmanager
    def beside(self, server: uvicorn.Server) -> Iterator[None]:
        """Work while the block runs."""
        self._server = server
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _work(self, job: Callable[[threading.Event], None]) -> None:
        try:
            job(self._stop)
        except BaseException as error:  # noqa: BLE001 - of whatever kind, it is raised in the main thread
            self.failure = error
            _LOG.exception("the %s ended", threading.current_thread().name)
            if self._server is not None:
                self._server.should_exit = True


@contextlib.contextmanager
def stopping_quietly() -> Iterator[None]:
    """uvicorn sends itself the signal that stopped it once more when it is done; here that ends nothing."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # in a test
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_home(folder: Path) -> None:
    """Make the home folder, which only its owner enters. Raises RunFolderError when that is not possible."""
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def first_token(home: Path, accounts: Accounts) -> FirstToken | None:
    """Make an admin's token for a service that has none; the file it is kept in, as long as that is there.

    A service that was killed after the token was made and before it was written has one that nobody knows: it is
    revoked, and another one is made.
    """
    path = home / FIRST_TOKEN
    known = accounts.tokens()
    if path.exists():
        return FirstToken(path, None)
    unused = [token for token in known if token.name == FIRST_TOKEN and token.used is None and token.revoked is None]
    if len(unused) < len(known):
        return None
    for token in unused:
        accounts.revoke(token.id)
    _, secret = accounts.new_token(FIRST_TOKEN, _user(), ("admin",))
    write_private(path, f"{secret}\n".encode())
    return FirstToken(path, secret)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return "admin"


def announce(
    settings: ServiceSettings, listener: socket.socket, token: FirstToken | None, say: Callable[[str], None]
) -> None:
    """Say where everything is. The token itself is shown to a terminal alone, never to a log."""
    url = address_of(listener, settings.host, "https" if settings.tls_certificate else "http")
    say(f"home     {settings.folder}")
    say(f"open     {url}")
    if token is not None and token.secret is not None and sys.stdout.isatty():
        say(f"token    {token.secret}   (an admin's; shown this once)")
    if token is not None:
        say(f"token    in {token.path}, which only you can read")
        say(f"log in   kdscale login --server {url} --token-file {token.path}")
    if not settings.is_loopback and not settings.tls_certificate:
        say("note: other machines connect without TLS; tokens are safe only behind a proxy that speaks it")
    say("Ctrl-C stops the service; runs go on")
