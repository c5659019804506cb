"""Comparisons: exact tests against enumeration and scipy, Holm by hand, groups, ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from analysis import comparison, stats
from analysis.comparison import compare, holm, letters, permutation_p_value


def enumerated(x, y) -> float:
    """The p-value by handing out the pooled seeds in all ways, task by task."""

    def improvement(a, b) -> float:
        return np.mean([(p > q) + 0.5 * (p == q) for p in a for q in b]) - 0.5

    by_task = []
    for ours, theirs in zip(x, y, strict=True):
        pooled = [*ours, *theirs]
        values = []
        for chosen in itertools.combinations(range(len(pooled)), len(ours)):
            rest = [pooled[i] for i in range(len(pooled)) if i not in chosen]
            values.append(improvement([pooled[i] for i in chosen], rest))
        by_task.append(values)
    observed = abs(sum(improvement(a, b) for a, b in zip(x, y, strict=True)))
    sums = np.array([sum(one) for one in itertools.product(*by_task)])
    return float((np.abs(sums) >= observed - 1e-9).mean())


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]),
        ([[1.0, 2.0, 2.0], [5.0, 1.0]], [[2.0, 3.0], [0.0, 1.0, 1.0]]),
        ([[1.0, 4.0], [2.0, 2.5], [0.0, 9.0]], [[3.0, 5.0], [2.0, 4.0], [8.0, 7.0]]),
        ([[1.0, 1.0, 1.0, 7.0]], [[1.0, 3.0]]),
    ],
)
def test_the_p_value_is_that_of_all_permutations(x, y):
    assert permutation_p_value(x, y) == pytest.approx(enumerated(x, y), abs=1e-12)


def test_on_one_task_it_is_the_exact_mann_whitney_test():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.normal(size=7), rng.normal(0.8, 1, size=6)
        expected = scipy.stats.mannwhitneyu(x, y, method="exact").pvalue
        assert permutation_p_value([x], [y]) == pytest.approx(expected, abs=1e-12)


def test_three_seeds_on_one_task_never_differ_significantly():
    assert permutation_p_value([[1, 2, 3]], [[7, 8, 9]]) == pytest.approx(0.1)


def test_many_seeds_use_a_normal_distribution_that_agrees(monkeypatch):
    rng = np.random.default_rng(1)
    x = [rng.integers(0, 9, size=12) for _ in range(3)]
    y = [rng.integers(1, 10, size=15) for _ in range(3)]
    exact = permutation_p_value(x, y)
    monkeypatch.setattr(comparison, "LARGEST_EXACT", 5)
    assert permutation_p_value(x, y) != exact
    assert permutation_p_value(x, y) == pytest.approx(exact, rel=0.1)


def test_equal_scores_do_not_differ():
    assert permutation_p_value([[1.0, 1.0]], [[1.0, 1.0]]) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_letters_are_shared_exactly_where_methods_are_not_apart():
    found = letters("ABC", {("A", "C")})
    assert found == {"A": "a", "B": "ab", "C": "b"}
    rng = np.random.default_rng(0)
    names = "ABCDEF"
    for _ in range(50):
        pairs = list(itertools.combinations(names, 2))
        apart = {pair for pair in pairs if rng.random() < 0.5}
        found = letters(names, apart)
        for pair in pairs:
            assert bool(set(found[pair[0]]) & set(found[pair[1]])) == (pair not in apart)


def make(means, seeds=5, tasks=4, spread=0.02):
    rng = np.random.default_rng(3)
    return {
        name: {f"t{t}": (mean + spread * rng.normal(size=seeds)).tolist() for t in range(tasks)}
        for name, mean in means.items()
    }


def test_far_methods_are_ranked_with_certainty_and_near_ones_share_a_group():
    found = compare(make({"low": 0.1, "twin": 0.9, "top": 0.9}), reps=2000)
    assert [rank.method for rank in found.ranks][2] == "low"
    assert (found.ranks[2].rank, found.ranks[2].low, found.ranks[2].high) == (3, 3, 3)
    assert [rank.group for rank in found.ranks] == ["a", "a", "b"]
    assert found.ranks[0].low == 1
    assert found.ranks[0].high == 2
    assert found.pair("low", "top").probability.value == 0.0
    assert found.pair("top", "low").probability == stats.Estimate(1.0, 1.0, 1.0)
    assert found.pair("low", "top").adjusted < 0.05


def test_a_comparison_does_not_depend_on_the_order_of_methods():
    table = make({"a": 0.4, "b": 0.5, "c": 0.45})
    assert compare(table, seed=4) == compare(dict(reversed(table.items())), seed=4)
    assert compare(table, seed=4) != compare(table, seed=5)


def test_ranks_by_the_optimality_gap_are_best_when_small():
    found = compare(make({"low": 0.1, "top": 0.9}), metric="Optimality gap", reps=100)
    assert found.ranks[0].method == "top"


def test_bounds_of_ranks_are_ranks_that_occur():
    rng = np.random.default_rng(1)
    table = {name: {"a": rng.normal(0.01 * i, 1, 5).tolist()} for i, name in enumerate("abcd")}
    bounds = [bound for rank in comparison.compare(table).ranks for bound in (rank.low, rank.high)]
    assert all(2 * bound == int(2 * bound) for bound in bounds)
    assert max(bounds) > min(bounds)


def test_with_two_seeds_ranks_have_no_interval():
    found = compare(make({"a": 0.1, "b": 0.9}, seeds=2), reps=100)
    assert all(rank.low is None and rank.high is None for rank in found.ranks)
    assert found.pairs[0].probability.low is None


def test_unequal_numbers_of_seeds_are_all_used():
    table = {"a": {"t": [1.0, 2.0, 3.0]}, "b": {"t": [2.5, 4.0, 5.0, 6.0]}}
    assert compare(table, reps=100).pair("a", "b").probability.value == pytest.approx(1 / 12)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="1 cells have no scores: b on u"):
        compare({"a": {"t": [1.0], "u": [1.0]}, "b": {"t": [1.0]}})
    with pytest.raises(ValueError, match="b on t has the score nan"):
        compare({"a": {"t": [1.0]}, "b": {"t": [float("nan")]}})
    with pytest.raises(ValueError, match="no method"):
        compare({})
    with pytest.raises(KeyError, match="no pair"):
        compare({"a": {"t": [1.0]}}).pair("a", "z")


def test_false_positives_stay_at_the_level():
    """With equal methods, any pair is called different in at most 5 % of the comparisons."""
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(400):
        scores = rng.exponential(size=(3, 2, 4))
        p = [permutation_p_value(scores[i], scores[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        false += min(holm(p)) <= 0.05
    assert false / 400 < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
