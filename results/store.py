"""The results database: append records, read frames.

Owns what is stored and how it is asked for. Derives nothing that depends on a choice: normalised
scores and the choice of a checkpoint are made in `analysis`.

    with Store.open("sqlite:///runs/results.db") as store:
        store.append([dataset, trial, run, *evals])
        store.evaluations([trial.trial_id])
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from results import connection as connecting
from results import schema
from results.errors import MissingParentError, StoreError
from results.records import (
    FINISHED,
    ArtifactRecord,
    DatasetRecord,
    DetectionRecord,
    EvalRecord,
    LatencyRecord,
    MetricRecord,
    Record,
    RunRecord,
    Status,
    TrialRecord,
    from_json,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MissingParentError", "Store", "StoreError", "run_order_key"]

_TABLES: dict[type, sa.Table] = {  # parents before children
    DatasetRecord: schema.datasets,
    TrialRecord: schema.trials,
    RunRecord: schema.runs,
    EvalRecord: schema.evals,
    MetricRecord: schema.metrics,
    ArtifactRecord: schema.artifacts,
    LatencyRecord: schema.latencies,
    DetectionRecord: schema.detections,
}
_STATUSES: tuple[str, ...] = get_args(Status)


@dataclasses.dataclass(frozen=True)
class TrialState:
    """How far the attempt of a trial is that counts (see `Store.statuses`).

    Attributes:
        status: None if it never ran.
    """

    trial_id: str
    label: str
    dataset_id: str
    variant_id: str
    status: str | None
    steps_done: int | None
    error: str | None


class Store:
    """One open database. Threads may share it; a forked process opens its own."""

    def __init__(self, engine: sa.Engine, url: sa.URL) -> None:
        """Use `Store.open`."""
        self._engine = engine
        self._url = url
        self._labels: dict[str, str] = {}

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> Store:
        """The database at `url`, created or migrated if need be.

        Any number of processes may open an empty or an old database at once: one of them creates
        or migrates it while the others wait.

        Args:
            url: `sqlite:///relative.db`, `sqlite:////absolute.db`, `sqlite://` (in memory) or
                `postgresql://user:password@host:port/database`.
            read_only: never writes, not even to migrate.
        Raises:
            StoreError: if it cannot be opened; the message says why and what to do.
        """
        parsed = connecting.parse_url(url)
        return cls(connecting.open_engine(parsed, read_only), parsed)

    def close(self) -> None:
        """Closes all connections. The store opens new ones when used again."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def url(self) -> str:
        """The database's URL, without a password."""
        return connecting.without_password(self._url)

    def show_labels(self, labels: Mapping[str, str]) -> None:
        """What trials are called in all that is read from now on; nothing is written.

        A trial is stored under the label it was first planned under. Another experiment may have
        the same trial under another, and who asks for that one looks for its own.

        Args:
            labels: trial id -> label.
        """
        self._labels = dict(labels)

    @property
    def version(self) -> str:
        """The newest migration that was applied to the database."""
        with connecting.explain(self._url):
            return connecting.version(self._engine)

    # ------------------------------------------------------------------ writing

    def append(self, records: Iterable[Record]) -> int:
        """Number of rows added or advanced; writes all records in one transaction, or none.

        Idempotent by natural key, so a spool may be replayed at any time. The first row of a
        dataset, trial, evaluation, metric or artifact stays. A run's row is replaced by a later
        state of the run only (see `run_order_key`), so the outcome does not depend on the order
        of appends. Records may come in any order: parents are written first.

        Raises:
            MissingParentError: if a record's parent is neither in `records` nor stored.
            TypeError, ValueError: if a record's content cannot be stored; names the field.
            StoreError: if the database refuses.
        """
        batches: dict[type, list[Any]] = defaultdict(list)
        for record in records:
            if type(record) not in _TABLES:
                raise TypeError(
                    f"cannot append {type(record).__name__}; expected one of "
                    + ", ".join(kind.__name__ for kind in _TABLES)
                )
            batches[type(record)].append(record)
        if not batches:
            return 0
        written = 0
        rows = {kind: _rows(kind, batches[kind]) for kind in _TABLES if batches[kind]}
        with connecting.explain(self._url), self._engine.begin() as connection:
            self._check_parents(connection, rows)
            for kind, values in rows.items():
                written += connection.execute(
                    self._insert(kind), values, execution_options={"preserve_rowcount": True}
                ).rowcount
        return written

    def check_writable(self) -> None:
        """Takes the right to write and gives it back; changes nothing.

        Raises:
            StoreError: if the database cannot be written, with what to do.
        """
        nothing = sa.update(schema.trials).values(label=schema.trials.c.label).where(sa.false())
        with connecting.explain(self._url), self._engine.begin() as connection:
            connection.execute(nothing)

    def _insert(self, kind: type) -> Any:
        table = _TABLES[kind]
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(table)
        if kind is not RunRecord:
            return statement.on_conflict_do_nothing()
        new = statement.excluded
        return statement.on_conflict_do_update(
            index_elements=[table.c.run_id],
            set_={column.name: new[column.name] for column in table.c if column.name != "run_id"},
            where=new.order_key > table.c.order_key,
        )

    def _check_parents(
        self, connection: sa.Connection, rows: Mapping[type, list[dict[str, Any]]]
    ) -> None:
        """The database would refuse as well, but without naming the missing parent."""
        given = {
            "dataset": {(row["dataset_id"], row["digest"]) for row in rows.get(DatasetRecord, ())},
            "trial": {row["trial_id"] for row in rows.get(TrialRecord, ())},
            "run": {row["run_id"] for row in rows.get(RunRecord, ())},
        }
        needed: dict[str, dict[Any, str]] = {"dataset": {}, "trial": {}, "run": {}}
        for row in rows.get(TrialRecord, ()):
            key = (row["dataset_id"], row["dataset_digest"])
            needed["dataset"].setdefault(key, f"trial {row['trial_id']}")
        for row in rows.get(DetectionRecord, ()):
            key = (row["dataset_id"], row["dataset_digest"])
            needed["dataset"].setdefault(key, f"detector {row['detector']}")
        for row in rows.get(RunRecord, ()):
            needed["trial"].setdefault(row["trial_id"], f"run {row['run_id']}")
        for kind, word in (
            (EvalRecord, "an evaluation"),
            (MetricRecord, "a metric"),
            (LatencyRecord, "a latency"),
        ):
            for run_id in {row["run_id"] for row in rows.get(kind, ())}:
                needed["run"].setdefault(run_id, word)
        for row in rows.get(ArtifactRecord, ()):
            if row["run_id"] is not None:
                needed["run"].setdefault(row["run_id"], f"artifact {row['stage_id']}")
        keys = {
            "dataset": (schema.datasets.c.dataset_id, schema.datasets.c.digest),
            "trial": (schema.trials.c.trial_id,),
            "run": (schema.runs.c.run_id,),
        }
        for parent, wanted in needed.items():
            missing = [key for key in wanted if key not in given[parent]]
            if not missing:
                continue
            columns = keys[parent]
            first = [key[0] if len(columns) > 1 else key for key in missing]
            found = connection.execute(
                sa.select(*columns).where(self._among(columns[0], first))
            ).all()
            stored = {tuple(row) if len(columns) > 1 else row[0] for row in found}
            missing = [key for key in missing if key not in stored]
            if missing:
                shown = "; ".join(
                    f"{parent} {' with digest '.join(key) if isinstance(key, tuple) else key} "
                    f"(needed by {wanted[key]})"
                    for key in missing[:5]
                )
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise MissingParentError(
                    f"not in the database and not in this append: {shown}{more}. Append the "
                    f"{parent} first, or together with what refers to it; nothing was written"
                )

    # ------------------------------------------------------------------ reading

    def datasets(self) -> pd.DataFrame:
        """All datasets, one row per content; `card` decoded."""
        table = schema.datasets
        return self._frame(sa.select(table).order_by(table.c.dataset_id, table.c.digest))

    def trials(self, trial_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """Trials, by label, dataset and seed; `data`, `config` and `evaluation` decoded.

        Args:
            trial_ids: which, in any number; None for all. Unknown ids give no row.
        """
        table = schema.trials
        query = sa.select(table).order_by(
            table.c.label, table.c.dataset_id, table.c.variant_id, table.c.seed, table.c.trial_id
        )
        frame = self._frame(self._only(query, table.c.trial_id, trial_ids))
        if not self._labels:
            return frame
        frame["label"] = [
            self._labels.get(trial_id, label)
            for trial_id, label in zip(frame.trial_id, frame.label, strict=True)
        ]
        order = ["label", "dataset_id", "variant_id", "seed", "trial_id"]
        return frame.sort_values(order, ignore_index=True)

    def runs(self, trial_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """All attempts, in their order for each trial; JSON columns decoded."""
        table = schema.runs
        columns = [column for column in table.c if column.name != "order_key"]
        query = sa.select(*columns).order_by(table.c.trial_id, *_attempt_order(table.c))
        return self._frame(self._only(query, table.c.trial_id, trial_ids))

    def evaluations(
        self, trial_ids: Iterable[str] | None = None, run_ids: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Every evaluation episode of every attempt, with `trial_id` and `attempt` in front."""
        table, run = schema.evals, schema.runs
        query = (
            sa.select(run.c.trial_id, run.c.attempt, table)
            .join_from(table, run, table.c.run_id == run.c.run_id)
            .order_by(run.c.trial_id, run.c.attempt, table.c.run_id, table.c.step, table.c.episode)
        )
        query = self._only(query, run.c.trial_id, trial_ids)
        return self._frame(self._only(query, table.c.run_id, run_ids))

    def evaluation_means(
        self,
        trial_ids: Iterable[str] | None = None,
        statuses: Sequence[Status] = ("done", "diverged", "running"),
    ) -> pd.DataFrame:
        """Mean return per evaluation, of one run per trial: of its attempts with such a status the
        one that `statuses` prefers.

        Columns: trial_id, run_id, status, step, mean_return (NaN if any episode's return is),
        mean_length, episodes (how many).
        """
        run, table = schema.runs, schema.evals
        _check_statuses(statuses)
        ranked = sa.select(
            run.c.run_id,
            run.c.trial_id,
            run.c.status,
            sa.func.row_number()
            .over(
                partition_by=run.c.trial_id,
                order_by=[column.desc() for column in _standing_order(run.c)],
            )
            .label("place"),
        ).where(run.c.status.in_(list(statuses)))
        latest = self._only(ranked, run.c.trial_id, trial_ids).cte("latest")
        returns = table.c.episode_return
        # Grouped in the order of the primary key, before the join: no sorting of a million rows.
        means = (
            sa.select(
                table.c.run_id,
                table.c.step,
                # SQLite's NaN is NULL, which AVG skips: a mean over the rest would be a lie.
                sa.case(
                    (sa.func.count(returns) == sa.func.count(), _mean(returns)), else_=None
                ).label("mean_return"),
                _mean(sa.cast(table.c.length, sa.Double)).label("mean_length"),
                sa.func.count().label("episodes"),
            )
            .where(table.c.run_id.in_(sa.select(latest.c.run_id).where(latest.c.place == 1)))
            .group_by(table.c.run_id, table.c.step)
            .subquery()
        )
        query = (
            sa.select(
                latest.c.trial_id,
                means.c.run_id,
                latest.c.status,
                means.c.step,
                means.c.mean_return,
                means.c.mean_length,
                means.c.episodes,
            )
            .join_from(means, latest, means.c.run_id == latest.c.run_id)
            .order_by(latest.c.trial_id, means.c.step)
        )
        return self._frame(query)

    def metrics(
        self, trial_ids: Iterable[str] | None = None, names: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Training metrics of every attempt, with `trial_id` and `attempt` in front.

        Args:
            trial_ids: of which trials; None for all.
            names: which metrics; None for all.
        """
        table, run = schema.metrics, schema.runs
        query = (
            sa.select(run.c.trial_id, run.c.attempt, table)
            .join_from(table, run, table.c.run_id == run.c.run_id)
            .order_by(run.c.trial_id, run.c.attempt, table.c.run_id, table.c.name, table.c.step)
        )
        query = self._only(query, run.c.trial_id, trial_ids)
        return self._frame(self._only(query, table.c.name, names, "names"))

    def latencies(self, trial_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """All measured latencies, oldest first, with `trial_id` in front; JSON columns decoded."""
        table, run = schema.latencies, schema.runs
        query = (
            sa.select(run.c.trial_id, table)
            .join_from(table, run, table.c.run_id == run.c.run_id)
            .order_by(table.c.measured_at, table.c.run_id, table.c.batch, table.c.compiled)
        )
        return self._frame(self._only(query, run.c.trial_id, trial_ids))

    def detections(self) -> pd.DataFrame:
        """All comparisons of detectors, by dataset, detector, kind of action and seed."""
        table = schema.detections
        columns = (table.c.dataset_id, table.c.detector, table.c.against, table.c.seed)
        return self._frame(sa.select(table).order_by(*columns, table.c.created_at))

    def artifacts(self) -> pd.DataFrame:
        """All published stages."""
        table = schema.artifacts
        return self._frame(sa.select(table).order_by(table.c.created_at, table.c.stage_id))

    def records(
        self, kinds: Iterable[type], trial_ids: Iterable[str] | None = None
    ) -> Iterator[Record]:
        """Everything stored of some trials as it was appended, parents first.

        All of one moment, also while others write: no record lacks its parent.

        Args:
            kinds: record classes.
            trial_ids: of which trials, with the datasets they use; None for all of the database.
        """
        ids = None if trial_ids is None else list(trial_ids)
        trial, run = schema.trials, schema.runs
        of_trials = self._only(sa.select(trial.c.trial_id), trial.c.trial_id, ids)
        of_runs = self._only(sa.select(run.c.run_id), run.c.trial_id, ids)
        used = sa.select(trial.c.dataset_id).where(trial.c.trial_id.in_(of_trials))
        if ids is None:
            used = sa.select(schema.datasets.c.dataset_id)
        restrict = {
            DatasetRecord: schema.datasets.c.dataset_id.in_(used),
            TrialRecord: trial.c.trial_id.in_(of_trials),
            RunRecord: run.c.trial_id.in_(of_trials),
            EvalRecord: schema.evals.c.run_id.in_(of_runs),
            MetricRecord: schema.metrics.c.run_id.in_(of_runs),
            ArtifactRecord: schema.artifacts.c.run_id.in_(of_runs),
            LatencyRecord: schema.latencies.c.run_id.in_(of_runs),
            DetectionRecord: schema.detections.c.dataset_id.in_(used),
        }
        wanted = set(kinds)
        with connecting.explain(self._url), self._snapshot() as connection:
            for kind, table in _TABLES.items():
                if kind not in wanted:
                    continue
                names = [field.name for field in dataclasses.fields(kind)]
                query = sa.select(*(table.c[name] for name in names)).where(restrict[kind])
                for row in connection.execute(query.order_by(*table.primary_key)):
                    values = dict(zip(names, row, strict=True))
                    if kind is TrialRecord:
                        values["label"] = self._labels.get(values["trial_id"], values["label"])
                    yield from_json(kind, values)

    def statuses(self, trial_ids: Iterable[str] | None = None) -> dict[str, RunRecord]:
        """The attempt of each trial that counts: the latest that is done, else the latest.

        Trials without a run have no entry.
        """
        table = schema.runs
        columns = [table.c[field.name] for field in dataclasses.fields(RunRecord)]
        query = sa.select(*columns).order_by(*_standing_order(table.c))
        latest: dict[str, RunRecord] = {}
        for row in self._read(self._only(query, table.c.trial_id, trial_ids)):
            latest[row.trial_id] = from_json(RunRecord, dict(row._mapping))
        return latest

    def states(self, trial_ids: Iterable[str] | None = None) -> list[TrialState]:
        """How far each trial is, by label, dataset and seed: no frame, for what must answer fast.

        Args:
            trial_ids: which; None for all. Unknown ids give no entry.
        """
        trial, run = schema.trials.c, schema.runs.c
        query = (
            sa.select(
                *(trial.trial_id, trial.label, trial.dataset_id, trial.variant_id),
                *(run.status, run.steps_done, run.error),
            )
            .outerjoin_from(schema.trials, schema.runs)
            .order_by(
                *(trial.label, trial.dataset_id, trial.variant_id, trial.seed, trial.trial_id),
                *_standing_order(run),
            )
        )
        rows = self._read(self._only(query, trial.trial_id, trial_ids))
        states = {row.trial_id: TrialState(**row._mapping) for row in rows}
        if not self._labels:
            return list(states.values())
        shown = [
            dataclasses.replace(state, label=self._labels.get(state.trial_id, state.label))
            for state in states.values()
        ]
        return sorted(shown, key=lambda state: (state.label, state.dataset_id, state.variant_id))

    def counts(self) -> dict[str, int]:
        """Number of rows in each table."""
        tables = [table.name for table in _TABLES.values()]
        queries = [
            sa.select(sa.func.count()).select_from(schema.metadata.tables[name]).scalar_subquery()
            for name in tables
        ]
        (row,) = self._read(sa.select(*queries))
        return dict(zip(tables, row, strict=True))

    def describe(self) -> dict[str, Any]:
        """What this database is, for people: url, server, version, size in bytes, rows."""
        with connecting.explain(self._url), self._connect() as connection:
            if self._engine.dialect.name == "postgresql":
                server = connection.scalar(sa.text("SHOW server_version"))
                size = connection.scalar(sa.text("SELECT pg_database_size(current_database())"))
                facts = {"server": f"PostgreSQL {server}", "bytes": size}
            else:
                server = connection.scalar(sa.text("SELECT sqlite_version()"))
                mode = connection.scalar(sa.text("PRAGMA journal_mode"))
                path = self._engine.url.database or ""
                files = [Path(path), Path(path + "-wal")] if path else []
                size = sum(file.stat().st_size for file in files if file.is_file())
                facts = {"server": f"SQLite {server}", "journal_mode": mode, "bytes": size}
        return {
            "url": self.url,
            **facts,
            "version": self.version,
            "newest_version": schema.VERSION,
            "counts": self.counts(),
        }

    # ------------------------------------------------------------------ plumbing

    def _connect(self) -> sa.Connection:
        return self._engine.connect().execution_options(reads=True)

    def _snapshot(self) -> sa.Connection:
        """A connection whose queries all see the database as the first of them does."""
        connection = self._connect()
        if self._engine.dialect.name == "postgresql":
            return connection.execution_options(isolation_level="REPEATABLE READ")
        return connection  # SQLite's transactions are like that

    def _read(self, query: Any) -> Sequence[sa.Row[Any]]:
        with connecting.explain(self._url), self._connect() as connection:
            return connection.execute(query).all()

    def _frame(self, query: sa.Select[Any]) -> pd.DataFrame:
        import numpy as np
        import pandas as pd

        rows = self._read(query)
        columns = list(query.selected_columns)
        values = zip(*rows, strict=True) if rows else ((),) * len(columns)
        frame = {}
        for column, content in zip(columns, values, strict=True):
            kind = column.type
            series: Any
            if isinstance(kind, schema.UtcTime):
                series = pd.to_datetime(
                    pd.Series(content, dtype=object), utc=True, format="ISO8601"
                )
            elif isinstance(kind, sa.Boolean):
                series = np.array(content, dtype=bool)
            elif isinstance(kind, sa.Integer) and getattr(column, "nullable", False):
                series = pd.array(content, dtype="Int64")
            elif isinstance(kind, sa.Integer):
                series = np.array(content, dtype=np.int64)
            elif isinstance(kind, sa.Float):
                series = np.array(content, dtype=np.float64)  # None becomes nan
            else:
                series = pd.Series(content, dtype=object)
            frame[column.name] = series
        return pd.DataFrame(frame, columns=[column.name for column in columns])

    def _only(
        self,
        query: sa.Select[Any],
        column: Any,
        values: Iterable[str] | None,
        argument: str = "trial_ids",
    ) -> sa.Select[Any]:
        if values is None:
            return query
        if isinstance(values, str):
            raise TypeError(f"{argument} is a list of strings, got the string {values!r}")
        return query.where(self._among(column, list(values)))

    def _among(self, column: Any, values: list[str]) -> Any:
        """`column IN values` with one parameter, however many values there are."""
        wrong = [value for value in values if not isinstance(value, str)]
        if wrong:
            raise TypeError(f"ids and names are strings, got {wrong[0]!r}")
        encoded = schema.canonical_json(sorted(set(values)))
        if self._engine.dialect.name == "postgresql":
            array = sa.cast(sa.bindparam(None, encoded, sa.Text), sa.JSON)
            given = sa.func.json_array_elements_text(array).table_valued("value")
        else:
            given = sa.func.json_each(sa.bindparam(None, encoded, sa.Text)).table_valued("value")
        return column.in_(sa.select(given.c.value))


def run_order_key(run: RunRecord) -> str:
    """A string that is larger for a later state of the same run: a total order over states.

    In this order: an outcome (done, diverged) beats everything that may be continued; more
    segments beat fewer (a process adds its own when it starts); within a segment an end
    (interrupted, failed) beats running, a later end an earlier one, more steps fewer; what is
    still equal is settled by the status and at last by the content, so that two different rows are
    never equal. A replayed 'running' row therefore never hides how a run ended.

    Raises:
        ValueError: if a time is malformed.
    """
    content = schema.canonical_json(
        {field.name: getattr(run, field.name) for field in dataclasses.fields(RunRecord)}
    )
    ended = run.status != "running"
    return "|".join(
        (
            str(int(run.status in FINISHED)),
            f"{len(run.segments):08d}",
            str(int(ended)),
            _microseconds(run.ended_at, "ended_at") if run.ended_at else "0" * 20,
            f"{run.steps_done:020d}",
            str(_STATUSES.index(run.status)),
            hashlib.sha256(content.encode()).hexdigest(),
        )
    )


def _mean(column: Any) -> sa.Function[float]:
    return sa.func.avg(column, type_=sa.Double)


def _attempt_order(columns: Any) -> list[Any]:
    return [columns.attempt, columns.started_at, columns.run_id]


def _standing_order(columns: Any) -> list[Any]:
    """The attempt that counts comes last: what is done is not undone by a later try elsewhere."""
    return [sa.case((columns.status == "done", 1), else_=0), *_attempt_order(columns)]


def _check_statuses(statuses: Sequence[str]) -> None:
    unknown = [status for status in statuses if status not in _STATUSES]
    if isinstance(statuses, str) or unknown:
        raise ValueError(f"statuses is a list drawn from {', '.join(_STATUSES)}; got {statuses!r}")


# ---------------------------------------------------------------------------- records to rows


def _rows(kind: type, records: list[Any]) -> list[dict[str, Any]]:
    """Rows sorted by natural key, so that processes that append at once lock in the same order."""
    table = _TABLES[kind]
    names = [field.name for field in dataclasses.fields(kind)]
    convert = [(name, _CONVERT[type(table.c[name].type)], table.c[name].nullable) for name in names]
    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name, converter, nullable in convert:
            value = getattr(record, name)
            if value is None and nullable:
                row[name] = None
                continue
            try:
                row[name] = converter(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise type(error)(
                    f"{kind.__name__}.{name}: {error} (in {_short(record, table)}); "
                    "nothing was written"
                ) from None
        if kind is RunRecord:
            _complete_run(record, row)
        rows.append(row)

    def key(row: Mapping[str, Any]) -> list[Any]:
        found = (row[column.name] for column in table.primary_key)
        return [schema.canonical_json(v) if isinstance(v, Mapping) else v for v in found]

    return sorted(rows, key=key)


def _complete_run(run: RunRecord, row: dict[str, Any]) -> None:
    if run.status not in _STATUSES:
        raise ValueError(
            f"RunRecord.status is {run.status!r} (run {run.run_id}); expected one of "
            + ", ".join(_STATUSES)
        )
    if run.attempt < 1 or run.steps_done < 0:
        raise ValueError(
            f"run {run.run_id} has attempt {run.attempt} and steps_done {run.steps_done}; "
            "attempts count from 1, steps from 0"
        )
    row["order_key"] = _text(run_order_key(run))


def _short(record: Any, table: sa.Table) -> str:
    keys = [column.name for column in table.primary_key]
    return ", ".join(f"{key}={getattr(record, key)!r}" for key in keys)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r} ({type(value).__name__})")
    if value.isascii() and "\x00" not in value:
        return value
    # A traceback may hold what no database takes as text.
    value = value.replace("\x00", "\\x00")
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _integer(value: Any) -> int:
    number = operator.index(value)  # TypeError for floats; takes numpy's integers
    if not -(2**63) <= number < 2**63:
        raise OverflowError(f"{number} does not fit in 64 bits")
    return number


def _float(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def _boolean(value: Any) -> bool:
    if value is True or value is False or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"expected True or False, got {value!r}")


def _time(value: Any) -> str:
    _microseconds(value, "time")
    return value


def _json(value: Any) -> Any:
    schema.canonical_json(value)  # encoded by the column; here for an error that names the field
    return value


_CONVERT: dict[type, Callable[[Any], Any]] = {
    sa.Text: _text,
    sa.BigInteger: _integer,
    sa.Double: _float,
    sa.Boolean: _boolean,
    schema.UtcTime: _time,
    schema.CanonicalJson: _json,
}


def _microseconds(time: Any, name: str) -> str:
    """Microseconds since 1970, 20 digits: sorts as the times do, with or without fractions."""
    if not isinstance(time, str) or not time.endswith("Z"):
        raise ValueError(f"{name} is {time!r}; expected ISO 8601 in UTC, as 2031-05-06T07:08:09Z")
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        raise ValueError(
            f"{name} is {time!r}; expected ISO 8601 in UTC, as 2031-05-06T07:08:09Z"
        ) from None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return f"{since.days * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds:020d}"
