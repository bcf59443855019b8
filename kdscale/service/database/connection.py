"""Opens the database, in SQLite or Postgres, and brings its tables to this version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from kdscale.errors import ServiceError
from kdscale.service.settings import ServiceSettings

_MIGRATIONS = Path(__file__).parent / "migrations"
_WAIT_SECONDS = 30  # for another process that writes
_LOCK = 0x6B647363  # the advisory lock of a migration in Postgres


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
        with self.engine.connect().execution_options(kdscale_read=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_database(settings: ServiceSettings) -> Database:
    """The service's database, made or migrated first. Raises ServiceError in words when it cannot be opened."""
    url = make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
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


def migrate(database: Database) -> None:
    """Bring the tables to this version; several processes may call this at once."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with database.begin() as connection:
        if not database.is_sqlite:  # SQLite's transaction holds the only write lock already
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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
