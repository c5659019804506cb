"""How many solutions of a task a policy still uses: task entropy, after D3IL (arXiv:2402.14606).

Of the evaluation at the end of each finished run whose environment says which solution an episode
was (`evals.mode`). The entropy is that of the solutions among the episodes that have one, in units
of the log of the number of solutions: 1 if all are equally frequent, 0 if there is only one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.load import method_names, read_tasks
from analysis.plots import figure_style, save_figure, write_caption
from analysis.stats import MIN_SEEDS, Estimate, mean_interval
from analysis.tables import markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from results.store import Store

METRICS = {"solved": "episodes with a solution", "entropy": "task entropy"}
"""Measured quantity -> its heading."""


@dataclass(frozen=True)
class Report:
    """What is written about the modes of some trials.

    Attributes:
        numbers: one row per task, method and seed: solved, entropy (nan without a solution),
            episodes, mode_0 ... (shares of the solved episodes; nan beyond the task's), run_id.
        modes: number of solutions of each task, the base of its entropy.
        estimates: (task, method) -> metric -> mean over seeds; None without a value.
        notes: what was left out.
    """

    numbers: pd.DataFrame
    modes: Mapping[str, int]
    estimates: Mapping[tuple[str, str], Mapping[str, Estimate | None]]
    notes: tuple[str, ...]
    seed: int


def entropy(counts: Sequence[int], modes: int) -> float:
    """Entropy of a sample's frequencies to the base of the number of possible solutions.

    nan for an empty sample; 0 if there is one solution only.
    """
    total = sum(counts)
    if not total:
        return float("nan")
    part = np.array([count for count in counts if count], dtype=np.float64) / total
    return abs(float(-(part * np.log(part)).sum() / np.log(modes))) if modes > 1 else 0.0


def build(
    store: Store, trial_ids: Iterable[str] | None = None, modes: int | None = None, seed: int = 0
) -> Report:
    """The modes at the end of the finished runs of some trials.

    Args:
        modes: how many solutions each task has; None: as many as were seen in all of its runs.
        seed: of the bootstrap.
    Raises:
        ValueError: if no run's environment tells modes, or there are more than `modes`.
    """
    import pandas as pd

    ids = None if trial_ids is None else list(trial_ids)
    trials = store.trials(ids).set_index("trial_id", drop=False)
    runs = {trial: run for trial, run in store.statuses(ids).items() if run.status == "done"}
    frame = store.evaluations(run_ids=[run.run_id for run in runs.values()])
    last = frame[frame.step == frame.groupby("run_id").step.transform("max")]
    dataset_of = last.trial_id.map(trials.dataset_id)
    told = dataset_of.isin(dataset_of[last["mode"].notna()])
    if not told.any():
        raise ValueError(
            "no finished run's environment says which solution an episode was (`info['mode']`); "
            "sweep on data of one that does, such as generated/pointmaze/routes-v0"
        )
    last = last[told]
    seen = int(last["mode"].max()) + 1
    if modes is not None and seen > modes:
        raise ValueError(f"{modes} modes were given, but mode {seen - 1} was seen (the first is 0)")
    known = trials.loc[list(dict.fromkeys(last.trial_id))]
    tasks = read_tasks(store, known)
    names, _ = method_names(known, tasks)
    keys = zip(known.dataset_id, known.dataset_digest, known.simulator, strict=True)
    task_of = dict(zip(known.trial_id, (tasks[key].name for key in keys), strict=True))
    highest = last["mode"].groupby(last.trial_id.map(task_of)).max().fillna(0.0)
    counts = {str(task): modes or int(value) + 1 for task, value in highest.items()}
    rows = []
    for trial_id in known.trial_id:
        task = task_of[trial_id]
        part = last[last.trial_id == trial_id]
        found = np.bincount(part["mode"].dropna().astype(int), minlength=counts[task])
        solved = int(found.sum())
        rows.append(
            {
                "task": task,
                "method": names[trial_id],
                "seed": int(known.seed[trial_id]),
                "episodes": len(part),
                "solved": solved / len(part),
                "entropy": entropy(found.tolist(), counts[task]),
                **{f"mode_{i}": n / solved if solved else np.nan for i, n in enumerate(found)},
                "run_id": runs[trial_id].run_id,
            }
        )
    numbers = pd.DataFrame(rows).sort_values(["task", "method", "seed"], ignore_index=True)
    estimates = {
        (str(task), str(method)): {
            name: None if part[name].isna().any() else mean_interval(part[name].tolist(), seed=seed)
            for name in METRICS
        }
        for (task, method), part in numbers.groupby(["task", "method"])
    }
    left = sorted(set(dataset_of[~told]))
    notes = [f"{len(trials) - len(runs)} trials have no finished run"] * (len(trials) > len(runs))
    notes += [f"left out, as its environment tells no modes: {name}" for name in left]
    return Report(numbers, counts, estimates, tuple(notes), seed)


def _shown(estimate: Estimate | None) -> str:
    return "none solved in some seed" if estimate is None else estimate.text()


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: means over seeds with intervals, and mean shares."""
    body = []
    for (task, method), found in report.estimates.items():
        numbers = report.numbers
        own = numbers[(numbers.task == task) & (numbers.method == method)]
        shares = [f"mode_{index}" for index in range(report.modes[task])]
        mean = [f"{value:.2f}" for value in own[shares].mean()]
        body.append([task, method, str(len(own)), *map(_shown, found.values()), "/".join(mean)])
    return ["task", "method", "seeds", *METRICS.values(), "shares of the solutions"], body


def about(report: Report) -> str:
    """How the numbers were made, in a paragraph."""
    episodes = report.numbers.episodes
    several = len(report.modes) > 1
    solutions = ", ".join(
        f"{task}: {count}" if several else str(count) for task, count in report.modes.items()
    )
    span = f"{episodes.min()}" + (f" to {episodes.max()}" if episodes.nunique() > 1 else "")
    return (
        f"Last evaluation of each finished run, {span} episodes. Mean over seeds with its 95 % "
        f"bootstrap interval over seeds (none below {MIN_SEEDS} seeds). Task entropy to the base "
        f"of the task's number of solutions ({solutions}), over the episodes that have one; an "
        "entropy of few episodes is biased down."
    )


def markdown(report: Report) -> str:
    """The numbers as a page."""
    parts = ["# Solutions in use", textwrap.fill(about(report), 100), markdown_table(*rows(report))]
    parts += [textwrap.fill(note, 100) for note in report.notes]
    return "\n\n".join(parts) + "\n"


def figure(report: Report) -> Figure:
    """Mean shares of the solutions over all episodes, a bar for each method."""
    figure_style()
    import matplotlib.pyplot as plt

    labels = list(report.estimates)
    several = len({task for task, _ in labels}) > 1
    drawn, axis = plt.subplots(figsize=(5.5, 0.34 * len(labels) + 1.5), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0.15, 0.9, max(report.modes.values())))
    numbers = report.numbers
    for place, (task, method) in enumerate(labels):
        own = numbers[(numbers.task == task) & (numbers.method == method)]
        left = 0.0
        for index in range(report.modes[task]):
            share = float((own[f"mode_{index}"].fillna(0.0) * own.solved).mean())
            axis.barh(place, share, left=left, color=colours[index], height=0.75)
            left += share
        found = report.estimates[task, method]["entropy"]
        text = "no entropy" if found is None else f"entropy {found.value:.2f}"
        axis.text(1.02, place, text, va="center", fontsize="small")
    names = [f"{method}, {task}" if several else method for task, method in labels]
    axis.set_yticks(range(len(labels)), names)
    axis.set(xlim=(0.0, 1.0), xlabel="share of the episodes, by solution")
    axis.invert_yaxis()
    write_caption(drawn, textwrap.fill(about(report), 90))
    return drawn


def write(report: Report, out: Path) -> list[Path]:
    """Paths of the page, the numbers of each seed, and the figure with its source beside it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "modes.md").write_text(markdown(report), encoding="utf-8")
    report.numbers.to_csv(out / "modes.csv", index=False, lineterminator="\n")
    source: dict[str, Any] = {
        "query": "last evaluation of the finished runs, by mode",
        "interval": f"none drawn; the page has bootstrap intervals, seed {report.seed}",
        "run_ids": sorted(report.numbers.run_id),
    }
    return [
        out / "modes.md",
        out / "modes.csv",
        *save_figure(figure(report), out / "modes", source),
    ]
