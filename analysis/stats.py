"""Aggregates of normalised scores with stratified bootstrap intervals over seeds.

The resampling unit is the seed: within each task, seeds are drawn with replacement, independently
of the other tasks (Agarwal et al., 2021, "Deep RL at the Edge of the Statistical Precipice",
Sec. 4.1). Episodes are averaged before and never resampled. The estimators are rliable's, written
for all resamples at once and for unequal numbers of seeds; tests hold them to rliable's values
and intervals. Its own bootstrap draws from numpy's global generator whatever seed it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SEEDS = 3
"""With fewer seeds in a task no interval is given: resampling two values says nothing."""

ScoreLists = Sequence[Sequence[float]]  # one list of seeds for each task


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None


def _iqm(samples: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Interquartile mean over all runs and tasks: [R, sum of counts] -> [R].

    With equal numbers of seeds this is scipy's trim_mean with 0.25, as in rliable. Otherwise each
    task has the same weight, and the middle half of the weight is averaged.
    """
    total = samples.shape[1]
    if len(set(counts)) == 1:
        cut = int(0.25 * total)
        return np.sort(samples, axis=1)[:, cut : total - cut].mean(axis=1)
    weights = np.repeat([1.0 / (count * len(counts)) for count in counts], counts)
    order = np.argsort(samples, axis=1, kind="stable")
    values = np.take_along_axis(samples, order, axis=1)
    upper = np.cumsum(weights[order], axis=1)
    lower = upper - weights[order]
    inside = np.clip(np.minimum(upper, 0.75) - np.maximum(lower, 0.25), 0.0, None)
    return (values * inside).sum(axis=1) / inside.sum(axis=1)


def _task_means(samples: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """[R, sum of counts] -> [R, tasks]."""
    ends = np.cumsum(counts)
    return np.stack(
        [
            samples[:, end - count : end].mean(axis=1)
            for end, count in zip(ends, counts, strict=True)
        ],
        axis=1,
    )


def _mean(samples: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    return _task_means(samples, counts).mean(axis=1)


def _median(samples: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Median over tasks of the mean over seeds."""
    return np.median(_task_means(samples, counts), axis=1)


def _optimality_gap(samples: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """How far scores fall short of 1: 1 - mean of min(score, 1)."""
    return 1.0 - _mean(np.minimum(samples, 1.0), counts)


METRICS: dict[str, Callable[[np.ndarray, Sequence[int]], np.ndarray]] = {
    "IQM": _iqm,
    "Mean": _mean,
    "Median": _median,
    "Optimality gap": _optimality_gap,
}
"""Aggregate metrics; all but the optimality gap are better when larger."""


def resample(scores: ScoreLists, reps: int, seed: int) -> np.ndarray:
    """Bootstrap samples [reps, total seeds]: within each task, seeds drawn with replacement."""
    rng = np.random.default_rng(seed)
    parts = []
    for values in scores:
        array = np.asarray(values, dtype=np.float64)
        parts.append(array[rng.integers(len(array), size=(reps, len(array)))])
    return np.concatenate(parts, axis=1)


def check(scores: ScoreLists) -> None:
    """Refuses what would make an aggregate a guess.

    Raises:
        ValueError: if a task has no score, or one that is not finite.
    """
    if not scores:
        raise ValueError("no task to aggregate; expected at least one list of scores")
    for index, values in enumerate(scores):
        if len(values) == 0:
            raise ValueError(f"task {index} has no scores; expected at least one seed")
        bad = [value for value in values if not np.isfinite(value)]
        if bad:
            raise ValueError(f"task {index} has the score {bad[0]}; expected finite numbers")


def aggregate(
    scores: ScoreLists, reps: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Every aggregate metric of one method, with percentile intervals.

    Args:
        scores: normalised scores as fractions, one list of seeds for each task; the lists may
            differ in length.
        reps: bootstrap resamples.
        seed: of the resampling; equal seeds give equal bytes.
    Raises:
        ValueError: see `check`.
    """
    check(scores)
    counts = [len(values) for values in scores]
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores])[None]
    samples = resample(scores, reps, seed) if min(counts) >= MIN_SEEDS else None
    tail = 100 * (1 - confidence) / 2
    found = {}
    for name, metric in METRICS.items():
        low = high = None
        if samples is not None:
            low, high = map(float, np.percentile(metric(samples, counts), [tail, 100 - tail]))
        found[name] = Estimate(float(metric(flat, counts)[0]), low, high)
    return found


def mean_interval(
    values: Sequence[float], reps: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean over the seeds of one task, with its percentile interval."""
    check([values])
    low = high = None
    if len(values) >= MIN_SEEDS:
        tail = 100 * (1 - confidence) / 2
        means = resample([values], reps, seed).mean(axis=1)
        low, high = map(float, np.percentile(means, [tail, 100 - tail]))
    return Estimate(float(np.mean(values)), low, high)


def curve_interval(
    values: np.ndarray, reps: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray] | None:
    """Bounds of the mean over seeds at each point, or None below `MIN_SEEDS` seeds.

    Args:
        values: [seeds, points]; a seed is redrawn as a whole curve.
    """
    count = len(values)
    if count < MIN_SEEDS:
        return None
    draws = np.random.default_rng(seed).integers(count, size=(reps, count))
    # How often each seed was drawn: the resampled means are then one matrix product.
    weights = np.stack([(draws == index).mean(axis=1) for index in range(count)], axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(weights @ values, [tail, 100 - tail], axis=0)
    return low, high
