"""State-action coverage against grids that can be counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from harness.datasets.errors import DatasetError
from harness.datasets.measures import CELL, coverage, distinct_cells, pairs_of


def raw(pairs, name="d"):
    """Only what is counted, of a dataset with as many observation as action dimensions."""
    half = pairs.shape[1] // 2
    obs, last = pairs[:, :half], np.full((1, half), 1e6)  # an episode's last obs has no action
    cut = len(pairs) // 3
    obs = np.concatenate([obs[:cut], last, obs[cut:], last])
    lengths = np.array([cut, len(pairs) - cut])
    return SimpleNamespace(obs=obs, action=pairs[:, half:], lengths=lengths, id=name)


def test_cells_of_one_axis_are_a_quarter_of_a_standard_deviation():
    """A constant second dimension drops out; the first is cut by hand."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 5000)
    pairs = np.stack([values, np.ones(5000)], axis=1)
    expected = len(np.unique(np.floor((values - values.mean()) / values.std() / CELL)))
    mirrored = len(np.unique(np.floor(-(values - values.mean()) / values.std() / CELL)))
    assert distinct_cells(pairs, pairs) in (expected, mirrored)  # an axis has no sign


def test_pairs_that_are_all_equal_share_one_cell():
    for count in (1, 5):
        assert distinct_cells(np.full((count, 4), 3.0), np.full((count, 4), 3.0)) == 1


def test_repeating_pairs_adds_no_cell():
    pairs = np.random.default_rng(1).normal(size=(300, 6))
    assert distinct_cells(np.tile(pairs, (7, 1)), pairs) == distinct_cells(pairs, pairs)


def test_every_action_is_beside_the_observation_it_was_taken_at():
    pairs = np.random.default_rng(6).normal(size=(50, 4))
    assert np.array_equal(pairs_of(raw(pairs)), pairs)


def test_units_of_a_dimension_do_not_matter():
    pairs = np.random.default_rng(2).normal(size=(400, 6))
    scale, shift = np.array([1e-3, 1, 5, 100, 2, 1]), np.arange(6.0)
    moved = pairs * scale + shift
    assert distinct_cells(moved, moved) == pytest.approx(distinct_cells(pairs, pairs), abs=3)


def test_coverage_is_one_of_itself_and_grows_with_spread():
    rng = np.random.default_rng(3)
    replay = raw(rng.normal(size=(4000, 4)), "replay")
    narrow, wide = (raw(s * rng.normal(size=(4000, 4))) for s in (0.2, 0.7))
    assert coverage(replay, replay)["saco"] == 1.0
    low, high = (coverage(data, replay)["saco"] for data in (narrow, wide))
    assert 0.0 < low < high < 1.0
    assert coverage(narrow, replay)["reference"] == "replay"


def test_sizes_are_made_equal_first():
    rng = np.random.default_rng(4)
    large, small = raw(rng.normal(size=(8000, 4))), raw(rng.normal(size=(500, 4)))
    found = coverage(small, large)
    assert found["pairs"] == 500
    assert found["saco"] == pytest.approx(1.0, abs=0.1), "draws of one distribution"


def test_without_a_reference_there_is_no_saco():
    found = coverage(raw(np.random.default_rng(5).normal(size=(100, 4))))
    assert "saco" not in found
    assert found["cells_per_pair"] == found["cells"] / 100


def test_another_environment_is_refused():
    with pytest.raises(DatasetError, match="choose a reference from the same environment"):
        coverage(raw(np.zeros((5, 4))), raw(np.zeros((5, 6))))
