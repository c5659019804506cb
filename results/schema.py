"""The tables of the results database (SQLAlchemy Core), the same for SQLite and PostgreSQL.

Owns the shape of the tables as the code expects them; how a database gets there is in
`migrations/`, and a test compares the two. Every change here comes with a migration and a new
`VERSION`.

Two conventions:

- A float that may be NaN is nullable, because SQLite stores NaN as NULL (infinities survive in
  both databases). Reading gives NaN back.
- JSON lives in text columns, canonical (sorted keys, no spaces), so that equal values are equal
  strings in both databases; NaN and infinities are written as Python writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

VERSION = "0006"
"""The newest migration: what `Store.open` brings a database to."""

VERSION_TABLE = "migrations"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; tuples become lists, numpy scalars become numbers.

    Raises:
        TypeError: if a value, or a mapping's key, has no JSON form.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"JSON keys are strings, got {wrong[0]!r} ({type(wrong[0]).__name__})")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return _plain(value.tolist())
    raise TypeError(f"{value!r} ({type(value).__name__}) has no JSON form; give plain values")


class CanonicalJson(sa.types.TypeDecorator[Any]):
    """A text column that holds canonical JSON."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        return canonical_json(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


class UtcTime(sa.types.TypeDecorator[str]):
    """A text column that holds ISO 8601 times in UTC with a trailing 'Z'."""

    impl = sa.Text
    cache_ok = True


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
    }
)

# Compared byte by byte in both databases: PostgreSQL would otherwise use the server's locale.
_ORDER_KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("dataset_id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("env_id", sa.Text, nullable=False),
    sa.Column("relation", sa.Text, nullable=False),
    sa.Column("ref_min", sa.Double),
    sa.Column("ref_max", sa.Double),
    sa.Column("ref_source", sa.Text, nullable=False),
    sa.Column("num_steps", sa.BigInteger, nullable=False),
    sa.Column("num_episodes", sa.BigInteger, nullable=False),
    sa.Column("card", CanonicalJson, nullable=False),
)

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("trial_id", sa.Text, primary_key=True),
    sa.Column("variant_id", sa.Text, nullable=False, index=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("algorithm", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("dataset_id", sa.Text, nullable=False),
    sa.Column("dataset_digest", sa.Text, nullable=False),
    sa.Column("data", CanonicalJson, nullable=False),
    sa.Column("config", CanonicalJson, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("evaluation", CanonicalJson, nullable=False),
    sa.Column("simulator", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("precision", sa.Text, nullable=False, server_default="float32"),
    sa.ForeignKeyConstraint(
        ["dataset_id", "dataset_digest"], ["datasets.dataset_id", "datasets.digest"]
    ),
    sa.Index(None, "label", "dataset_id"),
    sa.Index(None, "dataset_id", "dataset_digest"),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("trial_id", sa.Text, sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("started_at", UtcTime, nullable=False),
    sa.Column("ended_at", UtcTime),
    sa.Column("git_commit", sa.Text, nullable=False),
    sa.Column("git_dirty", sa.Boolean, nullable=False),
    sa.Column("versions", CanonicalJson, nullable=False),
    sa.Column("hardware", CanonicalJson, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("compiled", sa.Boolean, nullable=False),
    sa.Column("stack", CanonicalJson, nullable=False),
    sa.Column("timings", CanonicalJson, nullable=False),
    sa.Column("steps_done", sa.BigInteger, nullable=False),
    sa.Column("segments", CanonicalJson, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("order_key", _ORDER_KEY, nullable=False),  # see store.run_order_key
    sa.Index(None, "trial_id", "attempt"),
)

# The two large tables are clustered on their natural key in SQLite (no rowid): half the size, and
# the rows of one run lie together in the order they are read.
evals = sa.Table(
    "evals",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("episode", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("env_seed", sa.BigInteger, nullable=False),
    sa.Column("episode_return", sa.Double),  # NULL is NaN
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("mode", sa.BigInteger),  # NULL: the environment tells none
    sqlite_with_rowid=False,
)

metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Double),  # NULL is NaN
    sqlite_with_rowid=False,
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("stage_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), index=True),
    sa.Column("stage", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

# The time of a measurement is part of its key: measuring again keeps both.
latencies = sa.Table(
    "latencies",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.run_id"), primary_key=True),
    sa.Column("measured_at", UtcTime, primary_key=True),
    sa.Column("batch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("compiled", sa.Boolean, primary_key=True),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("threads", sa.BigInteger, nullable=False),
    sa.Column("calls", sa.BigInteger, nullable=False),
    sa.Column("median_ms", sa.Double, nullable=False),
    sa.Column("p99_ms", sa.Double, nullable=False),
    sa.Column("round_medians_ms", CanonicalJson, nullable=False),
    sa.Column("versions", CanonicalJson, nullable=False),
    sa.Column("hardware", CanonicalJson, nullable=False),
)

# Detectors compared on a dataset belong to no run.
detections = sa.Table(
    "detections",
    metadata,
    sa.Column("dataset_id", sa.Text, primary_key=True),
    sa.Column("dataset_digest", sa.Text, primary_key=True),
    sa.Column("detector", sa.Text, primary_key=True),
    sa.Column("config", CanonicalJson, primary_key=True),
    sa.Column("seed", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("against", sa.Text, primary_key=True),
    sa.Column("count", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("auroc", sa.Double, nullable=False),
    sa.Column("aupr", sa.Double, nullable=False),
    sa.Column("fpr95", sa.Double, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("git_commit", sa.Text, nullable=False),
    sa.Column("git_dirty", sa.Boolean, nullable=False),
    sa.ForeignKeyConstraint(
        ["dataset_id", "dataset_digest"], ["datasets.dataset_id", "datasets.digest"]
    ),
)
