"""Numbers printed by others, as data, each with its source.

`d4rl_reference_scores.csv` holds D4RL's reference returns of its original datasets and
environments (repository Farama-Foundation/D4RL, Apache-2.0). Rows named `maze2d-*-v0` and
`maze2d-eval-*` come from the environments' registration (`d4rl/pointmaze/__init__.py`), all others
from `d4rl/infos.py`. `ref_min` is the mean return of 100 episodes of random actions, `ref_max` an
expert's mean return; Gym-MuJoCo and Adroit use one pair per environment for all datasets and
versions. Known doubts: the v1 and v2 Gym-MuJoCo pairs were never estimated anew (D4RL issue
#114), and maze2d's expert value is questioned (D4RL issue #215).
"""

from __future__ import annotations

import csv
import functools
import math
from importlib import resources


@functools.cache
def _reference_scores() -> dict[str, tuple[float, float]]:
    scores: dict[str, tuple[float, float]] = {}
    source = resources.files(__name__) / "d4rl_reference_scores.csv"
    with source.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["env_or_dataset"]
            low, high = float(row["ref_min_score"]), float(row["ref_max_score"])
            if name in scores or not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"{source}: row {name!r} ({low}, {high}) is a duplicate or not an increasing "
                    "pair of finite numbers"
                )
            scores[name] = (low, high)
    return scores


def reference_scores() -> dict[str, tuple[float, float]]:
    """D4RL's (ref_min, ref_max), undiscounted returns, by legacy dataset or environment id."""
    return dict(_reference_scores())
