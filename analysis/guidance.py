"""Generated data against the strength of guidance: dynamics error and likelihood under the policy.

Reads what `harness synthetic --coefs 0,0.3,1,3` wrote. A strength has a curve over the seeds; data
that know no strength (a world model's) are a level beside it. Owns numbers and picture, no verdict.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.plots import figure_style, palette, save_figure, write_caption
from analysis.stats import MIN_SEEDS, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "dynamics_error": "dynamics error",
    "late_error": "of the last quarter",
    "log_density": "log pi(a | s)",
    "behaviour_distance": "distance to the data",
    "coverage": "coverage of the data",
    "reward_error": "reward error",
}
"""Measured quantity -> its heading."""
LATE = 0.75  # the last quarter of the horizon, where errors that compound show


@dataclass(frozen=True)
class Report:
    """Numbers of each trial and strength, and their means over seeds."""

    trials: pd.DataFrame  # dataset_id, label, seed, coef and a column for each of PANELS
    means: pd.DataFrame  # dataset_id, label, coef, quantity, mean, low, high, seeds
    digest: str  # sha256 of the file


def read(file: Path) -> Report:
    """The report of a file that `harness synthetic` wrote.

    Raises:
        ValueError: if it is another table.
    """
    table = pd.read_parquet(file)
    needed = {"dataset_id", "label", "seed", "coef", "index", *PANELS} - {"late_error"}
    if missing := sorted(needed - set(table.columns)):
        raise ValueError(
            f"{file} lacks the columns {', '.join(missing)}; expected a file that "
            "`harness synthetic` wrote"
        )
    keys = ["dataset_id", "label", "seed", "coef"]
    late = table[table["index"] >= LATE * (table["index"].max() + 1)]
    trials = table.groupby(keys, dropna=False)[[c for c in PANELS if c != "late_error"]].mean()
    trials["late_error"] = late.groupby(keys, dropna=False)["dynamics_error"].mean()
    trials = trials.reset_index()
    rows: list[dict[str, Any]] = []
    for (dataset_id, label, coef), group in trials.groupby([*keys[:2], "coef"], dropna=False):
        for quantity in PANELS:
            values = group[quantity].dropna().tolist()
            if values:
                found = mean_interval(values)
                rows.append(
                    {
                        "dataset_id": dataset_id,
                        "label": label,
                        "coef": coef,
                        "quantity": quantity,
                        "mean": found.value,
                        "low": found.low,
                        "high": found.high,
                        "seeds": len(values),
                    }
                )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Report(trials, pd.DataFrame(rows), digest)


def figure(report: Report) -> Figure:
    """A row for each dataset, a column for each measured quantity."""
    import matplotlib.pyplot as plt

    figure_style()
    datasets = sorted(report.means.dataset_id.unique())
    quantities = [name for name in PANELS if name in set(report.means.quantity)]
    colours = palette(sorted(report.means.label.unique()))
    made, axes = plt.subplots(
        len(datasets),
        len(quantities),
        figsize=(2.3 * len(quantities), 2.1 * len(datasets) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for i, dataset_id in enumerate(datasets):
        for j, quantity in enumerate(quantities):
            axis = axes[i, j]
            chosen = (report.means.dataset_id == dataset_id) & (report.means.quantity == quantity)
            for label, rows in report.means[chosen].groupby("label"):
                handles[str(label)] = _draw(axis, rows, colours[label])
            axis.set_xscale("symlog", linthresh=0.1)
            if quantity.endswith("error"):
                axis.set_yscale("log")
            axis.set_title(PANELS[quantity] if i == 0 else "")
            axis.set_ylabel(dataset_id if j == 0 else "")
            axis.set_xlabel("strength of guidance" if i == len(datasets) - 1 else "")
    made.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4)
    counts = report.means.seeds
    write_caption(
        made,
        f"Mean of {counts.min()} to {counts.max()} seeds; with {MIN_SEEDS} or more a 95 % "
        "bootstrap interval. Dashed: data without a strength. Errors are squared, standardised.",
    )
    return made


def _draw(axis: Any, rows: pd.DataFrame, colour: Any) -> Any:
    level = rows[rows.coef.isna()]
    if len(level):
        (row,) = level.itertuples()
        if row.low is not None and row.low == row.low:
            axis.axhspan(row.low, row.high, color=colour, alpha=0.15)
        return axis.axhline(row.mean, color=colour, linestyle="--")
    rows = rows.sort_values("coef")
    (line,) = axis.plot(rows.coef, rows["mean"], color=colour, marker="o", markersize=3)
    if rows.low.notna().all():
        low, high = rows.low.astype(float), rows.high.astype(float)
        axis.fill_between(rows.coef, low, high, color=colour, alpha=0.2)
    return line


def write(report: Report, out: Path) -> list[Path]:
    """Paths of the numbers and of the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {"guidance.csv": report.means, "guidance_trials.csv": report.trials}
    for name, table in tables.items():
        table.to_csv(out / name, index=False, lineterminator="\n")
    source = {
        "file_sha256": report.digest,
        "numbers": json.loads(report.means.to_json(orient="records")),
    }
    return [
        *(out / name for name in tables),
        *save_figure(figure(report), out / "guidance", source),
    ]
