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
from results.errors import StoreError
from results.records import Record

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
    )
}
"""What an archive holds; artifacts stay where they are, so their rows are left out."""

SHIPPED = Path(__file__).parent / "evidence"
"""Archives that come with the package: <name>/rows.parquet beside <name>/spec.yaml."""


def write(store: Store, path: Path, trial_ids: Iterable[str] | None = None) -> int:
    """Writes the rows of trials (None: of all) and returns their number. Replaces atomically.

    Raises:
        StoreError: if there are no rows.
    """
    import pyarrow as pa

    found = list(store.records(KINDS.values(), trial_ids))
    if not found:
        raise StoreError("the database has no rows of these trials; run the sweep first")
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
        StoreError: if the file is missing or is no archive.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["kind", "record"])
    except FileNotFoundError:
        raise StoreError(f"{path}: no such archive; `harness archive` writes one") from None
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: not an archive of results ({error})") from error
    rows = zip(table["kind"].to_pylist(), table["record"].to_pylist(), strict=True)
    return [_record(kind, text, path) for kind, text in rows]


def _record(kind: str, text: str, path: Path) -> Any:
    if kind not in KINDS:
        raise StoreError(f"{path}: unknown kind of record {kind!r}; written by a newer version?")
    try:
        return records.from_json(KINDS[kind], json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: a {kind} does not fit this version: {error}") from error


def merge(store: Store, paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Adds archives to a database: for each, its rows and how many of them were new or newer.

    Trials are the same wherever they ran, so that those done elsewhere count as done here; their
    policies are not there. All archives are read before the first row is written.

    Raises:
        StoreError: if a file is missing or is no archive.
    """
    found = [read(path) for path in paths]
    return [(len(rows), store.append(rows)) for rows in found]


def open_archive(*paths: Path) -> Store:
    """A database in memory with the rows of the archives."""
    from results.store import Store

    store = Store.open("sqlite://")
    store.append([record for path in paths for record in read(path)])
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
