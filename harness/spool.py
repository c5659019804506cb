"""Append-only rows in a stage's work folder: what a worker reports is on disk before it goes on.

One JSON object a line, `{"kind": ...}`, as Python's json writes it (NaN and Infinity included).
Evaluations and metrics of one run are packed many to a line. Owns the file format; the database
is `results.store`, and whoever ingests a spool may read it again: appends are idempotent there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.full_disk import explained
from results.records import (
    ArtifactRecord,
    DatasetRecord,
    EvalRecord,
    MetricRecord,
    Record,
    RunRecord,
    TrialRecord,
    from_json,
)

_KINDS: dict[str, type] = {
    "run": RunRecord,
    "trial": TrialRecord,
    "dataset": DatasetRecord,
    "artifact": ArtifactRecord,
}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}
_EVAL_COLUMNS = ("step", "episode", "env_seed", "episode_return", "length", "mode")
_METRIC_COLUMNS = ("step", "name", "value")
_READ_BLOCK_BYTES = 1 << 20


class SpoolError(RuntimeError):
    """A line of a spool is damaged; names the file and the line.

    `records` are those of the lines before it.
    """

    def __init__(self, message: str, records: list[Record]) -> None:
        super().__init__(message)
        self.records = records


class Spool:
    """The writing end of one spool file; one writer at a time (the stage's lock sees to that).

    Opening repairs what a killed writer left: an unfinished last line, which was never
    acknowledged, is cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        created = not self.path.exists()
        with explained(self.path):
            self._descriptor: int | None = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        if created:
            _flush_folder(self.path.parent)
        self._repair()

    def append(self, records: Record | Iterable[Record]) -> int:
        """Writes the records and returns their number once they are on disk.

        Whole lines, one write, one fsync: after a crash a prefix of the lines is there.

        Raises:
            ValueError: if the spool is closed.
            TypeError: for anything that is not a record.
            DiskFullError: if there is no room; none of the records is there then.
        """
        if self._descriptor is None:
            raise ValueError(f"spool {self.path} is closed")
        rows = [records] if dataclasses.is_dataclass(records) else list(records)  # type: ignore[arg-type]
        if not rows:
            return 0
        data = b"".join(json.dumps(line).encode("ascii") + b"\n" for line in _pack(rows))
        end = os.fstat(self._descriptor).st_size
        with explained(self.path):
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._descriptor, data[written:])
                os.fsync(self._descriptor)
            except OSError:
                # A full disk may take half a line; the next append would join on to it.
                os.ftruncate(self._descriptor, end)
                raise
        return len(rows)

    def records(self) -> Iterator[Record]:
        """What the spool holds so far."""
        return read(self.path)

    def close(self) -> None:
        """Closes the file; closing twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _repair(self) -> None:
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        keep, position = 0, size
        while position > 0:
            start = max(0, position - _READ_BLOCK_BYTES)
            block = os.pread(self._descriptor, position - start, start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            position = start
        if keep != size:
            os.ftruncate(self._descriptor, keep)
            os.fsync(self._descriptor)


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a spool in the order written; none if the file does not exist.

    A torn last line is left out: it was never acknowledged, or is being written now.

    Raises:
        SpoolError: if any other line is damaged, naming it, after yielding those before.
    """
    try:
        yield from read_from(path, 0)[0]
    except SpoolError as error:
        yield from error.records
        raise


def read_from(path: str | os.PathLike[str], offset: int) -> tuple[list[Record], int]:
    """Records from byte `offset` on, and the offset to continue from next time.

    `offset` is 0 or what an earlier call returned. A file shorter than that was replaced, and
    is read from its beginning.

    Raises:
        SpoolError: as `read`; its `records` are those between `offset` and the damaged line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return parse(whole, str(path), offset), offset + len(whole)


def parse(lines: bytes, place: str, position: int = 0) -> list[Record]:
    """The records of whole lines, which are at byte `position` of a place that errors name.

    Raises:
        SpoolError: as `read`; its `records` are those before the damaged line.
    """
    records: list[Record] = []
    for line in lines.split(b"\n")[:-1]:
        try:
            records.extend(_unpack(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpoolError(
                f"{place} is damaged in the line at byte {position}: {error}. Earlier lines can "
                "be read; delete the line, or the stage's work folder to run it again",
                records,
            ) from error
        position += len(line) + 1
    return records


def _pack(records: Iterable[Any]) -> list[dict[str, Any]]:
    """Records as JSON objects; neighbouring evaluations (or metrics) of a run share one."""
    lines: list[dict[str, Any]] = []
    for record in records:
        if isinstance(record, EvalRecord | MetricRecord):
            kind = "evals" if isinstance(record, EvalRecord) else "metrics"
            columns = _EVAL_COLUMNS if kind == "evals" else _METRIC_COLUMNS
            row = [getattr(record, column) for column in columns]
            last = lines[-1] if lines else {}
            if last.get("kind") == kind and last.get("run_id") == record.run_id:
                last["rows"].append(row)
            else:
                lines.append({"kind": kind, "run_id": record.run_id, "rows": [row]})
        elif type(record) in _KIND_OF:
            lines.append({"kind": _KIND_OF[type(record)], **dataclasses.asdict(record)})
        else:
            raise TypeError(f"{record!r} is not a record of results.records")
    return lines


def _unpack(line: dict[str, Any]) -> list[Record]:
    kind = line.pop("kind")
    if kind in ("evals", "metrics"):
        columns = _EVAL_COLUMNS if kind == "evals" else _METRIC_COLUMNS
        cls: Callable[..., Record] = EvalRecord if kind == "evals" else MetricRecord
        run_id, rows = line["run_id"], line["rows"]
        if kind == "evals":  # those written before modes were recorded are one value shorter
            rows = [[*row, None] if len(row) == len(columns) - 1 else row for row in rows]
        return [cls(run_id=run_id, **dict(zip(columns, row, strict=True))) for row in rows]
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {[*_KINDS, 'evals', 'metrics']}")
    return [from_json(_KINDS[kind], line)]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
