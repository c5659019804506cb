"""Detectors of out-of-distribution actions, compared on a dataset."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "detections",
        sa.Column("dataset_id", sa.Text, nullable=False),
        sa.Column("dataset_digest", sa.Text, nullable=False),
        sa.Column("detector", sa.Text, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("against", sa.Text, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("auroc", sa.Double, nullable=False),
        sa.Column("aupr", sa.Double, nullable=False),
        sa.Column("fpr95", sa.Double, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("git_commit", sa.Text, nullable=False),
        sa.Column("git_dirty", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint(
            "dataset_id",
            "dataset_digest",
            "detector",
            "config",
            "seed",
            "against",
            "count",
            name="pk_detections",
        ),
        sa.ForeignKeyConstraint(
            ["dataset_id", "dataset_digest"],
            ["datasets.dataset_id", "datasets.digest"],
            name="fk_detections_datasets",
        ),
    )
