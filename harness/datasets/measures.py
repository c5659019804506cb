"""What a dataset offers a learner: trajectory quality and state-action coverage.

After Schweighofer et al., "A Dataset Perspective on Offline Reinforcement Learning" (2022):

    TQ(D)    = (mean return of D - g_min) / (g_max - g_min)
    SACo(D)  = distinct (s, a) of D / distinct (s, a) of a reference D_ref of the same size

TQ is the normalised mean return of the card: g_min and g_max are the references of scores.

The paper counts discrete pairs. For continuous ones, where hardly two are equal, ours is: a pair is
the cell it lies in. Observations and actions are standardised by the reference's statistics and
projected on the reference's first `AXES` principal components; a cell is a quarter of each
component's standard deviation wide. More axes would make every pair a cell of its own, and SACo 1
for any data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness.datasets.errors import DatasetError

if TYPE_CHECKING:
    from harness.datasets.minari import RawDataset

AXES = 4
CELL = 0.25  # of a component's standard deviation


def pairs_of(raw: RawDataset) -> np.ndarray:
    """Observation and action side by side, float64 [S, O + A]."""
    episode = np.repeat(np.arange(len(raw.lengths)), raw.lengths)
    obs = raw.obs[np.arange(len(raw.action)) + episode]  # without those that end episodes
    return np.concatenate([obs, raw.action], axis=1).astype(np.float64)


def distinct_cells(pairs: np.ndarray, reference: np.ndarray) -> int:
    """Cells of the reference's grid that hold at least one pair; 1 if it has no axis that varies.

    Args:
        pairs: [S, D].
        reference: [R, D], whose statistics and principal components make the grid.
    Raises:
        DatasetError: if the two have different dimensions.
    """
    if pairs.shape[1] != reference.shape[1]:
        raise DatasetError(
            f"pairs of {pairs.shape[1]} and {reference.shape[1]} dimensions cannot be counted on "
            "one grid; choose a reference from the same environment"
        )
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    moving = std > 1e-9
    if not moving.any():
        return 1
    scaled = (reference[:, moving] - mean[moving]) / std[moving]
    _, components = np.linalg.eigh(np.cov(scaled, rowvar=False).reshape(moving.sum(), -1))
    axes = components[:, ::-1][:, :AXES]  # eigh sorts ascending
    width = CELL * (scaled @ axes).std(axis=0)
    place = ((pairs[:, moving] - mean[moving]) / std[moving]) @ axes
    cells = np.floor(place / np.maximum(width, 1e-9)).astype(np.int64)
    return len(np.unique(cells, axis=0))


def coverage(raw: RawDataset, reference: RawDataset | None = None) -> dict[str, float | int | str]:
    """SACo with what it was computed from.

    Of a reference of another size both are thinned evenly to the smaller size. Without a reference
    there is no SACo: the cells of the dataset's own grid and how many of its pairs open one.
    """
    pairs = pairs_of(raw)
    if reference is None:
        cells = distinct_cells(pairs, pairs)
        return {"pairs": len(pairs), "cells": cells, "cells_per_pair": cells / len(pairs)}
    others = pairs_of(reference)
    size = min(len(pairs), len(others))
    pairs, others = _thinned(pairs, size), _thinned(others, size)
    cells, known = distinct_cells(pairs, others), distinct_cells(others, others)
    return {
        "saco": cells / known,
        "reference": reference.id,
        "pairs": size,
        "cells": cells,
        "reference_cells": known,
    }


def _thinned(pairs: np.ndarray, size: int) -> np.ndarray:
    return pairs[np.linspace(0, len(pairs) - 1, size).round().astype(np.int64)]
