"""Indexes for what is asked: attempts of a trial, runs by status, trials by method or dataset."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_trials_variant_id", "trials", ["variant_id"])
    op.create_index("ix_trials_label_dataset_id", "trials", ["label", "dataset_id"])
    op.create_index(
        "ix_trials_dataset_id_dataset_digest", "trials", ["dataset_id", "dataset_digest"]
    )
    op.create_index("ix_runs_trial_id_attempt", "runs", ["trial_id", "attempt"])
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_index("ix_artifacts_run_id", "artifacts", ["run_id"])
