"""The tables of the service's database: an index of run folders, and what no run folder holds.

Times are seconds since 1970 in UTC. JSON is kept as text that SQLAlchemy reads and writes.
"""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)  # fmt: skip

RUNS = Table(
    "runs", METADATA,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("owner", String(200), nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("priority", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Column("queued", Float),  # when it last came into the queue
    Column("started", Float),
    Column("ended", Float),
    Column("due", Float),  # not before this time: a wait before another try, or the end of the grace of a stop
    Column("attempt", Integer, nullable=False, default=0),  # starts so far; names the folder of a job
    Column("tries", Integer, nullable=False, default=0),  # starts since it last was queued by somebody
    Column("config", JSON, nullable=False),
    Column("config_name", String(400), nullable=False, default=""),
    Column("overrides", JSON, nullable=False),
    Column("target", JSON, nullable=False),
    Column("folder", Text, nullable=False, unique=True),
    Column("slots", Integer, nullable=False, default=1),
    Column("devices", JSON, nullable=False),  # that it holds now
    Column("handle", Text),  # what its engine calls the job
    Column("exit_code", Integer),
    Column("parent", String(40)),  # the run that this one was made from
    Column("origin", String(20), nullable=False, default="service"),  # or: command line
    Column("progress", JSON, nullable=False),
    Index(None, "state", "priority", "queued"),
    Index(None, "owner", "state"),
)  # fmt: skip

EVENTS = Table(
    "events", METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("run_id", String(40), nullable=False),
    Column("time", Float, nullable=False),
    Column("type", String(60), nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "run_id", "seq"),
    sqlite_autoincrement=True,  # a number is never given again, also after the last event was deleted
)  # fmt: skip

TOKENS = Table(
    "tokens", METADATA,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("owner", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the secret: 256 random bits need no salt
    Column("scopes", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("used", Float),
)  # fmt: skip

AUDIT = Table(
    "audit", METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(60), nullable=False),
    Column("run_id", String(40)),
    Column("detail", JSON, nullable=False),
    Column("address", String(100), nullable=False, default=""),
    sqlite_autoincrement=True,
)  # fmt: skip

# What a request with an Idempotency-Key was answered, so that its repetition does nothing twice.
ANSWERS = Table(
    "answers", METADATA,
    Column("owner", String(200), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("request", String(64), nullable=False),  # SHA-256 of method, path and body
    Column("created", Float, nullable=False),
    Column("status", Integer),  # None while the first request is still being answered
    Column("run_id", String(40)),  # chosen before there is such a run: a repeated request makes the same one
    Column("body", JSON),
    Index(None, "created"),
)  # fmt: skip

# What is told, to whom, and how far that is: one row for each recipient.
NOTICES = Table(
    "notices", METADATA,
    Column("id", String(40), primary_key=True),  # the receiver's means to tell a repetition
    Column("key", String(64), nullable=False, unique=True),  # digest of what is told and of the recipient
    Column("topic", String(100), nullable=False),  # what is told
    Column("run_id", String(40), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("channel", String(10), nullable=False),
    Column("address", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("due", Float, nullable=False),  # the next try; the end of the lease while one goes on
    Column("tries", Integer, nullable=False),
    Column("state", String(10), nullable=False),  # waiting, sent, failed
    Column("sent", Float),
    Column("problem", Text, nullable=False),
    Index(None, "state", "due"),
    Index(None, "run_id", "kind"),
)  # fmt: skip

# Who wants to hear of a run besides its owner's addresses in the settings.
SUBSCRIPTIONS = Table(
    "subscriptions", METADATA,
    Column("run_id", String(40), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("address", Text, nullable=False),
    Column("kinds", JSON, nullable=False),
)  # fmt: skip

# Up to which event a reader has come that must look at every one exactly once.
CURSORS = Table(
    "cursors", METADATA,
    Column("name", String(40), primary_key=True),
    Column("seq", Integer, nullable=False),
)  # fmt: skip
