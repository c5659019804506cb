"""Records of chosen trials as one parquet file, to keep beside the spec that made them.

Columns: `kind` (the record's class) and `record` (its fields as JSON). Reading gives a database in
memory, so that everything that reads a results database reads an archive as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import records
from results.errors import ArchiveError
from results.records import FINISHED, Record

if TYPE_CHECKING:
    import pyarrow as pa

    from results.store import Store

KINDS = {
    kind.__name__: kind
    for kind in (
        records.DatasetRecord,
        records.TrialRecord,
        records.RunRecord,
        records.EvalRecord,
        records.MetricRecord,
        records.LatencyRecord,
        records.DetectionRecord,
    )
}
"""What an archive holds; detections are those on the trials' datasets. Artifacts stay where they
are, so their rows are left out."""

_OF_RUNS = (records.EvalRecord, records.MetricRecord, records.LatencyRecord)

SHIPPED = Path(__file__).parent / "evidence"
"""Archives that come with the package: <name>/rows.parquet beside <name>/spec.yaml."""


def write(store: Store, path: Path, trial_ids: Iterable[str] | None = None) -> int:
    """Writes the rows of trials (None: of all) and returns their number. Replaces atomically.

    Raises:
        ArchiveError: if there are no rows.
    """
    import pyarrow as pa

    found = list(store.records(KINDS.values(), trial_ids))
    if not found:
        raise ArchiveError("the database has no rows of these trials; run the sweep first")
    table = pa.table(
        {
            "kind": pa.array([type(record).__name__ for record in found]).dictionary_encode(),
            "record": [json.dumps(dataclasses.asdict(record), sort_keys=True) for record in found],
        }
    )
    save_table(table, path, compression="zstd")
    return len(found)


def save_table(table: pa.Table, path: Path, **options: Any) -> None:
    """Writes a parquet file under its final name complete or not at all.

    Args:
        options: of `pyarrow.parquet.write_table`.
    """
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            parquet.write_table(table, file, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> list[Record]:
    """The records of an archive.

    Raises:
        ArchiveError: if the file is missing or is no archive.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["kind", "record"])
    except FileNotFoundError:
        raise ArchiveError(f"{path}: no such archive; `harness archive` writes one") from None
    except (pa.ArrowException, OSError) as error:
        raise ArchiveError(f"{path}: not an archive of results ({error})") from error
    rows = zip(table["kind"].to_pylist(), table["record"].to_pylist(), strict=True)
    return [_record(kind, text, path) for kind, text in rows]


def _record(kind: str, text: str, path: Path) -> Any:
    if kind not in KINDS:
        raise ArchiveError(f"{path}: unknown kind of record {kind!r}; written by a newer version?")
    try:
        return records.from_json(KINDS[kind], json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArchiveError(f"{path}: a {kind} does not fit this version: {error}") from error


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of an archive's rows.

    Attributes:
        rows: how many it has.
        added: rows that were new, or newer.
        known: trials that had an outcome here already: the archive's other training was left out.
        unfinished: runs that were left out because they can only be continued where they began.
    """

    rows: int
    added: int
    known: int
    unfinished: int


def merge(store: Store, paths: Sequence[Path]) -> list[Merged]:
    """Adds archives to a database, and tells for each what was added and what was left out.

    Trials are the same wherever they ran, so that those done elsewhere count as done here; their
    policies are not there. A run comes whole or not at all: rows of two trainings of one trial are
    never mixed. Where both have an outcome the one that is here stays. All archives are read
    before the first row is written.

    Raises:
        ArchiveError: if a file is missing or is no archive.
    """
    return [_merge(store, rows, keep_unfinished=False) for rows in [read(path) for path in paths]]


def _merge(store: Store, rows: list[Record], keep_unfinished: bool) -> Merged:
    incoming: dict[str, list[records.RunRecord]] = {}
    for row in rows:
        if isinstance(row, records.RunRecord):
            incoming.setdefault(row.trial_id, []).append(row)
    here: dict[str, list[records.RunRecord]] = {trial_id: [] for trial_id in incoming}
    for run in store.records([records.RunRecord], incoming):
        assert isinstance(run, records.RunRecord)
        here[run.trial_id].append(run)
    kept: dict[str, records.RunRecord] = {}  # run id in the archive -> what it is here
    known = unfinished = 0
    for trial_id, runs in incoming.items():
        ours = [run for run in here[trial_id] if not any(_same(run, other) for other in runs)]
        decided = any(run.status in FINISHED for run in ours)
        known += decided
        for run in runs:
            same = next((other for other in here[trial_id] if _same(run, other)), None)
            if same is not None:
                kept[run.run_id] = same
            elif not decided and run.status not in FINISHED and (ours or not keep_unfinished):
                unfinished += 1
            elif not decided:
                kept[run.run_id] = _beside(run, ours)
    found: list[Record] = []
    for row in rows:
        if isinstance(row, records.RunRecord):
            if row.run_id in kept:
                own = kept[row.run_id]
                found.append(dataclasses.replace(row, run_id=own.run_id, attempt=own.attempt))
        elif isinstance(row, _OF_RUNS):
            if row.run_id in kept:
                found.append(dataclasses.replace(row, run_id=kept[row.run_id].run_id))
        else:
            found.append(row)
    return Merged(len(rows), store.append(found), known, unfinished)


def _beside(run: records.RunRecord, ours: Sequence[records.RunRecord]) -> records.RunRecord:
    """The run, as a later attempt under a name of its own where others of its trial are."""
    if not ours:
        return run
    attempt = max(other.attempt for other in ours) + run.attempt
    return dataclasses.replace(run, run_id=f"{run.run_id}-m{attempt}", attempt=attempt)


def _same(one: records.RunRecord, other: records.RunRecord) -> bool:
    """Whether these are states of one run: a run keeps its start (microseconds) for life."""
    return one.trial_id == other.trial_id and one.started_at == other.started_at


def open_archive(*paths: Path) -> Store:
    """A database in memory with the rows of the archives."""
    from results.store import Store

    store = Store.open("sqlite://")
    for path in paths:
        _merge(store, read(path), keep_unfinished=True)
    return store


def shipped() -> list[Path]:
    """The archives that come with the package."""
    return sorted(SHIPPED.glob("*/rows.parquet"))


def is_archive(source: str | None) -> bool:
    """Whether `source` names an archive (*.parquet) and not a database."""
    return source is not None and source.endswith(".parquet")


def open_results(source: str | None = None) -> Store:
    """A database to read: a URL, an archive (*.parquet), or None for what came with the package."""
    from results.store import Store

    if source is None:
        return open_archive(*shipped())
    return open_archive(Path(source)) if is_archive(source) else Store.open(source, read_only=True)
