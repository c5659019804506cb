"""What the site shows, gathered from a database: tracks, their rows, and the runs behind a cell.

Scores, pooling, aggregates and what is missing come from `analysis.load` and
`analysis.leaderboard`, once for each track.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import leaderboard, stats
from analysis.comparison import Rank
from analysis.curves import Curve, mean_curves
from analysis.leaderboard import Leaderboard, MethodRow
from analysis.load import Cell, Task, evaluation_frame, latency_frame, trials_to_show
from analysis.tracks import Track, slug, split
from results.schema import canonical_json

if TYPE_CHECKING:
    import pandas as pd

    from results.store import Store

CELL_REPS = 1000


@dataclass(frozen=True)
class Run:
    """One attempt at a trial, as a cell's page lists it."""

    run_id: str
    seed: int
    attempt: int
    status: str
    score: float | None  # of the selected evaluation; None if the run has none that counts
    note: str  # why there is no score
    steps: int
    device: str
    hours: float  # of the process, divided by the seeds that shared it
    date: str
    commit: str
    dirty: bool
    versions: Mapping[str, str]
    compiled: bool
    stack: tuple[int, ...]


@dataclass(frozen=True)
class CellView:
    """One method on one task, with everything behind its number."""

    slug: str
    method: str
    task: Task
    cell: Cell
    estimate: stats.Estimate | None  # of the mean over seeds
    algorithm: str
    revision: int
    precision: str
    config: Mapping[str, Any]
    changed: Mapping[str, tuple[Any, Any]]  # field -> (default, here)
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    trial_ids: tuple[str, ...]
    runs: tuple[Run, ...]
    curve: Curve | None

    @property
    def scale(self) -> float:
        """What a score is multiplied with to be shown."""
        return 100.0 if self.task.normalized else 1.0


@dataclass(frozen=True)
class RowView:
    """One method of a track."""

    board: MethodRow
    algorithm: str
    cells: tuple[CellView | None, ...]  # as the track's tasks
    rank: Rank | None = None  # None where the method is not ranked
    latency: float | None = None  # milliseconds per action under the track's condition

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells if cell for run in cell.runs]

    @property
    def min_seeds(self) -> int:
        counts = [len(cell.cell.scores) for cell in self.cells if cell and cell.cell.scores]
        return min(counts, default=0)

    @property
    def max_seeds(self) -> int:
        return max((len(cell.cell.scores) for cell in self.cells if cell), default=0)

    @property
    def covered(self) -> int:
        """Tasks with a complete set of scores."""
        return sum(1 for cell in self.cells if cell and cell.cell.scores and not cell.cell.missing)

    @property
    def steps(self) -> list[int]:
        return sorted({run.steps for run in self.runs if run.score is not None})

    @property
    def date(self) -> str:
        return max((run.date for run in self.runs), default="")

    @property
    def commits(self) -> list[str]:
        return sorted({run.commit for run in self.runs if run.commit})

    @property
    def dirty(self) -> bool:
        return any(run.dirty for run in self.runs)

    def hours(self, kind: str) -> float:
        """Hours on "cpu" or "gpu", all attempts."""
        on_gpu = kind == "gpu"
        return sum(run.hours for run in self.runs if (run.device != "cpu") == on_gpu)


@dataclass(frozen=True)
class TrackView:
    """A track with its leaderboard."""

    key: Track
    board: Leaderboard
    rows: tuple[RowView, ...]
    condition: str  # of measured latencies: only times under one condition compare

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.board.tasks

    @property
    def span(self) -> tuple[float, float]:
        """The range that interval bars are drawn on."""
        ends = [
            bound
            for row in self.rows
            if row.board.estimates
            for bound in vars(row.board.estimates["IQM"]).values()
            if bound is not None
        ]
        return (min(ends), max(ends)) if ends else (0.0, 1.0)


@dataclass(frozen=True)
class Content:
    """Everything the pages need."""

    tracks: tuple[TrackView, ...]
    datasets: Mapping[str, list[Mapping[str, Any]]]  # dataset id -> a row for each content
    select: str
    seed: int
    notes: tuple[str, ...] = field(default=())


def collect(
    store: Store,
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
    seed: int = 0,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    interval: stats.Interval = "percentile",
) -> Content:
    """Tracks with their rows and cells.

    Args:
        trial_ids: None for all that ran.
        select: which evaluation counts, as for a leaderboard.
        seed: of the bootstraps.
        defaults: algorithm -> its default config, which cells are compared with.
        interval: of the aggregates, as for a leaderboard.
    Raises:
        ValueError: if there is nothing to show, or the rule is unknown.
    """
    ids = None if trial_ids is None else list(trial_ids)
    trials, runs = trials_to_show(store, ids), store.runs(ids)
    if runs.empty:
        raise ValueError(leaderboard.NOTHING)
    attempts = _by(runs, "trial_id")
    tracks = [
        _track(store, key, part, attempts, select, seed, defaults or {}, interval)
        for key, part in split(trials)
    ]
    tracks.sort(key=lambda track: (-sum(len(row.runs) for row in track.rows), track.key.title))
    shown = set(trials.dataset_id)
    datasets: dict[str, list[Mapping[str, Any]]] = {}
    for row in store.datasets().to_dict("records"):
        if row["dataset_id"] in shown:
            datasets.setdefault(row["dataset_id"], []).append({str(k): v for k, v in row.items()})
    return Content(tuple(tracks), datasets, select, seed)


