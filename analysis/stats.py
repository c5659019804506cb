"""Aggregates of normalised scores with stratified bootstrap intervals over seeds.

The resampling unit is the seed: within each task, seeds are drawn with replacement, independently
of the other tasks (Agarwal et al., 2021, "Deep RL at the Edge of the Statistical Precipice",
Sec. 4.1). Episodes are averaged before and never resampled. The estimators are rliable's, written
for all resamples at once and for unequal numbers of seeds; tests hold them to rliable's values
and intervals. Its own bootstrap draws from numpy's global generator whatever seed it is given.

Intervals are "percentile" (rliable's), "bca" (bias corrected and accelerated) or "t" (Student's t
with the jackknife's standard error). The first two are too short with few seeds; how much has been
measured: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np

MIN_SEEDS = 3
"""With fewer seeds in a task no interval is given: resampling two values says nothing."""

ScoreLists = Sequence[Sequence[float]]  # one list of seeds for each task
Interval = Literal["percentile", "bca", "t"]
Metric = Callable[[np.ndarray, Sequence[int]], np.ndarray]  # [R, total seeds], counts -> [R]


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None

    def text(self, digits: int = 3, scale: float = 1.0, form: str = "f", sign: str = "") -> str:
        """Value and interval, "0.512 [0.480, 0.544]", or the value alone.

        Args:
            form: "f" or "g", of Python's format.
            sign: "+" for differences.
        """
        value, low, high = (
            None if number is None else f"{scale * number:{sign}.{digits}{form}}"
            for number in (self.value, self.low, self.high)
        )
        return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


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


METRICS: dict[str, Metric] = {
    "IQM": _iqm,
    "Mean": _mean,
    "Median": _median,
    "Optimality gap": _optimality_gap,
}
"""Aggregate metrics; all but the optimality gap are better when larger."""


BLOCK = 50_000
"""Scores drawn at once: few enough to stay in a core's cache, which halves the time."""


def bootstrap(
    metrics: Mapping[str, Metric], scores: ScoreLists, reps: int, seed: int
) -> dict[str, np.ndarray]:
    """Each metric of bootstrap samples, [reps]: within each task, seeds drawn with replacement."""
    rng = np.random.default_rng(seed)
    counts = [len(values) for values in scores]
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores])
    first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)  # of the task of each score
    bound = counts[0] if len(set(counts)) == 1 else np.repeat(counts, counts)
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    rows = max(1, BLOCK // len(flat))
    for start in range(0, reps, rows):
        drawn = rng.integers(bound, size=(min(rows, reps - start), len(flat)))
        drawn += first
        samples = flat.take(drawn)
        for name, metric in metrics.items():
            found[name].append(metric(samples, counts))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def check(scores: ScoreLists, names: Sequence[str] | None = None) -> None:
    """Refuses what would make an aggregate a guess.

    Args:
        names: of the tasks, for the message.
    Raises:
        ValueError: if a task has no score, or one that is not finite.
    """
    if len(scores) == 0:
        raise ValueError("no scores; expected at least one list of them")
    for index, values in enumerate(scores):
        name = f"task {index}" if names is None else names[index]
        if len(values) == 0:
            raise ValueError(f"{name} has no scores; expected at least one seed")
        bad = [value for value in values if not np.isfinite(value)]
        if bad:
            raise ValueError(f"{name} has the score {bad[0]}; expected finite numbers")


def aggregate(
    scores: ScoreLists,
    reps: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    interval: Interval = "percentile",
    metrics: Sequence[str] = tuple(METRICS),
) -> dict[str, Estimate]:
    """Aggregate metrics of one method, with intervals.

    Args:
        scores: normalised scores as fractions, one list of seeds for each task; the lists may
            differ in length.
        reps: bootstrap resamples.
        seed: of the resampling; equal seeds give equal bytes.
        interval: "percentile", "bca" or "t"; none with fewer than `MIN_SEEDS` seeds in a task.
        metrics: names of `METRICS`.
    Raises:
        ValueError: see `check`; or if the interval is unknown.
    """
    check(scores)
    chosen = {name: METRICS[name] for name in metrics}
    return _estimates(chosen, scores, reps, seed, confidence, interval)


def mean_interval(
    values: Sequence[float],
    reps: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    interval: Interval = "percentile",
) -> Estimate:
    """Mean over the seeds of one task, with its interval."""
    check([values])
    return _estimates({"Mean": _mean}, [values], reps, seed, confidence, interval)["Mean"]


def _estimates(
    metrics: Mapping[str, Metric],
    scores: ScoreLists,
    reps: int,
    seed: int,
    confidence: float,
    interval: Interval,
) -> dict[str, Estimate]:
    if interval not in get_args(Interval):
        raise ValueError(f"interval is {interval!r}; expected {', '.join(get_args(Interval))}")
    counts = [len(values) for values in scores]
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores])
    enough = min(counts) >= MIN_SEEDS
    samples = bootstrap(metrics, scores, reps, seed) if enough and interval != "t" else None
    found = {}
    for name, metric in metrics.items():
        value = float(metric(flat[None], counts)[0])
        low = high = None
        if samples is not None:
            draws = samples[name]
            tails = np.array(_tails(confidence)) / 100
            if interval == "bca":
                tails = _bca_tails(draws, value, _influences(metric, flat, counts), tails)
            low, high = map(float, np.percentile(draws, 100 * tails))
        elif enough:
            error, freedom = _standard_error(_influences(metric, flat, counts))
            half = error * t_quantile((1 + confidence) / 2, freedom)
            low, high = value - half, value + half
        found[name] = Estimate(value, low, high)
    return found


