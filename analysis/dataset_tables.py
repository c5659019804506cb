"""Tables as papers print them: a row per dataset, a column per method, averages of groups.

One table for each track. A group is the datasets of one environment. An average is over the means
of its datasets and is left out where one of them lacks a score.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import stats, tables
from analysis.leaderboard import NOTHING, Leaderboard, build
from analysis.load import Task, trials_to_show
from analysis.tracks import Track, split

if TYPE_CHECKING:
    from results.store import Store

FORMATS = ("markdown", "latex", "csv")
BOLD = (
    "Bold: the largest mean of a row, and every other method whose 95 % bootstrap interval over "
    "seeds reaches it"
)
COLUMNS = ("track", "kind", "row", "method", "mean", "std", "seeds", "bold", "unit", "note")


@dataclass(frozen=True)
class Entry:
    """One number: of a dataset, or the average of a group.

    Attributes:
        std: over seeds; None for averages and single seeds.
        seeds: behind it; 0 for averages.
        note: what is missing.
    """

    mean: float | None
    std: float | None = None
    seeds: int = 0
    bold: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A dataset or an average, with an entry for each method."""

    name: str
    kind: str  # "dataset" or "average"
    unit: str  # "score" (a fraction) or "return"
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class DatasetTable:
    """One track's table; `caption` is in sentences."""

    track: Track
    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: tuple[str, ...]
    notes: tuple[str, ...]


def make(
    store: Store, trial_ids: Iterable[str] | None = None, select: str = "last", seed: int = 0
) -> list[DatasetTable]:
    """The tables of some trials (None: all that ran).

    Args:
        select: which evaluation counts, as for a leaderboard.
        seed: of the bootstrap that decides what is bold.
    Raises:
        ValueError: if there is no run, or the rule is unknown.
    """
    ids = None if trial_ids is None else list(trial_ids)
    trials, runs = trials_to_show(store, ids), store.runs(ids)
    if runs.empty:
        raise ValueError(NOTHING)
    found = []
    for track, part in split(trials):
        board = build(store, list(part.trial_id), select, seed)
        own = runs[runs.trial_id.isin(part.trial_id)]
        lines = [line for line in board.caption if not line.startswith(("Aggregates", "Rank"))]
        caption = (*lines, BOLD, _code(own))
        methods = tuple(row.method for row in board.rows)
        notes = (*board.notes, *board.incomplete())
        found.append(DatasetTable(track, methods, tuple(_rows(board, seed)), caption, notes))
    return found


def _code(runs: Any) -> str:
    """Package version and commits behind some runs."""
    name = "offline-rl-harness"
    versions = sorted({v[name] for v in runs.versions if name in v})
    commits = sorted({commit[:8] for commit in runs.git_commit if commit})
    dirty = " (with changes that are not committed)" if runs.git_dirty.any() else ""
    package = f"{name} {', '.join(versions)}, " if versions else ""
    return f"Code: {package}commit {', '.join(commits) or 'not recorded'}{dirty}"


def group_of(task: Task) -> str:
    """The environment in a dataset's name: "hopper" of mujoco/hopper/medium-v0."""
    parts = task.dataset_id.split("/")
    return parts[-2] if len(parts) > 1 else parts[0].split("-")[0]


def _rows(board: Leaderboard, seed: int) -> list[Row]:
    methods = [row.method for row in board.rows]
    groups: dict[str, list[Task]] = {}
    for task in board.tasks:
        groups.setdefault(group_of(task), []).append(task)
    rows = []
    for name, tasks in groups.items():
        rows += [_dataset_row(board, methods, task, seed) for task in tasks]
        scored = [task for task in tasks if task.normalized]
        if len(groups) > 1 and len(scored) > 1:
            rows.append(_average(board, methods, f"Average of {name}", scored))
    scored = [task for task in board.tasks if task.normalized]
    if len(scored) > 1:
        rows.append(_average(board, methods, "Average", scored))
    return rows


