"""The tables of the service's database: an index of run folders, and what no run folder holds.

Times are seconds since 1970 in UTC. JSON is kept as text that SQLAlchemy reads and writes.
"""

from __future__ import annotations

from sqlalchemy import Column, Float, ForeignKey, Index, Integer, MetaData, Table

from kdscale.service.database.columns import Json, Word, Words

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)  # fmt: skip

RUNS = Table(
    "runs", METADATA,
    Column("id", Word(40), primary_key=True),
    Column("name", Words(200), nullable=False),
    Column("owner", Word(200), nullable=False),
    Column("state", Word(20), nullable=False),
    Column("reason", Words(), nullable=False, default=""),
    Column("priority", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Column("queued", Float),  # when it last came into the queue
    Column("started", Float),
    Column("ended", Float),
    Column("due", Float),  # not before this time: a wait before another try, or the end of the grace of a stop
    Column("attempt", Integer, nullable=False, default=0),  # starts so far; names the folder of a job
    Column("tries", Integer, nullable=False, default=0),  # starts since it last was queued by somebody
    Column("config", Json, nullable=False),
    Column("config_name", Words(400), nullable=False, default=""),
    Column("overrides", Json, nullable=False),
    Column("target", Json, nullable=False),
    Column("folder", Words(), nullable=False, unique=True),
    Column("slots", Integer, nullable=False, default=1),
    Column("devices", Json, nullable=False),  # that it holds now
    Column("handle", Words()),  # what its engine calls the job
    Column("exit_code", Integer),
    Column("parent", Word(40)),  # the run that this one was made from
    Column("origin", Word(20), nullable=False, default="service"),  # or: command line
    Column("progress", Json, nullable=False),
    Index(None, "state", "priority", "queued"),
    Index(None, "owner", "state"),
)  # fmt: skip

EVENTS = Table(
    "events", METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("run_id", Word(40), nullable=False),
    Column("time", Float, nullable=False),
    Column("type", Word(60), nullable=False),
    Column("data", Json, nullable=False),
    Index(None, "run_id", "seq"),
    sqlite_autoincrement=True,  # a number is never given again, also after the last event was deleted
)  # fmt: skip

TOKENS = Table(
    "tokens", METADATA,
    Column("id", Word(40), primary_key=True),
    Column("name", Words(200), nullable=False),
    Column("owner", Word(200), nullable=False),
    Column("digest", Word(64), nullable=False, unique=True),  # SHA-256 of the secret: 256 random bits need no salt
    Column("scopes", Json, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("used", Float),
)  # fmt: skip

AUDIT = Table(
    "audit", METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("actor", Words(200), nullable=False),
    Column("action", Word(60), nullable=False),
    Column("run_id", Word(40)),
    Column("detail", Json, nullable=False),
    Column("address", Words(100), nullable=False, default=""),
    sqlite_autoincrement=True,
)  # fmt: skip

# What a request with an Idempotency-Key was answered, so that its repetition does nothing twice.
ANSWERS = Table(
    "answers", METADATA,
    Column("owner", Word(200), primary_key=True),
    Column("key", Word(200), primary_key=True),
    Column("request", Word(64), nullable=False),  # SHA-256 of method, path and body
    Column("created", Float, nullable=False),
    Column("status", Integer),  # None while the first request is still being answered
    Column("run_id", Word(40)),  # chosen before there is such a run: a repeated request makes the same one
    Column("body", Json),
    Index(None, "created"),
)  # fmt: skip

# What is told, to whom, and how far that is: one row for each recipient.
NOTICES = Table(
    "notices", METADATA,
    Column("id", Word(40), primary_key=True),  # the receiver's means to tell a repetition
    Column("key", Word(64), nullable=False, unique=True),  # digest of what is told and of the recipient
    Column("topic", Word(100), nullable=False),  # what is told
    Column("run_id", Word(40), nullable=False),
    Column("kind", Word(20), nullable=False),
    Column("channel", Word(10), nullable=False),
    Column("address", Words(), nullable=False),
    Column("subject", Words(), nullable=False),
    Column("body", Json, nullable=False),
    Column("created", Float, nullable=False),
    Column("due", Float, nullable=False),  # the next try; the end of the lease while one goes on
    Column("tries", Integer, nullable=False),
    Column("state", Word(10), nullable=False),  # waiting, sent, failed
    Column("sent", Float),
    Column("problem", Words(), nullable=False),
    Index(None, "state", "due"),
    Index(None, "run_id", "kind"),
)  # fmt: skip

# Who wants to hear of a run besides its owner's addresses in the settings.
SUBSCRIPTIONS = Table(
    "subscriptions", METADATA,
    Column("run_id", Word(40), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("address", Words(), nullable=False),
    Column("kinds", Json, nullable=False),
)  # fmt: skip

# Up to which event a reader has come that must look at every one exactly once.
CURSORS = Table(
    "cursors", METADATA,
    Column("name", Word(40), primary_key=True),
    Column("seq", Integer, nullable=False),
)  # fmt: skip
