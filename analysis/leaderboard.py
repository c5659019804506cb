"""The leaderboard: aggregates of the methods that can be compared, every cell, and what is missing.

Owns which methods are aggregated over which tasks, and what must be said beside the numbers. The
numbers come from `stats`, the forms from `tables`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from analysis import stats
from analysis.comparison import ALPHA, Comparison, compare
from analysis.load import (
    Cell,
    MissingScoresError,
    Scores,
    Task,
    load_scores,
    numbered,
    parse_select,
)
from results.importing import SOURCE

if TYPE_CHECKING:
    from results.store import Store

FORMATS = ("rich", "markdown", "csv", "latex", "json")
REPS = 10_000
RANK_REPS = 2_000  # all methods are ranked anew in each
NOTHING = "no run to show; run a sweep first, or check `harness status`"
OnMissing = Literal["show", "drop-task", "refuse"]


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Attributes:
        estimates: metric -> estimate over the aggregated tasks; None if the method lacks scores.
        seeds: fewest and most seeds of its cells on the aggregated tasks; None without any.
        num_tasks: on how many of these tasks it is complete.
        gaps: what it lacks there, in words.
    """

    method: str
    estimates: dict[str, stats.Estimate] | None
    seeds: tuple[int, int] | None
    num_tasks: int
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaderboard:
    """Everything a table or a figure needs. Scores are fractions; times 100 only when displayed.

    Attributes:
        rows: best IQM first, then those that are not aggregated.
        aggregated: the tasks behind the aggregates.
        caption: how the numbers came about, in sentences.
        notes: what is missing, left out or kept apart, in sentences.
        seed: of the bootstrap.
        comparison: ranks and pairs of the aggregated methods with enough seeds; None if there
            are fewer than two.
    """

    rows: tuple[MethodRow, ...]
    aggregated: tuple[Task, ...]
    scores: Scores
    caption: tuple[str, ...]
    notes: tuple[str, ...]
    seed: int
    reps: int = REPS
    title: str = "Leaderboard"
    comparison: Comparison | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, also those that are not aggregated over."""
        return self.scores.tasks

    def cell(self, method: str, task: Task) -> Cell:
        """A method on a task, empty where it was never run."""
        return self.scores.cells.get((method, task.name), Cell({}))

    def incomplete(self) -> list[str]:
        """A sentence for each method and task without all of its scores."""
        return [
            f"{row.method} on {gap}"
            for row in self.rows
            for gap in self.scores.gaps(row.method, self.tasks)
        ]

    def render(self, format: str = "markdown") -> str:
        """The leaderboard as text: "rich" (for terminals), "markdown", "csv", "latex" or "json".

        Raises:
            ValueError: for another format.
        """
        from analysis import tables

        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
        return getattr(tables, format)(self)

    def renderables(self) -> list[Any]:
        """For a rich console: the aggregates, the cells, the caption, the notes."""
        from analysis import tables

        return tables.renderables(self)


def build(
    store: Store,
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
    seed: int = 0,
    *,
    on_missing: OnMissing = "show",
    reps: int = REPS,
    interval: stats.Interval = "percentile",
) -> Leaderboard:
    """The leaderboard of some trials.

    Args:
        trial_ids: None for all that ran.
        select: `last`, `last-K`, `cloning-loss`, `cloning-loss-K` or `best`.
        seed: of the bootstrap.
        on_missing: "show" aggregates the methods that are complete on every task with references
            and names the others; "drop-task" compares all methods on the tasks where all are
            complete; "refuse" raises.
        reps: bootstrap resamples.
        interval: of the aggregates: "percentile", "bca" or "t" (see docs/statistics.md).
    Raises:
        ValueError: if a rule or the interval is unknown.
        MissingScoresError: under "refuse", naming the cells without scores.
    """
    if on_missing not in ("show", "drop-task", "refuse"):
        raise ValueError(f"on_missing is {on_missing!r}; expected show, drop-task or refuse")
    if interval not in _INTERVALS:
        raise ValueError(f"interval is {interval!r}; expected {', '.join(_INTERVALS)}")
    ids = None if trial_ids is None else list(trial_ids)
    scores = load_scores(store, ids, select)
    notes = list(scores.notes)
    tasks = [task for task in scores.tasks if task.normalized]
    raw = [task.name for task in scores.tasks if not task.normalized]
    if raw:
        notes.append(f"No reference returns, so not in the aggregates: {', '.join(raw)}")
    if on_missing == "refuse":
        gaps = [f"{m} on {gap}" for m in scores.methods for gap in scores.gaps(m, tasks)]
        if gaps:
            raise MissingScoresError(
                f"{len(gaps)} cells lack scores: {'; '.join(gaps)}. Finish these runs, or say how "
                "they count: on_missing='show' or 'drop-task'"
            )
    if on_missing == "drop-task":
        dropped = {
            task.name: [f"{m} on {gap}" for m in scores.methods for gap in scores.gaps(m, [task])]
            for task in tasks
        }
        tasks = [task for task in tasks if not dropped[task.name]]
        notes += [f"Task left out: {'; '.join(dropped[name])}" for name in dropped if dropped[name]]
    rows = [_row(scores, method, tasks, reps, seed, interval) for method in scores.methods]
    rows.sort(
        key=lambda row: (-row.estimates["IQM"].value if row.estimates else float("inf"), row.method)
    )
    notes += _row_notes(rows)
    comparison = _compare(scores, rows, tasks, seed)
    ranked = comparison is not None
    estimates = [each for row in rows if row.estimates for each in row.estimates.values()]
    has_interval = any(each.low is not None for each in estimates)
    shown = f" with 95 % {_INTERVALS[interval].format(reps=f'{reps:,}')}" if has_interval else ""
    return Leaderboard(
        rows=tuple(rows),
        aggregated=tuple(tasks),
        scores=scores,
        caption=tuple(_caption(store, ids, scores, tasks, shown, ranked)),
        notes=tuple(notes),
        seed=seed,
        reps=reps,
        comparison=comparison,
    )


def _compare(
    scores: Scores, rows: list[MethodRow], tasks: list[Task], seed: int
) -> Comparison | None:
    """Of the methods that are complete and have enough seeds everywhere."""
    ranked = [
        row.method
        for row in rows
        if row.estimates and row.seeds and row.seeds[0] >= stats.MIN_SEEDS
    ]
    if len(ranked) < 2:
        return None
    names = [task.name for task in tasks]
    table = {m: dict(zip(names, scores.matrix(m, tasks), strict=True)) for m in ranked}
    return compare(table, reps=RANK_REPS, seed=seed)


def _row(
    scores: Scores,
    method: str,
    tasks: list[Task],
    reps: int,
    seed: int,
    interval: stats.Interval,
) -> MethodRow:
    gaps = scores.gaps(method, tasks)
    found = [scores.cells[method, t.name] for t in tasks if (method, t.name) in scores.cells]
    counts = [len(cell.scores) for cell in found]
    return MethodRow(
        method=method,
        estimates=(
            stats.aggregate(scores.matrix(method, tasks), reps, seed, interval=interval)
            if tasks and not gaps
            else None
        ),
        seeds=(min(counts), max(counts)) if counts else None,
        num_tasks=sum(1 for task in tasks if not scores.gaps(method, [task])),
        gaps=tuple(gaps),
    )


def _row_notes(rows: list[MethodRow]) -> list[str]:
    notes = []
    left_out = [row.method for row in rows if row.gaps]
    if left_out:
        notes.append(f"Not aggregated, because cells lack scores: {', '.join(left_out)}")
    shown = [row for row in rows if row.estimates and row.seeds]
    few = [row.method for row in shown if row.seeds and row.seeds[0] < stats.MIN_SEEDS]
    if few:
        notes.append(
            f"No interval, for want of {stats.MIN_SEEDS} seeds on each task: {', '.join(few)}"
        )
    unequal = [row.method for row in shown if row.seeds and row.seeds[0] != row.seeds[1]]
    if unequal:
        notes.append(
            "Unequal numbers of seeds, none cut, every task weighs the same: " + ", ".join(unequal)
        )
    return notes


def _caption(
    store: Store,
    ids: list[str] | None,
    scores: Scores,
    tasks: list[Task],
    interval: str,
    ranked: bool,
) -> list[str]:
    kind, count = parse_select(scores.select)
    several = f"mean of the {count} last evaluations"
    rule = {
        "last": "last evaluation of a run" if scores.select == "last" else several,
        "cloning-loss": f"at the checkpoint of cloning-loss rank {count} "
        "(offline: no rollout chooses)",
        "best": "BEST evaluation of a run (chosen by test rollouts: optimistic, not offline)",
    }[kind]
    lines = [
        "Normalised scores x 100 (0 is ref_min, 100 ref_max); raw returns where a task has no "
        "references",
        f"Score of a seed: {rule}",
        *_protocols(store, ids, scores),
        f"Aggregates over {numbered(len(tasks), 'task')}{interval}",
    ]
    if ranked:
        lines.append(
            "Rank: by IQM, among methods with enough seeds, with its 95 % interval over resamples; "
            "methods that share a letter do not differ significantly (probability of improvement, "
            f"exact permutation tests within tasks, Holm at {100 * ALPHA:g} %)"
        )
    spread = any(len(cell.scores) > 1 for cell in scores.cells.values())
    what = "mean ± sample standard deviation over seeds" if spread else "score"
    lines.append(f"Cells: {what} (number of seeds)")
    sources = sorted({task.ref_source or "unnamed" for task in tasks})
    if sources:
        lines.append(f"Reference returns: {'; '.join(sources)}")
    simulators = sorted({task.simulator or "not recorded" for task in scores.tasks})
    if simulators:
        lines.append(f"Simulator: {'; '.join(simulators)}")
    other = [f"{t.name} ({t.relation})" for t in scores.tasks if t.relation in _NOT_ORIGINAL]
    if other:
        lines.append(
            f"Not the datasets of published tables, so not comparable with them: {', '.join(other)}"
        )
    return lines


_INTERVALS = {
    "percentile": "percentile intervals of a stratified bootstrap over seeds ({reps} resamples)",
    "bca": "BCa intervals of a stratified bootstrap over seeds ({reps} resamples)",
    "t": "t intervals (jackknife over seeds within tasks)",
}
_NOT_ORIGINAL = ("regenerated", "different")


def _protocols(store: Store, ids: list[str] | None, scores: Scores) -> list[str]:
    """One sentence for how the policies were evaluated; more than one way is said to be so."""
    variants = {cell.variant_id for cell in scores.cells.values()}
    trials = store.trials(ids)
    evaluations = trials[trials.variant_id.isin(variants)].evaluation
    found = sorted(
        {
            "of imported runs, as their sources did"
            if one.get("source") == SOURCE
            else f"{one.get('episodes', '?')} episodes every {one.get('every', '?')} gradient "
            f"steps, environment seeds from {one.get('first_env_seed', 0)}"
            for one in evaluations
        }
    )
    if not found:
        return []
    many = " (rows differ!)" if len(found) > 1 else ""
    return [f"Evaluation{many}: {' / '.join(found)}"]
