"""Which of several methods are better: ranks with intervals, corrected tests of pairs, tie groups.

Owns comparisons of {method: {task: scores of its seeds}}; every method on the same tasks. A pair is
compared by the probability of improvement, averaged over tasks, and tested by permuting seeds
between the two methods within each task. The test is exact at any number of seeds, so few seeds
can fail to separate methods, but do not separate equal ones more often than `alpha`: with 3 seeds
each on one task no difference is significant, however large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from analysis import stats

Table = Mapping[str, Mapping[str, Sequence[float]]]  # method -> task -> scores of its seeds

ALPHA = 0.05
LARGEST_EXACT = 60  # pooled seeds of a task; beyond, the normal approximation is as good
LARGEST_LATTICE = 20_000  # points per task of the exact distribution, when seeds are unequal


@dataclass(frozen=True)
class Rank:
    """A method's place.

    Attributes:
        estimate: of the metric.
        rank: from 1, the best; the mean of the places shared by exactly equal estimates.
        low, high: bounds of the rank; None if some method has fewer than `stats.MIN_SEEDS` seeds.
        group: letters; two methods that share one are not significantly different.
    """

    method: str
    estimate: float
    rank: float
    low: float | None
    high: float | None
    group: str


@dataclass(frozen=True)
class Pair:
    """Method x beside method y.

    Attributes:
        probability: that a run of x scores above a run of y, averaged over tasks.
        p_value: of the permutation test, two-sided.
        adjusted: the same after Holm's correction for all pairs.
    """

    x: str
    y: str
    probability: stats.Estimate
    p_value: float
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """Ranks, best first, and all pairs of them, the better rank as x."""

    ranks: tuple[Rank, ...]
    pairs: tuple[Pair, ...]
    tasks: tuple[str, ...]
    metric: str
    alpha: float

    def pair(self, x: str, y: str) -> Pair:
        """Two methods in the order asked for.

        Raises:
            KeyError: if they are not two of the methods.
        """
        for pair in self.pairs:
            if (pair.x, pair.y) == (x, y):
                return pair
            if (pair.y, pair.x) == (x, y):
                p = pair.probability
                low, high = (None if b is None else 1 - b for b in (p.high, p.low))
                turned = stats.Estimate(1 - p.value, low, high)
                return Pair(x, y, turned, pair.p_value, pair.adjusted)
        raise KeyError(f"no pair of {x!r} and {y!r}; compared: {[r.method for r in self.ranks]}")


def compare(
    table: Table,
    metric: str = "IQM",
    reps: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    alpha: float = ALPHA,
) -> Comparison:
    """Ranks by an aggregate metric, tests of all pairs, and tie groups.

    A rank's interval is over bootstrap resamples, in each of which all methods are ranked anew.

    Args:
        table: scores as fractions; numbers of seeds may differ.
        metric: one of `stats.METRICS`.
        reps: bootstrap resamples.
        seed: of the bootstrap; equal seeds give equal bytes, in whatever order methods come.
        alpha: level of the tie groups, over all pairs together.
    Raises:
        ValueError: naming methods and tasks without scores, or with scores that are not finite.
    """
    if metric not in stats.METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(stats.METRICS)}")
    tasks = check(table)
    methods = sorted(table)
    scores = {method: [table[method][task] for task in tasks] for method in methods}
    estimates, draws = [], []
    for index, method in enumerate(methods):
        flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in scores[method]])[None]
        counts = [len(values) for values in scores[method]]
        estimates.append(float(stats.METRICS[metric](flat, counts)[0]))
        if min(counts) >= stats.MIN_SEEDS:
            # Methods were trained apart, so each is resampled with numbers of its own.
            one = {metric: stats.METRICS[metric]}
            draws.append(stats.bootstrap(one, scores[method], reps, _seed(seed, index))[metric])
    sign = 1 if metric == "Optimality gap" else -1  # the only one that is better when smaller
    places = _ranks(sign * np.array(estimates)[None])[0]
    low: list[float | None] = [None] * len(methods)
    high = list(low)
    if len(draws) == len(methods):
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        # No interpolation: bounds are ranks that occur.
        ranks_drawn = _ranks(sign * np.stack(draws, axis=1))
        bounds = np.percentile(ranks_drawn, tails, axis=0, method="inverted_cdf")
        low, high = bounds[0].tolist(), bounds[1].tolist()
    order = sorted(range(len(methods)), key=lambda index: (places[index], methods[index]))
    names = [methods[index] for index in order]
    pairs = _pairs(names, scores, seed, confidence)
    apart = {(pair.x, pair.y) for pair in pairs if pair.adjusted <= alpha}
    groups = letters(names, apart)
    ranks = tuple(
        Rank(methods[i], estimates[i], float(places[i]), low[i], high[i], groups[methods[i]])
        for i in order
    )
    return Comparison(ranks, tuple(pairs), tuple(tasks), metric, alpha)


def check(table: Table) -> list[str]:
    """The tasks, in the order of the first method.

    Raises:
        ValueError: naming each method and task without scores, or with one that is not finite.
    """
    if not table:
        raise ValueError("no method to compare; expected at least one")
    tasks = list(dict.fromkeys(task for by_task in table.values() for task in by_task))
    lacking = [
        f"{method} on {task}"
        for method, by_task in table.items()
        for task in tasks
        if len(by_task.get(task, ())) == 0
    ]
    if lacking:
        raise ValueError(
            f"{len(lacking)} cells have no scores: {'; '.join(lacking)}. Leave out the task or "
            "the method: a comparison is over the same tasks"
        )
    for method, by_task in table.items():
        stats.check([by_task[task] for task in tasks], [f"{method} on {task}" for task in tasks])
    return tasks


def _seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each column within its row, 1 the smallest, ties averaged: [R, M] -> [R, M]."""
    less = (values[:, None, :] < values[:, :, None]).sum(axis=2)
    same = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    return less + (same + 1) / 2


