"""The tables. Written out in full: a migration never imports the schema, which moves on."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("dataset_id", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("env_id", sa.Text, nullable=False),
        sa.Column("relation", sa.Text, nullable=False),
        sa.Column("ref_min", sa.Double),
        sa.Column("ref_max", sa.Double),
        sa.Column("ref_source", sa.Text, nullable=False),
        sa.Column("num_steps", sa.BigInteger, nullable=False),
        sa.Column("num_episodes", sa.BigInteger, nullable=False),
        sa.Column("card", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("dataset_id", "digest", name="pk_datasets"),
    )
    op.create_table(
        "trials",
        sa.Column("trial_id", sa.Text, nullable=False),
        sa.Column("variant_id", sa.Text, nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("algorithm", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("dataset_id", sa.Text, nullable=False),
        sa.Column("dataset_digest", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("evaluation", sa.Text, nullable=False),
        sa.Column("simulator", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("trial_id", name="pk_trials"),
        sa.ForeignKeyConstraint(
            ["dataset_id", "dataset_digest"],
            ["datasets.dataset_id", "datasets.digest"],
            name="fk_trials_datasets",
        ),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("trial_id", sa.Text, nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("started_at", sa.Text, nullable=False),
        sa.Column("ended_at", sa.Text),
        sa.Column("git_commit", sa.Text, nullable=False),
        sa.Column("git_dirty", sa.Boolean, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.Column("hardware", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("compiled", sa.Boolean, nullable=False),
        sa.Column("stack", sa.Text, nullable=False),
        sa.Column("timings", sa.Text, nullable=False),
        sa.Column("steps_done", sa.BigInteger, nullable=False),
        sa.Column("segments", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column(
            "order_key",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.trial_id"], name="fk_runs_trials"),
    )
    op.create_table(
        "evals",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("episode", sa.BigInteger, nullable=False),
        sa.Column("env_seed", sa.BigInteger, nullable=False),
        sa.Column("episode_return", sa.Double),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "step", "episode", name="pk_evals"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_evals_runs"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "metrics",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Double),
        sa.PrimaryKeyConstraint("run_id", "name", "step", name="pk_metrics"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_metrics_runs"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "artifacts",
        sa.Column("stage_id", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("stage_id", name="pk_artifacts"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_artifacts_runs"),
    )
