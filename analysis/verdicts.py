"""Printed numbers beside ours, and what can be said about the difference.

Owns when two numbers may be compared at all, and the verdict:

    reproduced      the interval of the difference lies within the margin (an equivalence test: two
                    one-sided tests at 2.5 %)
    lower, higher   the interval lies on one side of zero, and not within the margin
    inconclusive    neither; with how many seeds would settle it, if any number would
    not comparable  other data, environment version or protocol; then no difference is formed

The difference is ours less theirs, of means over training seeds, in points (scores times 100). Its
interval is Welch's: a printed number has no seeds to resample, and percentile intervals are too
short at the 3 to 10 seeds of such tables. What a printed plus-minus leaves open is decided against
precision: `paper_error` takes the largest reading, and says so.
"""

from __future__ import annotations

import fnmatch
import functools
import json as json_module
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.load import Cell, Scores, Task, load_scores, missing_text
from analysis.stats import MIN_SEEDS, t_quantile
from analysis.tables import markdown_table
from results.importing import SOURCE
from results.published import RULES, PublishedScore, published_scores

if TYPE_CHECKING:
    from results.store import Store

Verdict = Literal["reproduced", "lower", "higher", "inconclusive", "not comparable"]

MARGIN = 3.0  # points; a convention of ours, said beside every table
CONFIDENCE = 0.95
MOST_SEEDS = 1000  # more are called "no number of seeds"
METRIC = "d4rl_normalized_score"

Settings = Callable[[str, str, tuple[str, ...]], Mapping[str, Any] | None]
"""(algorithm, preset, names of the dataset) -> published settings, flat; None if unknown."""

# Gym's versions 2 to 4 of these are one task in other bindings of the simulator; version 5 changed
# rewards and models. D4RL's other environments exist only rebuilt.
_SAME_TASK = re.compile(r"(HalfCheetah|Hopper|Walker2d|Ant)-v[234]")


@dataclass(frozen=True)
class Difference:
    """Ours less theirs in points, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """One printed number beside one method of ours.

    Attributes:
        method, task: ours.
        selection: the rule behind our score.
        seeds, mean, std: of our scores, in points; std with n - 1; None without scores.
        difference: None where it would mean nothing.
        reason: what the verdict rests on.
        remarks: what was assumed or could not be checked.
    """

    published: PublishedScore
    method: str
    task: Task
    selection: str
    seeds: int
    mean: float | None
    std: float | None
    verdict: Verdict
    reason: str
    difference: Difference | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All judgements, and what there was no run for."""

    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...]
    margin: float


# ------------------------------------------------------------------------------------ the numbers


def paper_error(published: PublishedScore, our_std: float) -> tuple[float, int | None, str]:
    """Standard error over training seeds of a printed mean, at the largest reading.

    Args:
        our_std: over seeds, in points: stands in where nothing was printed.
    Returns:
        The error, its degrees of freedom (None if unknown), and what was assumed.
    """
    spread, seeds = published.spread, published.seeds
    freedom = seeds - 1 if seeds is not None and seeds > 1 else None
    if spread is None:
        text = "no spread printed: taken to vary over seeds as ours does"
        if seeds is None:
            text += ", and as one seed, for their number is not said"
        return our_std / (seeds or 1) ** 0.5, freedom, text
    if published.spread_kind == "std":
        if freedom is None:
            return spread, None, "standard deviation over an unknown number of seeds: not divided"
        return spread / freedom**0.5, freedom, "standard deviation divided by sqrt(seeds - 1)"
    if published.spread_kind == "sem_rollouts":
        rollouts = published.rollouts or 1
        text = (
            f"standard error over {rollouts} rollouts of {seeds or 'an unknown number of'} seeds: "
            "widened as if all of it came from the seeds"
        )
        return spread * (rollouts / (seeds or 1)) ** 0.5, freedom, text
    return spread, freedom, "spread of unknown kind: taken as the mean's standard error"


