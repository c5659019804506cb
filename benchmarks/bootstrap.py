"""Speed of the leaderboard's bootstrap against rliable's, side by side, and their agreement.

    python benchmarks/bootstrap.py                     5 methods x 10 seeds x 20 tasks
    python benchmarks/bootstrap.py --reps 2000         resamples of both

Prints seconds for all four aggregates of all methods, the ratio, and the largest difference
between interval bounds as a fraction of the interval's width (Monte-Carlo error: about
5 % of the width at 2000 resamples).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rliable import library, metrics

from analysis import stats

FUNCTIONS = (
    metrics.aggregate_iqm,
    metrics.aggregate_mean,
    metrics.aggregate_median,
    metrics.aggregate_optimality_gap,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--reps", type=int, default=2000)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    matrices = {
        f"method-{index}": generator.normal(0.6, 0.2, size=(options.seeds, options.tasks))
        for index in range(options.methods)
    }
    start = time.perf_counter()
    ours = {
        name: stats.aggregate(list(matrix.T), reps=options.reps)
        for name, matrix in matrices.items()
    }
    seconds = time.perf_counter() - start
    np.random.seed(0)  # noqa: NPY002 (what rliable draws from)
    start = time.perf_counter()
    _, theirs = library.get_interval_estimates(
        matrices,
        lambda scores: np.array([function(scores) for function in FUNCTIONS]),
        reps=options.reps,
    )
    their_seconds = time.perf_counter() - start
    worst = 0.0
    for name, estimates in ours.items():
        for index, estimate in enumerate(estimates.values()):
            low, high = theirs[name][:, index]
            assert estimate.low is not None
            assert estimate.high is not None
            difference = max(abs(estimate.low - low), abs(estimate.high - high))
            worst = max(worst, difference / (high - low))
    print(f"{options.methods} methods x {options.seeds} seeds x {options.tasks} tasks")
    print(f"{options.reps} resamples: ours {seconds:.3f} s, rliable {their_seconds:.3f} s")
    print(f"ratio {their_seconds / seconds:.1f}; largest difference {100 * worst:.1f} % of a width")


if __name__ == "__main__":
    main()
