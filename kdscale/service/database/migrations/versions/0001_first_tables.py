"""The first tables: runs, events, tokens, audit, answers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "runs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("created", "updated")),
        *(sa.Column(name, sa.Float) for name in ("queued", "started", "ended", "due")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("attempt", "tries")),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("config_name", sa.String(400), nullable=False),
        *(sa.Column(name, sa.JSON, nullable=False) for name in ("overrides", "target")),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("devices", sa.JSON, nullable=False),
        sa.Column("handle", sa.Text),
        sa.Column("exit_code", sa.Integer),
        sa.Column("parent", sa.String(40)),
        sa.Column("origin", sa.String(20), nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.UniqueConstraint("folder", name="uq_runs_folder"),
    )
    op.create_index("ix_runs_state_priority_queued", "runs", ["state", "priority", "queued"])
    op.create_index("ix_runs_owner_state", "runs", ["owner", "state"])
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("run_id", sa.String(40), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("type", sa.String(60), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_events"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_run_id_seq", "events", ["run_id", "seq"])
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        *(sa.Column(name, sa.Float) for name in ("expires", "revoked", "used")),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(60), nullable=False),
        sa.Column("run_id", sa.String(40)),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.Column("address", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "answers",
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("run_id", sa.String(40)),
        sa.Column("body", sa.JSON),
        sa.PrimaryKeyConstraint("owner", "key", name="pk_answers"),
    )
    op.create_index("ix_answers_created", "answers", ["created"])


def downgrade() -> None:
    """Remove the tables."""
    for table in ("answers", "audit", "tokens", "events", "runs"):
        op.drop_table(table)