def judge(
    scores: Sequence[float], published: PublishedScore, margin: float = MARGIN
) -> tuple[Verdict, Difference | None, str, tuple[str, ...]]:
    """Verdict, difference, reason and remarks for comparable numbers.

    Args:
        scores: ours, one per seed, in points.
        margin: the largest difference that counts as none, in points.
    Raises:
        ValueError: if the margin is not positive, or there are no scores.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; expected a positive number of points")
    if len(scores) == 0:
        raise ValueError("no scores to compare with the printed number")
    n = len(scores)
    if n < MIN_SEEDS:
        found = f"{n} seed{'s' if n > 1 else ''}: no interval with fewer than {MIN_SEEDS}"
        return "inconclusive", None, found, ()
    std = float(np.std(scores, ddof=1))
    error, freedom, remark = paper_error(published, std)
    value = float(np.mean(scores)) - published.value
    half = _half_width(std, n, error, freedom)
    difference = Difference(value, value - half, value + half)
    remarks = (remark,)
    if -margin < difference.low and difference.high < margin:
        reason = f"the whole interval is within {margin:g} points"
        if difference.low > 0 or difference.high < 0:
            reason += f", though ours is {'higher' if value > 0 else 'lower'}"
        return "reproduced", difference, reason, remarks
    if difference.high < 0:
        return "lower", difference, "the whole interval is below zero", remarks
    if difference.low > 0:
        return "higher", difference, "the whole interval is above zero", remarks
    needed = seeds_to_settle(value, std, n, error, freedom, margin)
    reason = (
        f"about {needed} seeds would settle it if mean and spread stay"
        if needed
        else "no number of seeds would settle it: the printed number is too uncertain"
    )
    return "inconclusive", difference, reason, remarks


def _half_width(std: float, n: int, error: float, freedom: int | None) -> float:
    """Half of Welch's interval of the difference."""
    ours, theirs = std**2 / n, error**2
    total = ours + theirs
    if total == 0:
        return 0.0
    degrees = total**2 / (ours**2 / (n - 1) + theirs**2 / (freedom or n - 1))
    return float(total**0.5 * t_quantile((1 + CONFIDENCE) / 2, degrees))


def seeds_to_settle(
    value: float, std: float, n: int, error: float, freedom: int | None, margin: float
) -> int | None:
    """Fewest seeds of ours with a verdict if mean and spread stayed; None above `MOST_SEEDS`."""
    target = max(margin - abs(value), abs(value))
    # The printed number keeps the freedom that it is given now.
    kept = freedom or n - 1
    for count in range(n + 1, MOST_SEEDS + 1):
        if _half_width(std, count, error, kept) < target:
            return count
    return None


# --------------------------------------------------------------------------- what may be compared


def stem(dataset: str) -> str:
    """What a dataset is called without namespace and version: "hopper-medium"."""
    parts = dataset.split("/")
    name = parts[-1] if len(parts) < 3 else "-".join(parts[-2:])
    return re.sub(r"-v\d+$", "", name).replace("pointmaze-", "maze2d-")


def obstacles(
    task: Task, trial: Mapping[str, Any], published: PublishedScore, settings: Settings | None
) -> tuple[list[str], list[str]]:
    """Why a run and a printed number cannot be compared, and what could not be checked.

    Args:
        trial: a row of `Store.trials`.
    """
    why, remarks = [], []
    config, imported = trial["config"], trial["config"].get("source") == SOURCE
    name = task.dataset_id.removeprefix("d4rl-original/")
    if published.metric != METRIC:
        why.append(f"the table prints {published.metric}")
    if task.relation == "regenerated":
        why.append(f"other environment version: {task.dataset_id} was rebuilt for maintained ones")
    elif task.relation != "original":
        why.append(f"other data: {task.dataset_id} ({task.relation}) is not {published.dataset}")
    elif name != published.dataset:
        why.append(f"other data: {name} is not {published.dataset}")
    env_id = trial["evaluation"].get("environment", {}).get("env_id", "")
    if imported:
        remarks.append("imported: environment, protocol and settings are its source's word")
    elif not _SAME_TASK.fullmatch(env_id):
        why.append(f"other environment version: evaluated in {env_id or 'an unnamed environment'}")
    elif trial["simulator"]:
        remarks.append(f"evaluated in {env_id} on {trial['simulator']}")
    steps = config.get("steps")
    if published.steps is None:
        remarks.append("gradient steps of the printed number are not known")
    elif steps is None:
        remarks.append("gradient steps of the imported run are not known")
    elif steps != published.steps:
        why.append(f"other protocol: {steps:,} gradient steps, theirs {published.steps:,}")
    if published.origin == "rerun":
        remarks.append(f"run by others ({published.table.paper}), whose settings may differ")
    if published.origin == "quoted":
        remarks.append(f"as quoted by {published.table.paper}, protocol not stated there")
    if trial["precision"] != "float32":
        remarks.append(f"ours with {trial['precision']} precision")
    if published.note:
        remarks.append(published.note)
    if not imported:
        differing = settings_differing(trial, published, settings)
        if differing is None:
            remarks.append("settings were not checked: no published ones are known here")
        elif differing:
            why.append(f"other settings than published: {', '.join(differing)}")
    return why, remarks


