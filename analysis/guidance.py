"""Generated data against the strength of guidance: dynamics error and likelihood under the policy.

Reads what `harness synthetic --coefs 0,0.3,1,3` wrote. A strength has a curve over the seeds; data
that know no strength (a world model's) are a level beside it. What guidance does, and how its data
are beside a level, is told seed by seed with the intervals and verdicts of `claims`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import drawn
from analysis.claims import Judgement, judge
from analysis.plots import figure_style, palette, save_figure, write_caption
from analysis.stats import MIN_SEEDS, Estimate, mean_interval
from analysis.tables import markdown_table

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


LIKELIER = "policy likelier (nats per action)"
LESS_ERROR = "less dynamics error, last quarter (ratio)"
HEADER = ("claim", "dataset", "data", "strength", "beside", "seeds", "found", "verdict")


@dataclass(frozen=True)
class Comparison:
    """Generated data beside other generated data of the same seeds.

    Attributes:
        beside: label of a level, or "" for the same learner without guidance.
        judgement: of differences of log density in nats; of errors, of their natural logarithms,
            the other's less ours.
    """

    claim: str
    dataset_id: str
    label: str
    coef: float
    beside: str
    seeds: int
    judgement: Judgement


@dataclass(frozen=True)
class Report:
    """Numbers of each trial and strength, and their means over seeds."""

    trials: pd.DataFrame  # dataset_id, label, seed, coef and a column for each of PANELS
    means: pd.DataFrame  # dataset_id, label, coef, quantity, mean, low, high, seeds
    digests: tuple[str, ...]  # sha256 of each file


def read(*files: Path) -> Report:
    """The report of files that `harness synthetic` wrote, of one experiment.

    Raises:
        ValueError: if one is another table, or two have the same trial and strength.
    """
    table = pd.concat([_table(file) for file in files], ignore_index=True)
    keys = ["dataset_id", "label", "seed", "coef"]
    twice = table[table.duplicated([*keys, "index"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"{first.label} on {first.dataset_id}, seed {first.seed}, strength {first.coef} is in "
            f"{', '.join(map(str, files))} more than once"
        )
    horizon = table.groupby(keys, dropna=False)["index"].transform("max") + 1
    late = table[table["index"] >= LATE * horizon]
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
    digests = tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return Report(trials, pd.DataFrame(rows), digests)


def _table(file: Path) -> pd.DataFrame:
    needed = {"dataset_id", "label", "seed", "coef", "index", *PANELS} - {"late_error"}
    return drawn.read(file, sorted(needed), "harness synthetic")


def figure(report: Report) -> Figure:
    """A row for each dataset, a column for each measured quantity."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

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
    strengths = sorted(report.means.coef.dropna().unique())
    for i, dataset_id in enumerate(datasets):
        for j, quantity in enumerate(quantities):
            axis = axes[i, j]
            chosen = (report.means.dataset_id == dataset_id) & (report.means.quantity == quantity)
            for label, rows in report.means[chosen].groupby("label"):
                handles[str(label)] = _draw(axis, rows, colours[label])
            axis.set_xscale("symlog", linthresh=0.1)
            axis.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
            axis.set_xlim(left=-0.02)
            if quantity.endswith("error"):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(PANELS[quantity] if i == 0 else "")
            axis.set_ylabel(dataset_id.replace("/", "/\n", 1) if j == 0 else "", fontsize="small")
            axis.set_xlabel("strength of guidance" if i == len(datasets) - 1 else "")
    made.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4)
    counts = " to ".join(map(str, sorted({*report.means.seeds.agg(["min", "max"])})))
    write_caption(
        made,
        f"Means of {counts} seeds; with {MIN_SEEDS} or more a 95 % "
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


def compare(report: Report, levels: Mapping[str, str] | None = None) -> list[Comparison]:
    """Whether guided data are likelier under the policy, and err less than a level's.

    Args:
        levels: label with strengths -> label of the level that it is compared with.
    Raises:
        ValueError: for a label that is not in the file, or is not of that kind.
    """
    strengths = {"a strength": report.trials.coef.notna(), "no strength": report.trials.coef.isna()}
    for pair in (levels or {}).items():
        for label, (kind, rows) in zip(pair, strengths.items(), strict=True):
            if label not in (known := sorted(report.trials[rows].label.unique())):
                raise ValueError(
                    f"{label!r} has no data with {kind} here; expected one of {', '.join(known)}"
                )
    return list(_comparisons(report.trials, levels or {}))


def _comparisons(trials: pd.DataFrame, levels: Mapping[str, str]) -> Iterator[Comparison]:
    guided = trials[trials.coef > 0].groupby(["dataset_id", "label", "coef"])
    key: tuple[str, str, float]
    for key, rows in guided:  # type: ignore[assignment]
        dataset_id, label, coef = key
        of_dataset = trials[trials.dataset_id == dataset_id]
        without = of_dataset[(of_dataset.label == label) & (of_dataset.coef == 0)]
        found = [(LIKELIER, "", without)]
        if label in levels:
            level = of_dataset[of_dataset.label == levels[label]]
            found += [(claim, levels[label], level) for claim in (LESS_ERROR, LIKELIER)]
        for claim, beside, others in found:
            differences = _differences(rows, others, claim)
            yield Comparison(
                claim, dataset_id, label, coef, beside, len(differences), judge([differences])
            )


def _differences(ours: pd.DataFrame, theirs: pd.DataFrame, claim: str) -> list[float]:
    """By seed, positive where the claim holds."""
    name = "late_error" if claim == LESS_ERROR else "log_density"
    both = ours.merge(theirs, on="seed", suffixes=("", "_other")).dropna(
        subset=[name, f"{name}_other"]
    )
    if claim == LESS_ERROR:
        return [math.log(b / a) for a, b in zip(both[name], both[f"{name}_other"], strict=True)]
    return (both[name] - both[f"{name}_other"]).tolist()


def rows(comparisons: Iterable[Comparison]) -> list[list[str]]:
    """A row of text for each, under `HEADER`, ordered by claim."""
    ordered = sorted(comparisons, key=lambda c: (c.claim, c.beside, c.dataset_id, c.label, c.coef))
    return [
        [
            *(c.claim, c.dataset_id, c.label, f"{c.coef:g}", c.beside or "no guidance"),
            *(str(c.seeds), _found(c), c.judgement.verdict),
        ]
        for c in ordered
    ]


def _found(comparison: Comparison) -> str:
    difference = comparison.judgement.difference
    if difference is None:
        return "–"
    if comparison.claim != LESS_ERROR:
        return difference.text(form="g", sign="+")
    low, high = (None if bound is None else math.exp(bound)
                 for bound in (difference.low, difference.high))  # fmt: skip
    return Estimate(math.exp(difference.value), low, high).text(form="g")


def markdown(report: Report, comparisons: Sequence[Comparison]) -> str:
    """The table, and how to read it."""
    caption = (
        "Differences seed by seed with 95 % t intervals; holds: the interval is above 0 (above 1 "
        "for ratios, which are the other's error over ours, means of logarithms). Not corrected "
        f"for their number ({len(comparisons)}). sha256 of what was measured: "
        f"{', '.join(report.digests)}."
    )
    table = markdown_table(list(HEADER), rows(comparisons))
    return "\n\n".join(("# Generated data", table, caption)) + "\n"


def write(report: Report, out: Path, comparisons: Sequence[Comparison] = ()) -> list[Path]:
    """Paths of the numbers, the page, and of the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "guidance.md"
    page.write_text(markdown(report, comparisons), encoding="utf-8")
    tables = {"guidance.csv": report.means, "guidance_trials.csv": report.trials}
    for name, table in tables.items():
        table.to_csv(out / name, index=False, lineterminator="\n")
    source = {
        "files_sha256": list(report.digests),
        "numbers": json.loads(report.means.to_json(orient="records")),
    }
    return [
        page,
        *(out / name for name in tables),
        *save_figure(figure(report), out / "guidance", source),
    ]
