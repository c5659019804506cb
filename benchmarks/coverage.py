"""How often 95 % intervals hold the true value, by simulation: a table for docs/statistics.md.

    python benchmarks/coverage.py                      about five minutes of one core
    python benchmarks/coverage.py --simulations 200    a look

Score matrices of known distributions are drawn again and again (seeds x tasks; the tasks' means go
from 0.1 to 0.9, the spread over seeds is 0.15), each gets its intervals, and the share of intervals
with the true value inside is printed, beside the mean width relative to the percentile interval's.
The true IQM is that of infinitely many seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

import numpy as np

from analysis import stats

SPREAD = 0.15
METRICS = ("IQM", "Mean")
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def bimodal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Four of five seeds succeed, the fifth falls 2.5 standard deviations below them."""
    return np.where(rng.random(shape) < 0.8, 0.5, -2.0) + 0.05 * rng.standard_normal(shape)


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1.0,
    "bimodal": bimodal,
}
"""Deviations [tasks, seeds] of mean 0 and variance 1."""


def scores(draw: Draw, rng: np.random.Generator, tasks: int, seeds: int) -> np.ndarray:
    """A score matrix [tasks, seeds]."""
    return np.linspace(0.1, 0.9, tasks)[:, None] + SPREAD * draw(rng, (tasks, seeds))


def measure(
    draw: Draw, tasks: int, seeds: int, simulations: int, reps: int, seed: int = 0
) -> dict[tuple[str, str], tuple[float, float]]:
    """(metric, interval) -> share of intervals that hold the truth, mean width."""
    rng = np.random.default_rng(seed)
    population = list(scores(draw, rng, tasks, 2_000_000 // tasks))
    flat, counts = np.concatenate(population)[None], [len(values) for values in population]
    truth = {name: float(stats.METRICS[name](flat, counts)[0]) for name in METRICS}
    found = {(m, i): np.zeros(2) for m in METRICS for i in get_args(stats.Interval)}
    for simulation in range(simulations):
        matrix = list(scores(draw, rng, tasks, seeds))
        for kind in get_args(stats.Interval):
            estimates = stats.aggregate(matrix, reps, simulation, interval=kind, metrics=METRICS)
            for metric, estimate in estimates.items():
                assert estimate.low is not None
                assert estimate.high is not None
                inside = estimate.low <= truth[metric] <= estimate.high
                found[metric, kind] += inside, estimate.high - estimate.low
    return {key: tuple(sums / simulations) for key, sums in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--reps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10, 50])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10])
    options = parser.parse_args()
    error = 100 * (0.95 * 0.05 / options.simulations) ** 0.5
    print(
        f"Coverage of 95 % intervals in %, {options.simulations} simulations (standard error "
        f"about {error:.1f}), {options.reps} resamples; in brackets the mean width relative to "
        "percentile.\n"
    )
    kinds = get_args(stats.Interval)
    print("| scores | tasks | seeds | metric | " + " | ".join(kinds) + " |")
    print("| --- | ---: | ---: | --- |" + " ---: |" * len(kinds))
    for name, draw in DISTRIBUTIONS.items():
        for tasks in options.tasks:
            for seeds in options.seeds:
                found = measure(draw, tasks, seeds, options.simulations, options.reps)
                for metric in METRICS:
                    base = found[metric, "percentile"][1]
                    cells = [
                        f"{100 * covered:.1f} ({width / base:.2f})"
                        for kind in kinds
                        for covered, width in [found[metric, kind]]
                    ]
                    print(f"| {name} | {tasks} | {seeds} | {metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
