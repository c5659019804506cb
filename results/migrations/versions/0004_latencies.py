"""Measured times of policy calls, kept with the run whose policy was called."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "latencies",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("measured_at", sa.Text, nullable=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.Column("compiled", sa.Boolean, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("threads", sa.BigInteger, nullable=False),
        sa.Column("calls", sa.BigInteger, nullable=False),
        sa.Column("median_ms", sa.Double, nullable=False),
        sa.Column("p99_ms", sa.Double, nullable=False),
        sa.Column("round_medians_ms", sa.Text, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.Column("hardware", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "measured_at", "batch", "compiled", name="pk_latencies"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_latencies_runs"),
    )