def _influences(metric: Metric, flat: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Jackknife influence of each seed, one array per task: (n - 1) (mean of left-outs - left-out).

    Davison and Hinkley (1997, "Bootstrap Methods and their Application", Sec. 3.2.1).
    """
    found, start = [], 0
    for task, count in enumerate(counts):
        rest = np.stack([np.delete(flat, start + seed) for seed in range(count)])
        left_out = metric(rest, [*counts[:task], count - 1, *counts[task + 1 :]])  # [n]
        found.append((count - 1) * (left_out.mean() - left_out))
        start += count
    return found


def _bca_tails(
    draws: np.ndarray, value: float, influences: list[np.ndarray], tails: np.ndarray
) -> np.ndarray:
    """The percentiles that BCa takes instead of `tails` (Davison and Hinkley, Eq. 5.21, 5.23)."""
    scaled = np.concatenate([part / len(part) for part in influences])
    spread = float((scaled**2).sum())
    acceleration = float((scaled**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    below = float((draws < value).mean() + (draws == value).mean() / 2)
    edge = 0.5 / len(draws)  # all draws on one side: the largest bias that can be told
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    shifted = [bias + normal.inv_cdf(tail) for tail in tails]
    return np.array([normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted])


def _standard_error(influences: list[np.ndarray]) -> tuple[float, float]:
    """The jackknife's standard error and its degrees of freedom (Welch and Satterthwaite)."""
    counts = np.array([len(part) for part in influences])
    variances = np.array([(part**2).sum() for part in influences]) / (counts * (counts - 1))
    total = variances.sum()
    if total == 0:
        return 0.0, float(counts.sum())
    return float(np.sqrt(total)), float(total**2 / (variances**2 / (counts - 1)).sum())


def mean_error(scores: ScoreLists) -> tuple[float, float]:
    """Standard error of the mean over tasks, and its degrees of freedom (Welch, Satterthwaite).

    Args:
        scores: one list of seeds for each task, at least two in each.
    """
    counts = [len(values) for values in scores]
    flat = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores])
    return _standard_error(_influences(_mean, flat, counts))


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile; `freedom` need not be a whole number."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


# ------------------------------------------------------------------- profiles and comparisons


