"""How well scores separate data from the rest: ROC, precision-recall, and the figures of it.

Throughout, `normal` are scores of what should score low and `anomalous` of what should score high;
each sample counts as a whole, so that their sizes do not matter but for precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.plots import figure_style, palette
from analysis.stats import curve_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


# --------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Detection:
    """One detector against one kind of action: measures of each seed, [K]."""

    detector: str
    against: str
    auroc: NDArray
    aupr: NDArray
    fpr95: NDArray


def measure(detector: str, normal: NDArray, others: Mapping[str, NDArray]) -> list[Detection]:
    """Measures of scores [K, N], seed by seed, the data's against each kind of other action."""
    return [
        Detection(
            detector,
            against,
            *(
                np.array([function(*pair) for pair in zip(normal, other, strict=True)])
                for function in (auroc, aupr, fpr_at_tpr)
            ),
        )
        for against, other in others.items()
    ]


def with_interval(values: NDArray, seed: int = 0) -> str:
    """Mean and 95 % bootstrap interval over seeds, e.g. `0.912 [0.90, 0.92]`; too few: the mean."""
    bounds = curve_interval(values[:, None], seed=seed)
    if bounds is None:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} [{bounds[0][0]:.3f}, {bounds[1][0]:.3f}]"


def draw_curves(scores: Mapping[str, tuple[NDArray, Mapping[str, NDArray]]]) -> Figure:
    """A row for each detector: histograms of log scores, then a ROC curve for each kind and seed.

    Args:
        scores: detector -> scores of the data [K, N], and of others by kind.
    """
    import matplotlib.pyplot as plt

    figure_style()
    kinds = list(next(iter(scores.values()))[1])
    colours = palette(kinds)
    figure, axes = plt.subplots(
        len(scores), 2, figsize=(7.2, 1.9 * len(scores)), squeeze=False, layout="constrained"
    )
    for (name, (normal, others)), (left, right) in zip(scores.items(), axes, strict=True):
        everything = np.concatenate([normal, *others.values()], axis=None)
        floor = max(float(everything.min()), 1e-6 * float(everything.max()), 1e-12)
        logs = {kind: np.log10(np.maximum(v, floor)).ravel() for kind, v in others.items()}
        bins = np.linspace(np.log10(floor), np.log10(max(everything.max(), 2 * floor)), 50)
        of_data = np.log10(np.maximum(normal, floor)).ravel()
        left.hist(of_data, bins, density=True, color="0.75", label="data")
        for kind, other in others.items():
            left.hist(
                logs[kind], bins, density=True, histtype="step", color=colours[kind], label=kind
            )
            for k in range(len(normal)):
                false, true = roc_curve(normal[k], other[k])
                right.plot(false, true, color=colours[kind], linewidth=0.7, alpha=0.7)
        left.set(title=f"{name}: scores", xlabel="log10 of the score", ylabel="density")
        areas = [f"{m.against} {m.auroc.mean():.3f}" for m in measure(name, normal, others)]
        right.set(title=", ".join(areas), xlabel="false positive rate", ylabel="true positive rate")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def draw_maps(maps: Mapping[str, NDArray], obs: NDArray, action: NDArray, data: NDArray) -> Figure:
    """The data, then each detector's score over the plane, as ranks, mean over seeds.

    Ranks, because scores have no common scale: 0 is the lowest of the plane, 1 the highest.

    Args:
        maps: detector -> scores [K, actions, observations].
        obs, action: axes of the maps.
        data: (observation, action) pairs, [N, 2].
    """
    import matplotlib.pyplot as plt

    figure_style()
    columns = min(3, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.2 * rows), squeeze=False, layout="constrained"
    )
    panels = list(axes.ravel())
    panels[0].scatter(data[:, 0], data[:, 1], s=1, color="0.2", linewidths=0)
    panels[0].set(title="data", xlim=(obs[0], obs[-1]), ylim=(action[0], action[-1]))
    image = None
    for panel, (name, values) in zip(panels[1:], maps.items(), strict=False):
        order = values.reshape(len(values), -1).argsort(axis=1).argsort(axis=1)
        ranks = (order / (order.shape[1] - 1)).reshape(values.shape).mean(axis=0)
        image = panel.pcolormesh(obs, action, ranks, vmin=0, vmax=1, rasterized=True)
        panel.set(title=name)
    for panel in panels[len(maps) + 1 :]:
        panel.set_visible(False)
    for panel in panels:
        panel.grid(False)
        panel.set(xlabel="observation", ylabel="action")
    if image is not None:
        figure.colorbar(image, ax=axes, label="rank of the score", shrink=0.8)
    return figure
