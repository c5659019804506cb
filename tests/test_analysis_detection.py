"""ROC and precision-recall against counting every pair and every threshold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.detection import aupr, auroc, fpr_at_tpr, roc_curve

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)  # many ties


@given(SCORES, SCORES)
def test_auroc_counts_pairs(normal, anomalous):
    pairs = [(a > n) + 0.5 * (a == n) for a in anomalous for n in normal]
    assert auroc(normal, anomalous) == pytest.approx(np.mean(pairs))
    u = stats.mannwhitneyu(anomalous, normal).statistic
    assert auroc(normal, anomalous) == pytest.approx(u / len(pairs))


@given(SCORES, SCORES, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_fpr_and_average_precision_look_at_every_threshold(normal, anomalous, wanted):
    low, high = np.array(normal), np.array(anomalous)
    thresholds = sorted({*normal, *anomalous}, reverse=True)
    rates = [((high >= t).mean(), (low >= t).mean()) for t in thresholds]
    best = min(false for true, false in rates if true >= wanted)
    assert fpr_at_tpr(normal, anomalous, wanted) == pytest.approx(best)
    average, before = 0.0, 0.0
    for threshold, (true, _) in zip(thresholds, rates, strict=True):
        chosen = (high >= threshold).sum() / ((high >= threshold).sum() + (low >= threshold).sum())
        average, before = average + (true - before) * chosen, true
    assert aupr(normal, anomalous) == pytest.approx(average)


def test_a_perfect_and_a_constant_score():
    assert auroc([0, 1], [2, 3]) == aupr([0, 1], [2, 3]) == 1.0
    assert fpr_at_tpr([0, 1], [2, 3]) == 0.0
    assert auroc([1, 1, 1], [1]) == 0.5
    assert aupr([1, 1, 1], [1]) == 0.25
    false, true = roc_curve([0, 1], [2, 3])
    assert (false[0], true[0], false[-1], true[-1]) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(("normal", "anomalous"), [([], [1.0]), ([1.0], [np.nan])])
def test_empty_and_nan_scores_are_refused(normal, anomalous):
    with pytest.raises(ValueError, match="none of them nan"):
        auroc(normal, anomalous)
