"""Aggregates and intervals: closed forms, and rliable's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis import stats

RLIABLE = {
    "IQM": "aggregate_iqm",
    "Mean": "aggregate_mean",
    "Median": "aggregate_median",
    "Optimality gap": "aggregate_optimality_gap",
}


def values(scores, **options) -> dict[str, float]:
    found = stats.aggregate(scores, **{"reps": 10, **options})
    return {name: estimate.value for name, estimate in found.items()}


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 8), st.integers(1, 6)),
        elements=st.floats(-2, 3, allow_subnormal=False),
    )
)
def test_values_are_rliables_for_equal_numbers_of_seeds(matrix):
    metrics = pytest.importorskip("rliable.metrics")
    found = values(list(matrix.T))
    for name, function in RLIABLE.items():
        assert found[name] == pytest.approx(getattr(metrics, function)(matrix), abs=1e-12)


def test_intervals_are_rliables_within_monte_carlo_error():
    library = pytest.importorskip("rliable.library")
    from rliable import metrics

    matrix = np.random.default_rng(5).normal(0.6, 0.25, size=(5, 8))
    ours = stats.aggregate(list(matrix.T), reps=20_000, seed=1)
    state = np.random.get_state()  # noqa: NPY002 (rliable draws from the global generator)
    np.random.seed(0)  # noqa: NPY002
    try:
        _, intervals = library.get_interval_estimates(
            {"m": matrix},
            lambda m: np.array([getattr(metrics, name)(m) for name in RLIABLE.values()]),
            reps=2000,
        )
    finally:
        np.random.set_state(state)  # noqa: NPY002
    for index, name in enumerate(RLIABLE):
        low, high = intervals["m"][:, index]
        # The standard error of a 2.5 % percentile of 2000 draws is about 5 % of the width.
        tolerance = 0.12 * (high - low)
        assert ours[name].low == pytest.approx(low, abs=tolerance), name
        assert ours[name].high == pytest.approx(high, abs=tolerance), name


def test_the_interval_of_the_mean_has_its_closed_form():
    scores = np.random.default_rng(0).normal(size=40)
    interval = stats.aggregate([scores], reps=40_000)["Mean"]
    # The bootstrap's mean is nearly normal, with the population standard deviation over sqrt(n).
    half = scipy.stats.norm.ppf(0.975) * scores.std() / np.sqrt(40)
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.03 * half * 2)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.03 * half * 2)


def test_equal_seeds_give_equal_bytes_and_leave_the_global_generator_alone():
    scores = [[0.1, 0.5, 0.9], [0.2, 0.3, 0.8, 0.4]]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert stats.aggregate(scores, seed=3) == stats.aggregate(scores, seed=3)
    assert stats.aggregate(scores, seed=3) != stats.aggregate(scores, seed=4)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_no_interval_below_three_seeds():
    for scores in ([[0.1, 0.2]], [[0.1, 0.2, 0.3], [0.4, 0.5]]):
        assert all(
            estimate.low is None and estimate.high is None
            for estimate in stats.aggregate(scores).values()
        )
    assert stats.aggregate([[0.1, 0.2, 0.3]])["IQM"].low is not None


def test_every_task_weighs_the_same_when_seeds_are_unequal():
    found = values([[0.0] * 9, [1.0]])
    assert found["Mean"] == 0.5
    assert found["Median"] == 0.5
    assert found["Optimality gap"] == 0.5
    assert found["IQM"] == pytest.approx(0.5)  # a quarter of the weight of either task is cut


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=4), min_size=2, max_size=4))
def test_the_weighted_iqm_is_the_iqm_of_repeated_scores(tasks):
    """Repeating each task's scores to a common number of seeds changes nothing but the cuts."""
    total = 4 * int(np.lcm.reduce([len(task) for task in tasks]))
    repeated = [np.repeat(np.array(task, float), total // len(task)) for task in tasks]
    pooled = np.concatenate(repeated)
    expected = scipy.stats.trim_mean(pooled, 0.25)
    if len({len(task) for task in tasks}) > 1:
        assert values(tasks)["IQM"] == pytest.approx(expected)


def test_scores_beyond_one_do_not_count_against_the_optimality_gap():
    assert values([[0.5, 2.0]])["Optimality gap"] == 0.25


@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "no scores"), ([[0.1], []], "task 1 has no scores"), ([[0.1, np.nan]], "the score nan")],
)
def test_what_cannot_be_aggregated_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        stats.aggregate(scores)


def test_the_interval_of_a_curve_is_that_of_the_mean_at_each_point():
    curve = np.random.default_rng(2).normal(size=(6, 3))
    low, high = stats.curve_interval(curve, reps=20_000)
    for point in range(3):
        single = stats.mean_interval(curve[:, point].tolist(), reps=20_000, seed=9)
        tolerance = 0.05 * (single.high - single.low)
        assert low[point] == pytest.approx(single.low, abs=tolerance)
        assert high[point] == pytest.approx(single.high, abs=tolerance)
    assert stats.curve_interval(curve[:2]) is None


# ------------------------------------------------------------------ other intervals


def test_the_t_interval_of_one_task_is_students():
    scores = [0.2, 0.5, 0.9, 0.4]
    found = stats.mean_interval(scores, interval="t")
    expected = scipy.stats.t.interval(0.95, 3, np.mean(scores), scipy.stats.sem(scores))
    assert (found.low, found.high) == pytest.approx(expected)


