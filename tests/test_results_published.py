"""Reference scores that ship with the package."""

import math

import pytest

from results.published import reference_scores


def test_reference_scores_are_d4rls():
    scores = reference_scores()
    assert len(scores) == 159
    assert scores["hopper-medium-v2"] == (-20.272305, 3234.3)
    assert scores["halfcheetah-expert-v2"] == (-280.178953, 12135.0)
    assert scores["antmaze-umaze-v2"] == (0.0, 1.0)
    assert scores["pen-human-v1"] == pytest.approx((96.262799, 3076.833102), abs=1e-6)
    assert scores["maze2d-large-v1"] == (6.7, 273.99)


def test_all_reference_scores_are_increasing_finite_pairs():
    for name, (low, high) in reference_scores().items():
        assert math.isfinite(low), name
        assert low < high < math.inf, name


def test_a_caller_cannot_change_the_scores_of_the_next():
    reference_scores().clear()
    assert reference_scores()
