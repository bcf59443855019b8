"""Notices, who wants them, and up to which event they are written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "notices",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("topic", sa.String(100), nullable=False),
        sa.Column("run_id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("channel", sa.String(10), nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("address", "subject")),
        sa.Column("body", sa.JSON, nullable=False),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("created", "due")),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("sent", sa.Float),
        sa.Column("problem", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
        sa.UniqueConstraint("key", name="uq_notices_key"),
    )
    op.create_index("ix_notices_state_due", "notices", ["state", "due"])
    op.create_index("ix_notices_run_id_kind", "notices", ["run_id", "kind"])
    op.create_table(
        "subscriptions",
        sa.Column("run_id", sa.String(40), nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("kinds", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "place", name="pk_subscriptions"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_subscriptions_run_id", ondelete="CASCADE"),
    )
    op.create_table(
        "cursors",
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_cursors"),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("cursors", "subscriptions", "notices"):
        op.drop_table(table)