def test_the_t_interval_over_tasks_adds_variances_as_welch_and_satterthwaite_do():
    x, y = [0.2, 0.5, 0.9], [0.4, 0.6, 0.7, 1.3]
    found = stats.aggregate([x, np.negative(y)], interval="t")["Mean"]
    expected = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    assert (2 * found.low, 2 * found.high) == pytest.approx((expected.low, expected.high))


def test_bca_is_scipys():
    scores = np.random.default_rng(1).exponential(size=12)
    found = stats.mean_interval(scores, reps=200_000, interval="bca")
    theirs = scipy.stats.bootstrap(
        (scores,),
        np.mean,
        n_resamples=200_000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    plain = stats.mean_interval(scores, reps=200_000)
    width = plain.high - plain.low
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.01 * width)
    assert found.high > plain.high + 0.03 * width  # skewed: the correction is not nothing


@pytest.mark.parametrize("interval", ["bca", "t"])
def test_scores_without_spread_have_an_interval_without_width(interval):
    found = stats.aggregate([[0.5] * 3, [0.5] * 4], interval=interval)["IQM"]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_an_unknown_interval_is_refused():
    with pytest.raises(ValueError, match="percentile, bca, t"):
        stats.aggregate([[0.1, 0.2, 0.3]], interval="wald")


# ------------------------------------------------------------- profiles, improvement


def test_a_profile_is_rliables():
    library = pytest.importorskip("rliable.library")
    matrix = np.random.default_rng(2).normal(0.5, 0.3, size=(6, 5))
    at = np.linspace(-0.2, 1.2, 9)
    for of, theirs in (
        ("runs", library.run_score_deviation),
        ("task means", library.mean_score_deviation),
    ):
        found = stats.performance_profile(list(matrix.T), at, reps=500, of=of)
        assert found.value == pytest.approx([theirs(matrix, tau) for tau in at])
        assert (found.low <= found.value + 1e-9).all()
        assert (found.high >= found.value - 1e-9).all()
        again = stats.performance_profile(list(matrix.T), at, reps=500, of=of)
        assert found.low.tobytes() == again.low.tobytes()


def test_a_profile_weighs_tasks_equally_and_has_no_bounds_with_few_seeds():
    found = stats.performance_profile([[1.0] * 9, [0.0]], [0.5])
    assert found.value == pytest.approx([0.5])
    assert found.low is None
    assert found.high is None


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.int64, st.tuples(st.integers(1, 5), st.just(3)), elements=st.integers(0, 4)),
    arrays(np.int64, st.tuples(st.integers(1, 6), st.just(3)), elements=st.integers(0, 4)),
)
def test_the_probability_of_improvement_is_rliables(x, y):
    metrics = pytest.importorskip("rliable.metrics")
    found = stats.probability_of_improvement(list(x.T), list(y.T), reps=5).value
    assert found == pytest.approx(metrics.probability_of_improvement(x, y))


def test_the_strict_form_does_not_count_ties():
    x, y = [[1.0, 2.0, 2.0]], [[2.0, 0.0, 2.0]]
    assert stats.probability_of_improvement(x, y).value == pytest.approx(5 / 9)
    assert stats.probability_of_improvement(x, y, form="strict").value == pytest.approx(3 / 9)
    assert stats.probability_of_improvement(y, x, form="strict").value == pytest.approx(2 / 9)


def test_the_interval_of_the_probability_of_improvement_is_rliables():
    library = pytest.importorskip("rliable.library")
    from rliable import metrics

    rng = np.random.default_rng(7)
    x, y = rng.normal(0.2, 1, size=(6, 4)), rng.normal(size=(8, 4))
    ours = stats.probability_of_improvement(list(x.T), list(y.T), reps=20_000)
    state = np.random.get_state()  # noqa: NPY002 (rliable draws from the global generator)
    np.random.seed(0)  # noqa: NPY002
    try:
        _, intervals = library.get_interval_estimates(
            {"x,y": (x, y)}, metrics.probability_of_improvement, reps=1000
        )
    finally:
        np.random.set_state(state)  # noqa: NPY002
    low, high = np.ravel(intervals["x,y"])
    assert ours.low == pytest.approx(low, abs=0.15 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.15 * (high - low))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.probability_of_improvement([[1.0]], [[1.0], [2.0]]), "the same tasks"),
        (lambda: stats.probability_of_improvement([[1.0]], [[1.0]], form="both"), "form is"),
        (lambda: stats.performance_profile([[1.0]], [0.5], of="seeds"), "of is 'seeds'"),
        (lambda: stats.check([[np.inf]], ["hopper"]), "hopper has the score inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_bootstrap_draws_within_tasks_and_longer_runs_begin_as_shorter_ones():
    scores = [[1.0, 1.0, 1.0], [5.0] * 5]
    draws = stats.bootstrap(stats.METRICS, scores, 50, 0)
    assert (draws["Mean"] == 3.0).all()
    values = np.random.default_rng(0).normal(size=(4, 200))  # more than one block
    long, short = (stats.bootstrap(stats.METRICS, values, n, 0)["IQM"] for n in (300, 100))
    assert np.array_equal(long[:100], short)


def test_the_coverage_that_is_documented():
    """docs/statistics.md: at 3 seeds of one task, percentile covers far too little and t enough."""
    rng = np.random.default_rng(0)
    covered = {"percentile": 0, "t": 0}
    for _ in range(300):
        scores = rng.normal(size=3)
        for interval in covered:
            found = stats.mean_interval(scores, reps=200, interval=interval)
            covered[interval] += found.low <= 0 <= found.high
    assert covered["percentile"] / 300 < 0.85
    assert 0.92 < covered["t"] / 300 < 0.98