def _track(
    store: Store,
    key: Track,
    trials: pd.DataFrame,
    attempts: Mapping[str, list[Any]],
    select: str,
    seed: int,
    defaults: Mapping[str, Mapping[str, Any]],
    interval: stats.Interval,
) -> TrackView:
    ids = list(trials.trial_id)
    board = leaderboard.build(store, ids, select, seed, interval=interval)
    curves = mean_curves(evaluation_frame(store, ids), seed)
    variants = _by(trials.sort_values("seed"), "variant_id")
    comparison = board.comparison
    condition, latencies = _latencies(store, ids)
    ranks = {} if comparison is None else {rank.method: rank for rank in comparison.ranks}
    rows = []
    for row in board.rows:
        cells: list[CellView | None] = []
        for task in board.tasks:
            found = board.scores.cells.get((row.method, task.name))
            if found is None:
                cells.append(None)
                continue
            cells.append(
                _cell(
                    slug(row.method, key.slug, task.name),
                    row.method,
                    task,
                    found,
                    variants[found.variant_id],
                    attempts,
                    curves.get((row.method, task.name)),
                    seed,
                    defaults,
                )
            )
        algorithm = next(cell.algorithm for cell in cells if cell)
        runs_of = {run for cell in cells if cell for run in cell.cell.run_ids}
        times = [time for run, time in latencies.items() if run in runs_of]
        latency = float(np.median(times)) if times else None
        rows.append(RowView(row, algorithm, tuple(cells), ranks.get(row.method), latency))
    return TrackView(key, board, tuple(rows), condition)


def _latencies(store: Store, ids: list[str]) -> tuple[str, dict[str, float]]:
    """The condition most runs were measured under at batch 1, and run -> milliseconds there."""
    frame = latency_frame(store, ids)
    frame = frame[frame.batch == 1]
    if frame.empty:
        return "", {}
    counts = frame.condition.value_counts()
    condition = min(counts[counts == counts.max()].index)
    part = frame[frame.condition == condition]
    return str(condition), dict(zip(part.run_id, part.ms, strict=True))


def _cell(
    name: str,
    method: str,
    task: Task,
    cell: Cell,
    trials: list[Any],
    attempts: Mapping[str, list[Any]],
    curve: Curve | None,
    seed: int,
    defaults: Mapping[str, Mapping[str, Any]],
) -> CellView:
    first = trials[0]
    default = defaults.get(first.algorithm, {})
    scores = [score for _, score in sorted(cell.scores.items())]
    runs = [run for trial in trials for run in _runs(trial, cell, attempts.get(trial.trial_id, []))]
    return CellView(
        slug=name,
        method=method,
        task=task,
        cell=cell,
        estimate=stats.mean_interval(scores, CELL_REPS, seed) if scores else None,
        algorithm=first.algorithm,
        revision=int(first.revision),
        precision=first.precision,
        config=first.config,
        changed={
            field: (default[field], value)
            for field, value in sorted(first.config.items())
            if field in default and canonical_json(default[field]) != canonical_json(value)
        },
        data=first.data,
        evaluation=first.evaluation,
        trial_ids=tuple(trial.trial_id for trial in trials),
        runs=tuple(runs),
        curve=curve,
    )


def _by(frame: pd.DataFrame, *columns: str) -> dict[Any, list[Any]]:
    """Rows by the value of a column, or of several; pandas is slow at many small groups."""
    found: dict[Any, list[Any]] = {}
    rows: Iterable[Any] = frame.itertuples()
    for row in rows:
        values = tuple(getattr(row, name) for name in columns)
        found.setdefault(values if len(values) > 1 else values[0], []).append(row)
    return found


def _runs(trial: Any, cell: Cell, attempts: list[Any]) -> list[Run]:
    found = []
    for run in attempts:
        counts = run.run_id in cell.run_ids
        ended = run.ended_at if run.ended_at == run.ended_at else run.started_at  # NaT: running
        error = (run.error or "").strip().splitlines()
        found.append(
            Run(
                run_id=run.run_id,
                seed=int(trial.seed),
                attempt=int(run.attempt),
                status=run.status,
                score=cell.scores[trial.seed] if counts else None,
                note="" if counts else error[-1] if error else cell.missing.get(trial.seed, ""),
                steps=int(run.steps_done),
                device=run.device,
                hours=sum(run.timings.values()) / 3600 / max(len(run.stack), 1),
                date=f"{ended:%Y-%m-%d}",
                commit=run.git_commit,
                dirty=bool(run.git_dirty),
                versions=run.versions,
                compiled=bool(run.compiled),
                stack=tuple(run.stack),
            )
        )
    return found