def _pairs(
    names: Sequence[str],
    scores: Mapping[str, stats.ScoreLists],
    seed: int,
    confidence: float,
) -> list[Pair]:
    found = [
        (
            x,
            y,
            stats.probability_of_improvement(
                scores[x], scores[y], seed=seed, confidence=confidence
            ),
            permutation_p_value(scores[x], scores[y]),
        )
        for index, x in enumerate(names)
        for y in names[index + 1 :]
    ]
    adjusted = holm([p for *_, p in found])
    return [Pair(*pair, new) for pair, new in zip(found, adjusted, strict=True)]


# --------------------------------------------------------------------------------------- tests


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: comparing them with alpha keeps the chance of any false one below alpha.

    Holm (1979): step down, multiplying the k-th smallest by the number of those not yet passed.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def permutation_p_value(x: stats.ScoreLists, y: stats.ScoreLists) -> float:
    """Two-sided p-value of the probability of improvement if labels meant nothing in any task.

    All ways to hand a task's seeds to the two methods are equally likely, independently of the
    other tasks. The distribution is exact (so a stratified rank-sum test, with ties), by
    convolution; above `LARGEST_EXACT` seeds in a task, or where unequal numbers of seeds make
    the lattice too fine, it is a normal one with the exact variance.

    Raises:
        ValueError: if the numbers of tasks differ.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} tasks and y {len(y)}; expected the same tasks")
    tasks = [_doubled_ranks(ours, theirs) for ours, theirs in zip(x, y, strict=True)]
    products = [len(a) * len(b) for a, b in zip(x, y, strict=True)]
    common = math.lcm(*products)
    # Twice the number of wins less its mean, in units in which all tasks weigh the same.
    observed, variance = 0, 0.0
    for ours, ranks, product in zip(x, tasks, products, strict=True):
        n, total = len(ours), len(ranks)
        unit = common // product
        observed += unit * (int(ranks[:n].sum()) - n * (total + 1))
        variance += unit**2 * product / total * float(ranks.var(ddof=1))
    if variance == 0:  # all scores are equal, in every task
        return 1.0
    if max(map(len, tasks)) > LARGEST_EXACT or common > LARGEST_LATTICE:
        return 2 * NormalDist().cdf(-abs(observed) / math.sqrt(variance))
    chances = _chances(
        tuple(
            (tuple(sorted(ranks.tolist())), len(ours), product)
            for ours, ranks, product in zip(x, tasks, products, strict=True)
        ),
        common,
    )
    reach = len(chances) // 2
    distance = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chances[distance >= abs(observed)].sum()))


def _doubled_ranks(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Twice the midranks of the pooled scores, which makes them whole numbers."""
    pooled = np.concatenate([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    return (2 * _ranks(pooled[None])[0]).round().astype(np.int64)


@lru_cache(maxsize=64)
def _chances(tasks: tuple[tuple[tuple[int, ...], int, int], ...], common: int) -> np.ndarray:
    """Chances of the sum over tasks, from -reach to reach; the same for all pairs without ties."""
    chances = np.ones(1)
    for ranks, count, product in tasks:
        one = _sum_chances(np.array(ranks), count, product)
        spread = np.zeros((len(one) - 1) * (common // product) + 1)
        spread[:: common // product] = one
        chances = _convolve(chances, spread)
    return chances


def _sum_chances(ranks: np.ndarray, count: int, product: int) -> np.ndarray:
    """Chances of twice the number of wins, less its mean, from -product to product.

    By counting the subsets of `count` ranks with each sum.
    """
    lowest = count * (count + 1)  # twice the sum of the first ranks: no win
    ways = np.zeros((count + 1, lowest + 2 * product + 1))
    ways[0, 0] = 1
    for rank in ranks.tolist():
        if rank < ways.shape[1]:
            ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    found = ways[count, lowest:]
    return found / found.sum()


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As numpy.convolve; adds shifted copies, for `b` is mostly zeros."""
    found = np.zeros(len(a) + len(b) - 1)
    for shift in np.flatnonzero(b):
        found[shift : shift + len(a)] += b[shift] * a
    return found


def letters(names: Sequence[str], apart: set[tuple[str, str]]) -> dict[str, str]:
    """Letters of each name, such that two names share one exactly if they are not `apart`.

    Piepho's insert and absorb (2004). The first letters go to the first names.
    """
    columns = [frozenset(names)]
    for x, y in sorted(apart):
        split = []
        for column in columns:
            split += [column - {x}, column - {y}] if {x, y} <= column else [column]
        unique = list(dict.fromkeys(split))
        columns = [c for c in unique if not any(c < other for other in unique)]
    place = {name: index for index, name in enumerate(names)}
    columns.sort(key=lambda column: sorted(place[name] for name in column))
    found = dict.fromkeys(names, "")
    for index, column in enumerate(columns):
        for name in column:
            found[name] += _letter(index)
    return found


def _letter(index: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return alphabet[index] if index < 26 else f"({index + 1})"
