"""The tuning budget against closed forms, enumeration, and the traps that it avoids."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from analysis.tuning import expected_best, policies, tuning_curve
from results.store import Store
from tests.test_analysis_leaderboard import dataset, trial


def test_the_expected_best_is_the_mean_over_all_subsets():
    values = [3.0, -1.0, 2.0, 2.0, 7.0]
    for t in range(1, 6):
        brute = np.mean([max(chosen) for chosen in itertools.combinations(values, t)])
        assert expected_best(values)[t - 1] == pytest.approx(brute)


def test_without_noise_the_curve_is_the_expected_best():
    values = [0.1, 0.9, 0.5, 0.3]
    found = tuning_curve([[v] * 3 for v in values], pulls=6, repeats=20_000, reps=5)
    error = 4 * np.std(values) / np.sqrt(20_000)
    assert found.value[:4] == pytest.approx(expected_best(values), abs=error)
    assert found.value[3:] == pytest.approx([0.9] * 3)  # all were seen once


def test_fewer_at_hand_than_in_the_pool_end_at_their_expected_best():
    values = [0.1, 0.9, 0.5, 0.3]
    found = tuning_curve([[v] for v in values], pulls=9, sample=2, repeats=20_000, reps=5)
    assert found.value[-1] == pytest.approx(expected_best(values)[1], abs=0.01)
    assert (found.num_policies, found.sample) == (4, 2)


def test_two_noisy_policies_by_enumeration():
    """Policies (0, 3) and (1, 1): after two pulls, the deployed one is that of the larger draw."""
    found = tuning_curve([[0.0, 3.0], [1.0, 1.0]], pulls=2, repeats=40_000)
    assert found.value[0] == pytest.approx((1.5 + 1.0) / 2, abs=0.01)
    assert found.value[1] == pytest.approx((1.5 + 1.0) / 2, abs=0.01)
    better = tuning_curve([[0.0, 3.0, 3.0], [1.0, 1.0]], pulls=2, repeats=40_000)
    assert better.value[1] == pytest.approx(2 / 3 * 2.0 + 1 / 3 * 1.0, abs=0.01)


def test_negative_returns_do_not_favour_what_was_never_pulled():
    scores = np.random.default_rng(0).normal(-50, 1, size=(6, 20))
    found = tuning_curve(scores - 100, pulls=40, reps=5)
    assert found.value == pytest.approx(tuning_curve(scores, pulls=40, reps=5).value - 100)
    assert found.value[0] == pytest.approx(scores.mean() - 100, abs=0.1)


def test_the_unit_of_returns_changes_nothing():
    scores = np.random.default_rng(1).normal(size=(8, 20)) + np.arange(8)[:, None]
    small = tuning_curve(scores, pulls=60, reps=5)
    large = tuning_curve(1000 * scores, pulls=60, reps=5)
    assert large.value == pytest.approx(1000 * small.value)


def test_many_pulls_find_the_best_policy():
    scores = np.random.default_rng(2).normal(size=(5, 50)) + 3 * np.arange(5)[:, None]
    found = tuning_curve(scores, pulls=100, repeats=200, reps=20)
    assert found.value[-1] == pytest.approx(scores[4].mean(), abs=0.02)
    assert found.low is not None
    assert (found.low <= found.high).all()


def test_ties_go_to_any_policy():
    """First pulls often tie at 1, where the better policy must not win, or lose, by its index."""
    often, seldom = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    # Both 1 or both 0: (3 + 3) of 16 cases, each way half; only one 1: 9 of 16 and 1 of 16.
    expected = (9 / 16 + 3 / 16) * 0.75 + (1 / 16 + 3 / 16) * 0.25
    for scores in ([often, seldom], [seldom, often]):
        found = tuning_curve(scores, pulls=2, repeats=40_000)
        assert found.value[1] == pytest.approx(expected, abs=0.01)


def test_equal_seeds_give_equal_bytes_and_two_policies_no_bounds():
    scores = np.random.default_rng(3).normal(size=(4, 9))
    one, two = (tuning_curve(scores, pulls=20, repeats=50, reps=10, seed=7) for _ in range(2))
    assert one.value.tobytes() == two.value.tobytes()
    assert one.high.tobytes() == two.high.tobytes()
    assert tuning_curve(scores[:2], pulls=5).low is None


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "no scores"),
        ([[0.1], []], {}, "policy 1 has no scores"),
        ([[np.nan]], {}, "policy 0 has the score nan"),
        ([[0.1]], {"pulls": 0}, "pulls is 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        tuning_curve(scores, **options)


def test_policies_are_the_last_evaluations_of_finished_trials():
    data = dataset()
    with Store.open("sqlite://") as store:
        store.append(
            [
                data,
                *trial("a", data, 0, returns={10: [0, 0], 20: [50, 70]}),
                *trial("a", data, 1, returns={20: [10, 30]}),
                *trial("a", data, 2, status="failed"),
            ]
        )
        found = policies(store)
        assert policies(store, []) == {}
    assert found == {("a", "line/a-v0"): [[0.5, 0.7], [0.1, 0.3]]}
