"""How likely policies find actions of the data, from what `harness actions` wrote.

Of policies with a density (`data_log_density`); with `--held-out` rows that no learner saw. Means
over rows are per action, in nats per unit of the action's volume, so they compare on one dataset
only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import drawn
from analysis.stats import MIN_SEEDS, Estimate, mean_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """Negative log-likelihoods of a file of actions.

    Attributes:
        numbers: one row per dataset, label and seed: nll (mean over rows), nll_median, rows.
        estimates: (dataset, label) -> mean over seeds of `nll`; None without a density.
        held_out: whether the rows were kept from the learners.
    """

    numbers: pd.DataFrame
    estimates: Mapping[tuple[str, str], Estimate | None]
    held_out: bool
    seed: int


def build(path: Path, seed: int = 0) -> Report:
    """The likelihoods in a file of actions.

    Args:
        seed: of the bootstrap.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if `harness actions` did not write it, or no policy in it has a density.
    """
    import pandas as pd
    from pyarrow import parquet

    frame = drawn.read(path)
    about = json.loads((parquet.read_schema(path).metadata or {}).get(b"harness", b"{}"))
    if not {"label", "dataset_id", "seed", "row"} <= set(frame):
        raise ValueError(f"{path} is not a file of actions; `harness actions` writes one")
    if "data_log_density" not in frame:
        raise ValueError(f"no policy in {path} has a density")
    rows = [
        {
            "dataset_id": dataset,
            "label": label,
            "seed": of,
            "rows": int(part.row.nunique()),
            "nll": -float(part.data_log_density.mean(skipna=False)),
            "nll_median": -float(np.median(part.data_log_density)),
        }
        for (dataset, label, of), part in frame.groupby(["dataset_id", "label", "seed"], sort=False)
    ]
    numbers = pd.DataFrame(rows)
    estimates = {
        (str(dataset), str(label)): None
        if part.nll.isna().any()
        else mean_interval(part.nll.tolist(), seed=seed)
        for (dataset, label), part in numbers.groupby(["dataset_id", "label"], sort=False)
    }
    return Report(numbers, estimates, bool(about.get("held_out", False)), seed)


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; intervals are 95 % bootstrap over seeds."""
    where = "held-out" if report.held_out else "training"
    body = []
    for (dataset, label), found in report.estimates.items():
        own = report.numbers.query("dataset_id == @dataset and label == @label")
        mean, median = "no density", ""
        if found is not None:
            mean = found.text()
            median = f"{own.nll_median.mean():.3f}"
        body.append([dataset, label, str(len(own)), str(own.rows.min()), mean, median])
    return ["dataset", "policy", "seeds", f"{where} rows", "NLL", "its median over rows"], body


def caption(report: Report) -> str:
    """How the numbers were made, in a sentence."""
    return (
        "Negative log-likelihood of the data's actions, nats per action: mean over rows, then over "
        f"seeds with its 95 % bootstrap interval over seeds (none below {MIN_SEEDS} seeds)."
    )
