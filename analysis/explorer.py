"""Datasets behind results: their stored cards as a table and a figure of their returns.

Owns no data: what it shows was recorded when trials were planned (`harness data card` makes it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from results.store import Store

QUANTILES = ("min", "q25", "median", "q75", "max")


def card_frame(store: Store) -> pd.DataFrame:
    """One row per dataset and content: size, returns, references, relation and known defects."""
    import pandas as pd

    rows = []
    for row in store.datasets().to_dict("records"):
        card: dict[str, Any] = row["card"]
        returns = card.get("returns", {})
        rows.append(
            {
                "dataset": row["dataset_id"],
                "digest": row["digest"][:12],
                "relation": row["relation"],
                "environment": row["env_id"],
                "steps": row["num_steps"],
                "episodes": row["num_episodes"],
                **{f"return_{name}": returns.get(name) for name in ("mean", *QUANTILES)},
                "ref_min": row["ref_min"],
                "ref_max": row["ref_max"],
                "mean_score": card.get("normalized_mean_return"),  # trajectory quality, TQ
                "cells_per_pair": card.get("coverage", {}).get("cells_per_pair"),
                "defects": "; ".join(card.get("defects", ())),
            }
        )
    return pd.DataFrame(rows)


def returns_figure(frame: pd.DataFrame) -> Figure:
    """Returns of each dataset's episodes: range, middle half, median, and both references.

    Args:
        frame: of `card_frame`.
    Raises:
        ValueError: if no dataset has its returns stored.
    """
    known = frame[frame.return_mean.notna()]
    if known.empty:
        raise ValueError("no stored card has returns; plan a sweep on the dataset first")
    plots.figure_style()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(known), 1, figsize=(5.5, 0.8 * len(known) + 0.6), squeeze=False, layout="constrained"
    )
    rows: list[Any] = list(known.itertuples())
    for axis, row in zip(axes.flat, rows, strict=True):
        colour = plots.SERIES_COLOURS[0]
        axis.plot([row.return_min, row.return_max], [0, 0], color=colour, linewidth=1.2)
        width = row.return_q75 - row.return_q25
        axis.barh(0, width, left=row.return_q25, height=0.5, color=colour, alpha=0.4, linewidth=0)
        axis.plot([row.return_median] * 2, [-0.3, 0.3], color=colour, linewidth=2)
        for reference in (row.ref_min, row.ref_max):
            if reference == reference:  # nan: there is none
                axis.axvline(reference, color="0.4", linestyle=":", linewidth=0.9)
        axis.set_yticks([0], [row.dataset])
        axis.set_ylim(-0.6, 0.6)
        axis.grid(visible=False, axis="y")
    axes.flat[-1].set_xlabel("episode return (dotted: references)")
    return figure