def settings_differing(
    trial: Mapping[str, Any], published: PublishedScore, settings: Settings | None
) -> list[str] | None:
    """Settings of a trial that are not the published ones, steps aside; None if unknown."""
    names = (published.dataset, trial["dataset_id"])
    known = settings(trial["algorithm"], published.preset, names) if settings else None
    if known is None:
        return None
    ours = {**trial["config"], **{f"data.{key}": value for key, value in trial["data"].items()}}
    compared = known.keys() | {key for key in ours if key.startswith("data.")}
    return [
        f"{key} {ours.get(key)} instead of {known.get(key)}"
        for key in sorted(compared - {"steps"})
        if ours.get(key) != known.get(key)
    ]


# -------------------------------------------------------------------------------------- the report


def reproduce(
    store: Store,
    algorithm: str | None = None,
    dataset: str = "*",
    margin: float = MARGIN,
    settings: Settings | None = None,
    trial_ids: Iterable[str] | None = None,
    all_tables: bool = False,
) -> Report:
    """Every printed number that is about one of our algorithms and datasets, beside ours.

    Our score is selected by the rule of the printed number. Of each algorithm and dataset only the
    numbers nearest to the source are taken: the authors' own, else others' runs, else quotations.

    Args:
        algorithm: None for all.
        dataset: a glob over our dataset ids and D4RL's names.
        settings: where published settings come from; None leaves them unchecked, and it says so.
        all_tables: also takes others' runs and quotations where there are better sources.
    Raises:
        ValueError: if no printed number is about the algorithm.
    """
    printed = [s for s in published_scores() if s.algorithm and algorithm in (None, s.algorithm)]
    if not printed:
        known = ", ".join(sorted({s.algorithm for s in published_scores() if s.algorithm}))
        raise ValueError(f"no printed number is about {algorithm!r}; there are some of {known}")
    ids = None if trial_ids is None else list(trial_ids)
    settings = settings and functools.cache(settings)  # asked once per number and run
    trials = store.trials(ids)
    records: list[dict[str, Any]] = trials.to_dict("records")  # type: ignore[assignment]
    by_variant = {row["variant_id"]: row for row in records}
    scores = {"last": load_scores(store, ids, "last")}
    found: list[Judgement] = []
    measured: set[tuple[str, str]] = set()
    for (method, _), cell in sorted(scores["last"].cells.items()):
        trial = by_variant[cell.variant_id]
        task = _task(scores["last"], trial)
        for number in _numbers(trial, task, printed, settings, all_tables):
            if not any(fnmatch.fnmatch(n, dataset) for n in (task.dataset_id, number.dataset)):
                continue
            rule = "last" if number.selection not in RULES else number.selection
            if rule not in scores:
                scores[rule] = load_scores(store, ids, rule)
            chosen = scores[rule].cells[method, task.name]
            found.append(
                _judgement(number, method, task, trial, rule, chosen, cell, margin, settings)
            )
            measured.add((number.algorithm, number.dataset))
    asked = {
        (s.algorithm, s.dataset)
        for s in printed
        if s.metric == METRIC and fnmatch.fnmatch(s.dataset, dataset)
    }
    notes = []
    for name in sorted({a for a, _ in asked}):
        without = sorted(d for a, d in asked - measured if a == name)
        listed = ", ".join(without) if algorithm else f"{len(without)} datasets"
        if without:
            notes.append(f"{name} has printed numbers but no run here on {listed}")
    found.sort(key=lambda j: (j.published.algorithm, j.published.dataset, j.method))
    return Report(tuple(found), tuple(notes), margin)


_ORIGINS = ("own", "rerun", "quoted")


def _task(scores: Scores, trial: Mapping[str, Any]) -> Task:
    key = (trial["dataset_id"], trial["dataset_digest"], trial["simulator"])
    return next(t for t in scores.tasks if (t.dataset_id, t.digest, t.simulator) == key)


def _numbers(
    trial: Mapping[str, Any],
    task: Task,
    printed: Sequence[PublishedScore],
    settings: Settings | None,
    all_tables: bool,
) -> list[PublishedScore]:
    """The printed numbers that a method on a task is put beside."""
    near = [
        s
        for s in printed
        if s.algorithm == trial["algorithm"] and stem(s.dataset) == stem(task.dataset_id)
    ]
    versions = sorted({s.dataset for s in near})
    if not versions:
        return []
    name = task.dataset_id.removeprefix("d4rl-original/")
    version = name if name in versions else versions[-1]
    near = [s for s in near if s.dataset == version]
    if not all_tables:
        best = min(_ORIGINS.index(s.origin) for s in near)
        near = [s for s in near if _ORIGINS.index(s.origin) == best]
    # A paper's variants are one algorithm under several presets: a run is one of them.
    exact = [s for s in near if s.preset and settings_differing(trial, s, settings) == []]
    return exact or near