def _dataset_row(board: Leaderboard, methods: list[str], task: Task, seed: int) -> Row:
    scores = {
        method: [score for _, score in sorted(board.cell(method, task).scores.items())]
        for method in methods
    }
    found = {m: stats.mean_interval(v, seed=seed) for m, v in scores.items() if v}
    best = max((estimate.value for estimate in found.values()), default=0.0)
    entries = []
    for method in methods:
        gaps = "; ".join(board.scores.gaps(method, [task]))
        if method not in found:
            entries.append(Entry(None, note=gaps))
            continue
        estimate, values = found[method], scores[method]
        reaches = estimate.high is not None and estimate.high >= best
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        bold = estimate.value == best or reaches
        entries.append(Entry(estimate.value, std, len(values), bold, gaps))
    return Row(task.name, "dataset", "score" if task.normalized else "return", tuple(entries))


def _average(board: Leaderboard, methods: list[str], name: str, tasks: list[Task]) -> Row:
    entries = []
    for method in methods:
        gaps = board.scores.gaps(method, tasks)
        if gaps:
            entries.append(Entry(None, note="; ".join(gaps)))
            continue
        means = [np.mean(values) for values in board.scores.matrix(method, tasks)]
        entries.append(Entry(float(np.mean(means))))
    known = [entry.mean for entry in entries if entry.mean is not None]
    marked = (
        Entry(e.mean, bold=e.mean is not None and e.mean == max(known), note=e.note)
        for e in entries
    )
    return Row(name, "average", "score", tuple(marked))


def render(made: list[DatasetTable], format: str = "markdown") -> str:
    """The tables as "markdown", "latex" (needs booktabs) or "csv" (fractions, unrounded).

    Raises:
        ValueError: for another format.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if format == "csv":
        return _csv(made)
    return "\n".join(_markdown(one) if format == "markdown" else _latex(one) for one in made)


def _text(entry: Entry, unit: str) -> str:
    if entry.mean is None:
        return "–"
    scale = 100.0 if unit == "score" else 1.0
    spread = "" if entry.std is None else f" ± {scale * entry.std:.1f}"
    count = f" ({entry.seeds})" if entry.seeds else ""
    return f"{scale * entry.mean:.1f}{spread}{count}{'*' if entry.note else ''}"


def _markdown(table: DatasetTable) -> str:
    rows = [
        [
            tables.escape_markdown(row.name),
            *(
                f"**{tables.escape_markdown(_text(e, row.unit))}**"
                if e.bold
                else tables.escape_markdown(_text(e, row.unit))
                for e in row.entries
            ),
        ]
        for row in table.rows
    ]
    header = ["Dataset", *map(tables.escape_markdown, table.methods)]
    caption = " ".join(f"{line}." for line in table.caption)
    parts = [f"### {table.track.title}", tables.markdown_table(header, rows, escape=False), caption]
    if table.notes:
        parts.append("\n".join(f"- {tables.escape_markdown(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _latex(table: DatasetTable) -> str:
    rows = [
        [
            tables.tex(row.name),
            *(
                rf"\textbf{{{tables.tex(_text(e, row.unit))}}}"
                if e.bold
                else tables.tex(_text(e, row.unit))
                for e in row.entries
            ),
        ]
        for row in table.rows
    ]
    kinds = [row.kind for row in table.rows]
    rules = {
        place
        for place in range(1, len(kinds))
        if kinds[place - 1] != kinds[place] or kinds[place] == "average"
    }
    lines = (table.track.title, *table.caption, *table.notes)
    caption = tables.tex(" ".join(f"{line}." for line in lines))
    header = ["Dataset", *map(tables.tex, table.methods)]
    return tables.latex_table(header, rows, caption, table.track.slug, rules)


def _csv(made: list[DatasetTable]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for table in made:
        head = {"track": table.track.title}
        for row in table.rows:
            for method, entry in zip(table.methods, row.entries, strict=True):
                numbers = {
                    name: repr(value)
                    for name, value in (("mean", entry.mean), ("std", entry.std))
                    if value is not None
                }
                what = {"kind": row.kind, "row": row.name, "method": method, "unit": row.unit}
                marks = {"seeds": entry.seeds or "", "bold": int(entry.bold), "note": entry.note}
                writer.writerow({**head, **what, **numbers, **marks})
        for line in (*table.caption, *table.notes):
            writer.writerow({**head, "kind": "caption", "note": line})
    return file.getvalue()
