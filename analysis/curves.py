"""Learning curves: mean over seeds at each evaluation, with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import stats

if TYPE_CHECKING:
    import pandas as pd

REPS = 2000


@dataclass(frozen=True)
class Curve:
    """Scores of one method on one task by gradient step.

    Attributes:
        steps: those that every seed was evaluated at: a mean over other seeds than its
            neighbours' is not drawn.
        mean: over seeds.
        bounds: of the mean's 95 % bootstrap interval; None below `stats.MIN_SEEDS` seeds.
        seeds: every evaluation of each seed, as (step, score).
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None
    seeds: Mapping[int, tuple[tuple[int, float], ...]]


def mean_curves(frame: pd.DataFrame, seed: int = 0) -> dict[tuple[str, str], Curve]:
    """The curve of each (method, task) of an `analysis.load.evaluation_frame`.

    Args:
        seed: of the bootstrap.
    """
    scores: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    rows: Iterable[Any] = frame.itertuples()  # pandas' own groups are slow where they are small
    for row in rows:
        seeds = scores.setdefault((row.method, row.task), {})
        seeds.setdefault(row.seed, {})[row.step] = row.score
    return {key: _curve(seeds, seed) for key, seeds in scores.items()}


def _curve(seeds: Mapping[int, Mapping[int, float]], seed: int) -> Curve:
    steps = sorted(set.intersection(*(set(one) for one in seeds.values())))
    values = np.array([[one[step] for step in steps] for _, one in sorted(seeds.items())])
    bounds = stats.curve_interval(values, REPS, seed) if steps else None
    return Curve(
        steps=tuple(steps),
        mean=tuple(values.mean(axis=0).tolist()),
        bounds=None if bounds is None else (tuple(bounds[0].tolist()), tuple(bounds[1].tolist())),
        seeds={one: tuple(sorted(points.items())) for one, points in sorted(seeds.items())},
    )