@dataclass(frozen=True)
class Profile:
    """A performance profile: shares [points] at thresholds [points], with bounds if any."""

    thresholds: np.ndarray
    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def performance_profile(
    scores: ScoreLists,
    thresholds: Sequence[float],
    reps: int = 2_000,
    seed: int = 0,
    confidence: float = 0.95,
    of: Literal["runs", "task means"] = "runs",
) -> Profile:
    """Share of runs (every task weighing the same), or of tasks' means, above each threshold.

    Agarwal et al. (2021), Sec. 4.2. The bounds are percentiles at each threshold: pointwise.

    Raises:
        ValueError: see `check`; or if `of` is unknown.
    """
    check(scores)
    if of not in ("runs", "task means"):
        raise ValueError(f"of is {of!r}; expected 'runs' or 'task means'")
    at = np.asarray(thresholds, dtype=np.float64)

    def shares(weights: Sequence[np.ndarray]) -> np.ndarray:  # of seeds by task, [R, n] -> [R, P]
        total = np.zeros((len(weights[0]), len(at)))
        for values, weight in zip(scores, weights, strict=True):
            task = np.asarray(values, dtype=np.float64)
            if of == "runs":
                total += weight @ (task[:, None] > at)
            else:
                total += (weight @ task)[:, None] > at
        return total / len(scores)

    value = shares([np.full((1, len(values)), 1 / len(values)) for values in scores])[0]
    if min(map(len, scores)) < MIN_SEEDS:
        return Profile(at, value, None, None)
    rng = np.random.default_rng(seed)
    draws = shares([_weights(rng, len(values), reps) for values in scores])
    low, high = np.percentile(draws, _tails(confidence), axis=0)
    return Profile(at, value, low, high)


def probability_of_improvement(
    x: ScoreLists,
    y: ScoreLists,
    reps: int = 2_000,
    seed: int = 0,
    confidence: float = 0.95,
    form: Literal["average", "strict"] = "average",
) -> Estimate:
    """P(a run of x scores above a run of y), averaged over tasks, with its percentile interval.

    Args:
        x, y: scores of two methods, one list of seeds for each task, in the same order of tasks.
        form: "average" counts a tie as half, as rliable does; "strict" as no improvement.
    Raises:
        ValueError: see `check`; if the numbers of tasks differ; or if the form is unknown.
    """
    check(x)
    check(y)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} tasks and y {len(y)}; expected the same tasks")
    if form not in ("average", "strict"):
        raise ValueError(f"form is {form!r}; expected 'average' or 'strict'")
    tie = 0.5 if form == "average" else 0.0
    wins = []
    for ours, theirs in zip(x, y, strict=True):
        difference = np.subtract.outer(np.asarray(ours, float), np.asarray(theirs, float))
        wins.append((difference > 0) + tie * (difference == 0))  # [n, m]
    value = float(np.mean([table.mean() for table in wins]))
    if min(map(len, [*x, *y])) < MIN_SEEDS:
        return Estimate(value, None, None)
    draws = np.zeros(reps)
    shapes = tuple(table.shape for table in wins)
    for table, (rows, columns) in zip(wins, _pair_weights(shapes, reps, seed), strict=True):
        draws += ((rows @ table) * columns).sum(axis=1)
    low, high = map(float, np.percentile(draws / len(wins), _tails(confidence)))
    return Estimate(value, low, high)


def curve_interval(
    values: np.ndarray, reps: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray] | None:
    """Bounds of the mean over seeds at each point, or None below `MIN_SEEDS` seeds.

    Args:
        values: [seeds, points]; a seed is redrawn as a whole curve.
    """
    if len(values) < MIN_SEEDS:
        return None
    weights = _weights(np.random.default_rng(seed), len(values), reps)
    low, high = np.percentile(weights @ values, _tails(confidence), axis=0)
    return low, high


def _weights(rng: np.random.Generator, count: int, reps: int) -> np.ndarray:
    """How often each seed was drawn, over their number: [reps, count].

    Resampled means are then one matrix product.
    """
    draws = rng.integers(count, size=(reps, count))
    places = (draws + count * np.arange(reps)[:, None]).ravel()
    return np.bincount(places, minlength=reps * count).reshape(reps, count) / count


@lru_cache(maxsize=4)
def _pair_weights(
    shapes: tuple[tuple[int, int], ...], reps: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`_weights` of both methods, task by task: the same for all pairs with such counts."""
    rng = np.random.default_rng(seed)
    return [(_weights(rng, n, reps), _weights(rng, m, reps)) for n, m in shapes]


def _tails(confidence: float) -> list[float]:
    return [50 * (1 - confidence), 50 * (1 + confidence)]
