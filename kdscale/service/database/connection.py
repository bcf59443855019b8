"""Opens the database, in SQLite or Postgres, and brings its tables to this version."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from kdscale.errors import ConfigError, FileError, ServiceError
from kdscale.files import explain_os_errors, read_text
from kdscale.runtime.packages import require_packages
from kdscale.service.settings import ServiceSettings

_MIGRATIONS = Path(__file__).parent / "migrations"
_WAIT_SECONDS = 30  # for another process that writes
# What only one transaction at a time does, with the number of its lock in Postgres: any numbers that nobody else uses.
Alone = Literal["migrate", "claim", "append"]
_LOCKS: Mapping[Alone, int] = {"migrate": 0x6B647363, "claim": 0x6B647364, "append": 0x6B647365}
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class Database:
    """Connections to one database. Transactions are short: a read or a write, nothing that waits."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def is_sqlite(self) -> bool:
        """Whether one file holds it all."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that may write; rolled back when the block raises."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view for several reads; waits for no writer."""
        options: dict[str, Any] = {"kdscale_read": True}
        if not self.is_sqlite:  # whose transactions have one view anyway
            options["isolation_level"] = "REPEATABLE READ"
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_database(settings: ServiceSettings) -> Database:
    """The service's database, made or migrated first.

    Raises ConfigError for an address of no database that we know, and ServiceError when it cannot be opened.
    """
    url = _url(settings)
    if url.get_backend_name() == "sqlite":
        _make_private(Path(str(url.database)))
        engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS, "check_same_thread": False})
        _configure_sqlite(engine)
    else:
        engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    database = Database(engine)
    try:
        migrate(database)
    except SQLAlchemyError as error:
        engine.dispose()
        raise ServiceError(
            f"the database {url.render_as_string(hide_password=True)} cannot be opened", got=str(error)[:500]
        ) from error
    return database


def _make_private(path: Path) -> None:
    """Make the file, for its owner alone, where there is none: it has addresses of webhooks and who did what.

    SQLite gives the files beside it the same rights.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _url(settings: ServiceSettings) -> URL:
    """The address, with the driver that we use whatever it names."""
    expected = "sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    try:
        url = make_url(settings.database_url)
    except ArgumentError as error:
        raise ConfigError("database", expected=expected, got="something else") from error
    backend = url.drivername.partition("+")[0]
    if backend not in _DRIVERS or (backend == "sqlite" and url.database in (None, "", ":memory:")):
        raise ConfigError("database", expected=expected, got=f"{backend}://…")
    if backend != "sqlite":
        require_packages("a database in Postgres", ("psycopg",), "postgres")
    url = url.set(drivername=_DRIVERS[backend])
    if settings.database_password_file is None:
        return url
    try:
        password = read_text(Path(settings.database_password_file), FileError, 4096).rstrip("\r\n")
    except FileError as error:
        raise ConfigError("database_password_file", got=str(error)) from error
    return url.set(password=password)


def alone(connection: Connection, what: Alone) -> None:
    """Wait until no other transaction does the same, and keep others waiting until this one ends.

    A transaction asks for at most one lock of each kind, and changes no further run once it has "append", or two could
    wait for each other. SQLite has one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCKS[what]})")


def migrate(database: Database) -> None:
    """Bring the tables to this version; several processes may call this at once."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with database.engine.connect() as connection, _without_foreign_keys(connection), connection.begin():
        alone(connection, "migrate")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """SQLite changes a table by making it anew: with the old one it would delete all rows that refer to it."""
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name != "sqlite":
        yield
        return
    driver.execute("PRAGMA foreign_keys=OFF")  # outside of a transaction, or it does nothing
    try:
        yield
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def _configure_sqlite(engine: Engine) -> None:
    """Readers do not wait for the writer, and a transaction takes the write lock when it begins.

    A transaction that reads first and writes later could otherwise fail at once, whatever the time it may wait. See
    SQLAlchemy's page on SQLite, "Serializable isolation / Savepoints / Transactional DDL".
    """

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say it, not where the driver guesses
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_WAIT_SECONDS}000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("kdscale_read", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
