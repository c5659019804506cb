"""Figures: learning curves, aggregate intervals, score against latency, as PDF and PNG.

Every figure has a JSON file of the same name: the query, the runs and seeds behind it, and how
its intervals were made. Files are byte-stable for equal input.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.curves import REPS as CURVE_REPS
from analysis.curves import Curve, mean_curves
from analysis.leaderboard import REPS, Leaderboard, build
from analysis.load import evaluation_frame, latency_frame, numbered
from analysis.stats import METRICS, MIN_SEEDS, curve_interval
from results.store import Store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PANEL_INCHES = (3.6, 2.7)
FEW_TICKS = 6
COLUMNS = 3
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # for print
SERIES_COLOURS = (
    *("#0173b2", "#de8f05", "#029e73", "#d55e00"),
    *("#cc78bc", "#ca9161", "#56b4e9", "#949494"),
)
"""Eight colours that colour-blind readers tell apart, on white and on black (seaborn's, without
its pink twin and its yellow); further series repeat them with another of `DASHES`."""
DASHES = ("", "6 3", "2 2", "8 3 2 3")
MARKERS = {"o": "circle", "s": "square", "^": "triangle", "D": "diamond"}  # of conditions


def write_figures(
    store: Store,
    out: Path,
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
    seed: int = 0,
) -> list[Path]:
    """Paths of the figures drawn from the finished runs of some trials (None: all).

    Args:
        select: the evaluation that counts in the aggregate figure.
        seed: of the bootstrap.
    Raises:
        ValueError: if there is nothing to draw.
    """
    ids = None if trial_ids is None else list(trial_ids)
    curves = evaluation_frame(store, ids)
    if curves.empty:
        raise ValueError("no finished run to draw; run a sweep first, or check `harness status`")
    board = build(store, ids, select, seed)
    written = save_figure(
        learning_curves(curves, board, seed),
        out / "learning_curves",
        _curve_source(curves, board, seed),
    )
    if any(row.estimates for row in board.rows):
        written += save_figure(aggregate_intervals(board), out / "aggregates", _board_source(board))
    points = latency_points(board, latency_frame(store, ids), seed)
    if points:
        written += save_figure(
            score_latency(points, board), out / "score_latency", _latency_source(points, board)
        )
    return written


def palette(methods: Sequence[str]) -> dict[str, Any]:
    """Method -> colour, distinguishable by colour-blind readers, the same in every figure."""
    import seaborn as sns

    colours = sns.color_palette("colorblind", max(len(methods), 1))  # cycles after ten
    return dict(zip(sorted(methods), colours, strict=False))


def line_style(place: int) -> Any:
    """The line of the method at `place`; another one from the colours' second round on."""
    return LINE_STYLES[(place + place // 10) % len(LINE_STYLES)]


def figure_style() -> None:
    import matplotlib as mpl
    import seaborn as sns

    mpl.use("Agg")
    sns.set_theme(context="paper", style="ticks", font_scale=0.95)
    mpl.rcParams |= {
        "pdf.fonttype": 42,  # editable text, as conferences ask for
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.6,
        "legend.frameon": False,
        "svg.hashsalt": "offline-rl-harness",
    }


def learning_curves(frame: pd.DataFrame, board: Leaderboard, seed: int = 0) -> Figure:
    """One panel a task, one line a method: mean over seeds and its 95 % bootstrap interval.

    Methods with fewer than three seeds in a task are drawn without an interval, each seed as a
    thin line.
    """
    figure_style()
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    tasks = {task.name: task for task in board.tasks}
    names = [name for name in tasks if (frame.task == name).any()]
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    methods = sorted(frame.method.unique())
    colours = palette(methods)
    curves = mean_curves(frame, seed)
    for axis, name in zip(axes.flat, names, strict=False):
        scale = 100.0 if tasks[name].normalized else 1.0
        for place, method in enumerate(methods):
            if (method, name) in curves:
                style = {"color": colours[method], "linestyle": line_style(place)}
                draw_curve(axis, curves[method, name], scale, style, method)
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("gradient steps")
        axis.set_ylabel("normalised score x 100" if tasks[name].normalized else "episode return")
        axis.set_xlim(left=0)
        shown = [curves[key] for key in curves if key[1] == name]
        steps = sorted({step for curve in shown for step in curve.steps})
        few = 0 < len(steps) <= FEW_TICKS  # each evaluation has its tick
        axis.xaxis.set_major_locator(FixedLocator(steps) if few else MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(step_label))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    draw_legend(figure, axes.flat[: len(names)])
    write_caption(figure, _curve_caption(frame, board, width=75 * columns))
    return figure


def draw_curve(axis: Any, curve: Curve, scale: float, style: dict[str, Any], label: str) -> None:
    """Mean and interval; thin lines for seeds that are too few for one."""
    if not curve.steps:
        return
    if curve.bounds is not None:
        low, high = (scale * np.array(bound) for bound in curve.bounds)
        axis.fill_between(curve.steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    elif len(curve.seeds) > 1:
        for points in curve.seeds.values():
            shown = [(step, scale * value) for step, value in points if step in curve.steps]
            axis.plot(*zip(*shown, strict=True), color=style["color"], linewidth=0.6, alpha=0.5)
    few = {"marker": "o"} if len(curve.steps) <= 10 else {}
    mean = scale * np.array(curve.mean)
    usual = {"linewidth": 1.5, "markersize": 3.5}
    axis.plot(curve.steps, mean, label=label, **{**usual, **style, **few})


def step_label(value: float, position: int = 0) -> str:
    """Gradient steps, short: 20k, 1.5M. The second argument is matplotlib's."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw_legend(figure: Figure, axes: Iterable[Any], columns: int = 4) -> None:
    """One legend above all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside upper center",
        ncols=min(columns, len(found)),
    )


def write_caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize="x-small", color="0.35", x=0.01, ha="left")


def _curve_caption(frame: pd.DataFrame, board: Leaderboard, width: int) -> str:
    counts = frame.groupby(["task", "method"]).seed.nunique()
    seeds = _range(counts.min(), counts.max())
    evaluation = [line for line in board.caption if line.startswith("Evaluation")]
    missing = board.incomplete()
    lines = [
        f"Mean over {numbered(seeds, 'seed')} of each evaluation's mean return; bands: 95 % "
        f"bootstrap over seeds (none below {MIN_SEEDS}). Every evaluation is drawn; none was "
        "selected.",
        *(f"{line}." for line in evaluation),
        *([f"Seeds not drawn: {'; '.join(missing[:3])}"] if missing else []),
    ]
    if len(missing) > 3:
        lines[-1] += "; ... (all in the JSON file)"
    return "\n".join(textwrap.fill(line, width) for line in lines)


def aggregate_intervals(board: Leaderboard) -> Figure:
    """Point and 95 % interval of every aggregate metric, one row a method."""
    figure_style()
    import matplotlib.pyplot as plt

    rows = [row for row in board.rows if row.estimates]
    colours = palette([row.method for row in board.rows])
    figure, axes = plt.subplots(
        1,
        len(METRICS),
        figsize=(2.2 * len(METRICS) + 1.0, 0.42 * len(rows) + 1.5),
        sharey=True,
        layout="constrained",
    )
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, row in enumerate(reversed(rows)):
            assert row.estimates is not None  # rows were chosen for having them
            estimate = row.estimates[metric]
            colour = colours[row.method]
            if estimate.low is not None and estimate.high is not None:
                axis.barh(
                    place,
                    100 * (estimate.high - estimate.low),
                    left=100 * estimate.low,
                    height=0.55,
                    color=colour,
                    alpha=0.45,
                    linewidth=0,
                )
            axis.plot([100 * estimate.value] * 2, [place - 0.3, place + 0.3], color=colour, lw=2)
        better = "lower is better" if metric == "Optimality gap" else "higher is better"
        axis.set_title(f"{metric}\n({better})", fontsize="small")
        axis.set_yticks(range(len(rows)), [row.method for row in reversed(rows)])
        axis.tick_params(axis="y", length=0)
        axis.use_sticky_edges = False  # bars would else be cut where they begin
        axis.margins(x=0.12)
        axis.grid(visible=False, axis="y")
    low = min(row.seeds[0] for row in rows if row.seeds)
    high = max(row.seeds[1] for row in rows if row.seeds)
    drawn = any(row.estimates[m].low is not None for row in rows if row.estimates for m in METRICS)
    interval = "; 95 % stratified bootstrap over seeds" if drawn else ""
    rule = "BEST evaluation of each run (chosen by test rollouts)"
    if board.scores.select != "best":
        rule = f"protocol {board.scores.select}"
    write_caption(
        figure,
        f"Normalised score x 100 over {numbered(len(board.aggregated), 'task')}, "
        f"{numbered(_range(low, high), 'seed')}, {rule}{interval}.",
    )
    return figure


@dataclass(frozen=True)
class LatencyPoint:
    """One method on one task under one condition of measuring.

    Attributes:
        condition: processor, threads, compiled or not; times under another do not compare.
        ms: per action at batch 1, median over the measured runs.
        ms_range: lowest and highest median of a round of any of these runs.
        score: mean over the seeds of the task's scores; `interval` is its 95 % bootstrap interval.
        run_ids: the runs whose latency was measured, a part of those behind the score.
    """

    task: str
    method: str
    condition: str
    ms: float
    ms_range: tuple[float, float]
    score: float
    interval: tuple[float, float] | None
    seeds: int
    run_ids: tuple[str, ...]


def latency_points(board: Leaderboard, frame: pd.DataFrame, seed: int = 0) -> list[LatencyPoint]:
    """What `score_latency` draws: methods with a score and with a latency at batch 1.

    Args:
        frame: of `analysis.load.latency_frame`.
        seed: of the bootstrap.
    """
    points = []
    for (method, task), cell in sorted(board.scores.cells.items()):
        own = frame[frame.run_id.isin(cell.run_ids) & (frame.batch == 1)]
        for condition, part in own.groupby("condition"):
            scores = np.array([score for _, score in sorted(cell.scores.items())])
            bounds = curve_interval(scores[:, None], CURVE_REPS, seed)
            points.append(
                LatencyPoint(
                    task=task,
                    method=method,
                    condition=str(condition),
                    ms=float(part.ms.median()),
                    ms_range=(float(part.ms_low.min()), float(part.ms_high.max())),
                    score=float(scores.mean()),
                    interval=None if bounds is None else (float(bounds[0][0]), float(bounds[1][0])),
                    seeds=len(scores),
                    run_ids=tuple(sorted(part.run_id)),
                )
            )
    return points


def score_latency(points: Sequence[LatencyPoint], board: Leaderboard) -> Figure:
    """One panel a task: score against milliseconds per action at batch 1, a point a method."""
    figure_style()
    import matplotlib.pyplot as plt

    tasks = {task.name: task for task in board.tasks}
    names = [name for name in tasks if any(point.task == name for point in points)]
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    conditions = sorted({point.condition for point in points})
    markers = dict(zip(conditions, itertools.cycle(MARKERS), strict=False))
    colours = palette(board.scores.methods)
    for axis, name in zip(axes.flat, names, strict=False):
        scale = 100.0 if tasks[name].normalized else 1.0
        for point in points:
            if point.task == name:
                marker = markers[point.condition]
                draw_point(axis, point, scale, colours[point.method], marker)
        axis.set_xscale("log")
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("ms per action, batch 1")
        axis.set_ylabel("normalised score x 100" if tasks[name].normalized else "episode return")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    draw_legend(figure, axes.flat[: len(names)])
    where = "; ".join(f"{each} ({MARKERS[markers[each]]})" for each in conditions)
    text = (
        "Median time of one seed's act() from tensors to tensors, environment not included; bars: "
        f"lowest and highest median of a round. Measured on {where}. "
        f"Score: protocol {board.scores.select}, mean over seeds, 95 % bootstrap over seeds "
        f"(none below {MIN_SEEDS})."
    )
    write_caption(figure, textwrap.fill(text, 75 * columns))
    return figure


def draw_point(axis: Any, point: LatencyPoint, scale: float, colour: Any, marker: str) -> None:
    low, high = point.ms_range
    error: dict[str, Any] = {"xerr": [[max(0.0, point.ms - low)], [max(0.0, high - point.ms)]]}
    if point.interval is not None:
        below, above = (abs(scale * (bound - point.score)) for bound in point.interval)
        error["yerr"] = [[below], [above]]
    axis.errorbar(
        point.ms,
        scale * point.score,
        **error,
        fmt=marker,
        color=colour,
        markersize=4.5,
        elinewidth=1.0,
        label=point.method,
    )


def _latency_source(points: Sequence[LatencyPoint], board: Leaderboard) -> dict[str, Any]:
    return {
        "query": f"protocol {board.scores.select} of done runs; newest latency of each at batch 1",
        "interval": f"score: 95 % percentile bootstrap over seeds, {CURVE_REPS} resamples; "
        "latency: range of the rounds' medians",
        "points": [dataclasses.asdict(point) for point in points],
    }


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _curve_source(frame: pd.DataFrame, board: Leaderboard, seed: int) -> dict[str, Any]:
    lines = []
    for (task, method), part in frame.groupby(["task", "method"]):
        lines.append(
            {
                "task": task,
                "method": method,
                "variant_id": part.variant_id.iloc[0],
                "seeds": sorted(int(s) for s in part.seed.unique()),
                "trial_ids": sorted(part.trial_id.unique()),
                "run_ids": sorted(part.run_id.unique()),
            }
        )
    interval = f"95 % percentile bootstrap over seeds, {CURVE_REPS} resamples, seed {seed}"
    return {
        "query": "all evaluations of done runs",
        "interval": interval,
        "lines": lines,
        "not_drawn": board.incomplete(),
        "protocol": list(board.caption),
    }


def _board_source(board: Leaderboard) -> dict[str, Any]:
    cells = board.scores.cells
    return {
        "query": f"protocol {board.scores.select} of done runs",
        "interval": f"95 % stratified bootstrap over seeds, {REPS} resamples, seed {board.seed}",
        "tasks": [task.name for task in board.aggregated],
        "methods": [
            {
                "method": row.method,
                "run_ids": sorted(
                    run for task in board.aggregated for run in cells[row.method, task.name].run_ids
                ),
            }
            for row in board.rows
            if row.estimates
        ],
        "left_out": {row.method: list(row.gaps) for row in board.rows if not row.estimates},
    }


def save_figure(
    figure: Figure, stem: Path, source: dict[str, Any], suffixes: Sequence[str] = (".pdf", ".png")
) -> list[Path]:
    """Writes and closes a figure; its source becomes a JSON file beside it. No dates in files."""
    import matplotlib.pyplot as plt

    stem.parent.mkdir(parents=True, exist_ok=True)
    undated: dict[str, dict[str, Any]] = {
        ".pdf": {"metadata": {"CreationDate": None}},
        ".svg": {"metadata": {"Date": None}},
        ".png": {"metadata": {"Software": None}, "dpi": 200},
    }
    paths = [stem.with_suffix(suffix) for suffix in (*suffixes, ".json")]
    for path in paths[:-1]:
        figure.savefig(path, **undated[path.suffix])
    plt.close(figure)
    paths[-1].write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return paths
