"""How well a score separates two samples: ROC and precision-recall, without a threshold chosen.

Throughout, `normal` are scores of what should score low and `anomalous` of what should score high;
each sample counts as a whole, so that their sizes do not matter but for precision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def roc_curve(normal: ArrayLike, anomalous: ArrayLike) -> tuple[NDArray, NDArray]:
    """False and true positive rates of every threshold, from (0, 0) to (1, 1), rising.

    Ties are one point of the curve, so that the line through it gives them half.

    Raises:
        ValueError: if a sample is empty or a score is nan.
    """
    low, high = _checked(normal), _checked(anomalous)
    scores = np.concatenate((low, high))
    order = np.argsort(-scores, kind="stable")
    is_anomalous = np.concatenate((np.zeros(len(low)), np.ones(len(high))))[order]
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    true = np.cumsum(is_anomalous)[last_of_tie]
    false = np.cumsum(1.0 - is_anomalous)[last_of_tie]
    return np.append(0.0, false / len(low)), np.append(0.0, true / len(high))


def auroc(normal: ArrayLike, anomalous: ArrayLike) -> float:
    """Probability that an anomalous score is above a normal one; ties count half."""
    false, true = roc_curve(normal, anomalous)
    return float(np.trapezoid(true, false))


def aupr(normal: ArrayLike, anomalous: ArrayLike) -> float:
    """Average precision, anomalies being the positives: the sum of precision times recall's steps.

    Depends on the shares of the two samples; a useless score has the share of anomalies.
    """
    low, high = _checked(normal), _checked(anomalous)
    false, true = roc_curve(low, high)
    found = true[1:] * len(high)
    precision = found / (found + false[1:] * len(low))
    return float((np.diff(true) * precision).sum())


def fpr_at_tpr(normal: ArrayLike, anomalous: ArrayLike, tpr: float = 0.95) -> float:
    """Smallest false positive rate of a threshold that finds at least `tpr` of the anomalies."""
    false, true = roc_curve(normal, anomalous)
    return float(false[np.argmax(true >= tpr - 1e-12)])


def _checked(scores: ArrayLike) -> NDArray:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not len(values) or np.isnan(values).any():
        raise ValueError(
            f"{len(values)} scores, {int(np.isnan(values).sum())} of them nan; expected at least "
            "one score and none of them nan"
        )
    return values