def _judgement(
    number: PublishedScore,
    method: str,
    task: Task,
    trial: Mapping[str, Any],
    rule: str,
    cell: Cell,
    last: Cell,
    margin: float,
    settings: Settings | None,
) -> Judgement:
    why, remarks = obstacles(task, trial, number, settings)
    if number.selection not in RULES:
        remarks.append(f"which evaluation was printed: {number.selection}; ours is the last")
    if not last.missing and cell.missing:
        why.append(
            f"other protocol: theirs is selected by {number.selection}, but "
            f"{missing_text(cell.missing)}"
        )
        rule, cell = "last", last
    points = [100 * score for _, score in sorted(cell.scores.items())] if task.normalized else []
    judgement = Judgement(
        published=number,
        method=method,
        task=task,
        selection=rule,
        seeds=len(points),
        mean=float(np.mean(points)) if points else None,
        std=float(np.std(points, ddof=1)) if len(points) > 1 else None,
        verdict="not comparable",
        reason="; ".join(why),
        remarks=tuple(remarks),
    )
    if why:
        return judgement
    if cell.missing or not points:
        left = missing_text(cell.missing) or "no normalised score"
        reason = f"{left}: a mean over the other seeds would be a selection"
        return replace(judgement, verdict="inconclusive", reason=reason)
    verdict, difference, reason, assumed = judge(points, number, margin)
    return replace(
        judgement,
        verdict=verdict,
        difference=difference,
        reason=reason,
        remarks=(*assumed, *judgement.remarks),
    )


# ------------------------------------------------------------------------------------------ forms

HEADER = ("Method", "Dataset", "Printed", "Ours", "Difference", "Verdict", "Why")
_SPREADS = {
    "std": "std",
    "sem_rollouts": "standard error over rollouts",
    "unknown": "spread of unknown kind",
    "none": "no spread",
}


def rows(report: Report) -> list[list[str]]:
    """A row of text per judgement, under `HEADER`."""
    return [
        [
            j.method,
            f"{j.published.dataset}; ours {j.task.dataset_id}",
            _printed(j.published),
            _ours(j),
            "–"
            if j.difference is None
            else f"{j.difference.value:+.1f} [{j.difference.low:+.1f}, {j.difference.high:+.1f}]",
            j.verdict,
            ". ".join([j.reason, *j.remarks]),
        ]
        for j in report.judgements
    ]


def _printed(score: PublishedScore) -> str:
    spread = "" if score.spread is None else f" ± {score.spread:g}"
    seeds = "seeds not said" if score.seeds is None else f"{score.seeds} seeds"
    where = f"{score.table.paper}, {score.table.place}"
    kind = _SPREADS[score.spread_kind]
    return f"{score.value:g}{spread} ({kind}, {seeds}, {score.selection}; {where})"


def _ours(judgement: Judgement) -> str:
    if judgement.mean is None:
        return "–"
    spread = "" if judgement.std is None else f" ± {judgement.std:.1f}"
    seeds = f"{judgement.seeds} seed{'s' if judgement.seeds > 1 else ''}"
    return f"{judgement.mean:.1f}{spread} ({seeds}, {judgement.selection})"


def caption(report: Report) -> str:
    """How to read the table, in sentences."""
    return (
        "Normalised scores x 100; differences are ours less theirs, of means over training seeds, "
        f"with {100 * CONFIDENCE:.0f} % Welch intervals. Reproduced: the interval lies within "
        f"{report.margin:g} points. Where a printed plus-minus leaves something open, the largest "
        "reading is taken. Our plus-minus is the sample standard deviation over seeds."
    )


def markdown(report: Report) -> str:
    """The table, the caption and the notes."""
    parts = ["## Printed numbers and ours", markdown_table(list(HEADER), rows(report))]
    parts += [caption(report), "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(filter(None, parts)) + "\n"


def json(report: Report) -> str:
    """Everything, in points, with sorted keys."""
    content = {
        "margin": report.margin,
        "confidence": CONFIDENCE,
        "caption": caption(report),
        "notes": list(report.notes),
        "judgements": [
            {
                "method": j.method,
                "dataset_id": j.task.dataset_id,
                "relation": j.task.relation,
                "simulator": j.task.simulator,
                "selection": j.selection,
                "seeds": j.seeds,
                "mean": j.mean,
                "std": j.std,
                "verdict": j.verdict,
                "reason": j.reason,
                "remarks": list(j.remarks),
                "difference": None if j.difference is None else vars(j.difference),
                "published": {**vars(j.published), "table": vars(j.published.table)},
            }
            for j in report.judgements
        ],
    }
    return json_module.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
