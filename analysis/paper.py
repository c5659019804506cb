"""Figures for papers: a venue's widths and type sizes, one folder for each track.

Each figure is PDF (type 42 fonts), SVG and PNG, beside its data as CSV and a JSON file with the
command, the runs and how its intervals were made. Files are byte-stable for equal input. Nothing
is written into a figure that belongs into its caption; the caption's facts are in the JSON file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import plots, stats, tuning
from analysis.curves import REPS as CURVE_REPS
from analysis.curves import mean_curves
from analysis.leaderboard import Leaderboard, build
from analysis.load import evaluation_frame, latency_frame, trials_to_show
from analysis.plots import LINE_STYLES, SERIES_COLOURS
from analysis.tracks import Track, split

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from results.store import Store


@dataclass(frozen=True)
class Style:
    """A venue's template: widths in inches, sizes in points."""

    text_width: float
    column_width: float  # of a figure beside text; the text width where there is one column
    font_size: float
    small_size: float


STYLES = {
    "neurips": Style(5.5, 5.5, 9.0, 8.0),  # neurips_20xx.sty: 5.5 in text, 10 pt
    "icml": Style(6.75, 3.25, 9.0, 8.0),  # icml20xx.sty: two columns of 3.25 in, 0.25 in apart
    "iclr": Style(5.5, 5.5, 9.0, 8.0),  # iclr20xx_conference.sty: 5.5 in text, 10 pt
}
SUFFIXES = (".pdf", ".svg", ".png")
MAX_PAIRS = 10  # more are drawn as the best-ranked method against each other one
PULLS = 100
THRESHOLDS = 101
THIN: dict[str, Any] = {"linewidth": 1.2, "markersize": 2.0}
LEGEND_INCHES = 1.3  # of an entry


@dataclass(frozen=True)
class _Material:
    """What the figures of one track are drawn from."""

    track: Track
    style: Style
    board: Leaderboard
    evaluations: pd.DataFrame
    latencies: pd.DataFrame
    policies: dict[tuple[str, str], list[list[float]]]
    seed: int

    @property
    def ranked(self) -> list[str]:
        """Methods with aggregates, best first."""
        return [row.method for row in self.board.rows if row.estimates]

    def look(self, method: str) -> dict[str, Any]:
        """Colour and line of a method, the same in every figure of the track."""
        return series_style(sorted(self.board.scores.methods).index(method))

    def scores(self, method: str) -> list[list[float]]:
        return self.board.scores.matrix(method, self.board.aggregated)


Drawn = tuple["Figure", "pd.DataFrame", str]  # the figure, its data, how its intervals were made


def write(
    store: Store,
    out: Path,
    style: str,
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
    seed: int = 0,
    command: str = "",
) -> list[Path]:
    """Paths of the figures of some trials (None: all that ran).

    Args:
        out: figures of several tracks get a folder each in it.
        style: one of `STYLES`.
        select: the evaluation that counts where scores are not drawn over steps.
        seed: of the bootstraps.
        command: what is recorded as having made them.
    Raises:
        ValueError: if the style is unknown or there is no finished run.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r}; expected one of {', '.join(STYLES)}")
    ids = None if trial_ids is None else list(trial_ids)
    trials = trials_to_show(store, ids)
    done = store.runs(ids).query("status == 'done'").trial_id
    tracks = [(track, part) for track, part in split(trials) if part.trial_id.isin(done).any()]
    if not tracks:
        raise ValueError("no finished run to draw; run a sweep first, or check `harness status`")
    written = []
    for track, part in tracks:
        folder = out / track.slug if len(tracks) > 1 else out
        material = _gather(store, track, STYLES[style], list(part.trial_id), select, seed)
        for name, draw in FIGURES.items():
            with _typography(STYLES[style]):
                drawn = draw(material)
                if drawn is None:
                    continue
                figure, data, interval = drawn
                source = _source(material, style, command, interval)
                written += plots.save_figure(figure, folder / name, source, SUFFIXES)
            written.append(folder / f"{name}.csv")
            data.to_csv(written[-1], index=False, lineterminator="\n")
    return written


def series_style(place: int) -> dict[str, Any]:
    """Eight colours, then the same with another line."""
    line = LINE_STYLES[place // len(SERIES_COLOURS) % len(LINE_STYLES)]
    return {"color": SERIES_COLOURS[place % len(SERIES_COLOURS)], "linestyle": line}


def _gather(
    store: Store, track: Track, style: Style, ids: list[str], select: str, seed: int
) -> _Material:
    board = build(store, ids, select, seed)
    return _Material(
        track=track,
        style=style,
        board=board,
        evaluations=evaluation_frame(store, ids),
        latencies=latency_frame(store, ids),
        policies=tuning.policies(store, ids),
        seed=seed,
    )


def _typography(style: Style) -> Any:
    import matplotlib as mpl

    plots.figure_style()
    return mpl.rc_context(
        {
            "font.family": "STIXGeneral",  # Times-like, and comes with matplotlib
            "mathtext.fontset": "stix",
            "font.size": style.font_size,
            "axes.titlesize": style.font_size,
            "axes.labelsize": style.font_size,
            "legend.fontsize": style.small_size,
            "xtick.labelsize": style.small_size,
            "ytick.labelsize": style.small_size,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "lines.linewidth": 1.2,
            "figure.constrained_layout.h_pad": 0.03,
            "figure.constrained_layout.w_pad": 0.03,
        }
    )


def _source(material: _Material, style: str, command: str, interval: str) -> dict[str, Any]:
    cells = material.board.scores.cells
    return {
        "command": command,
        "style": style,
        "track": material.track.title,
        "protocol": list(material.board.caption),
        "interval": interval,
        "notes": [*material.board.notes, *material.board.incomplete()],
        "runs": {
            method: {
                task.name: list(cells[method, task.name].run_ids)
                for task in material.board.tasks
                if (method, task.name) in cells
            }
            for method in material.board.scores.methods
        },
    }


# -------------------------------------------------------------------------------------- figures


def _learning_curves(m: _Material) -> Drawn | None:
    import pandas as pd
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curves = mean_curves(m.evaluations, m.seed)
    tasks = [task for task in m.board.tasks if any(name == task.name for _, name in curves)]
    columns = _columns(m.style, len(tasks))
    figure, axes = _panels(m.style, len(tasks), columns)
    rows = []
    for axis, task in zip(axes, tasks, strict=False):
        scale = 100.0 if task.normalized else 1.0
        for method in sorted({name for name, where in curves if where == task.name}):
            curve = curves[method, task.name]
            plots.draw_curve(axis, curve, scale, {**m.look(method), **THIN}, method)
            low, high = curve.bounds or (itertools.repeat(math.nan), itertools.repeat(math.nan))
            for values in zip(curve.steps, curve.mean, low, high, strict=False):
                rows.append((task.name, method, len(curve.seeds), _unit(task), *values))
        axis.set_title(_short(task.name))
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(plots.step_label))
    _outer_labels(axes, columns, "gradient steps", _axis_label(tasks))
    _legend(figure, axes)
    names = ["task", "method", "seeds", "unit", "step", "mean", "low", "high"]
    return (
        figure,
        pd.DataFrame(rows, columns=names),
        f"bands: 95 % percentile bootstrap over seeds, {CURVE_REPS} resamples, none below "
        f"{stats.MIN_SEEDS} seeds",
    )


def _aggregates(m: _Material) -> Drawn | None:
    import pandas as pd

    if not m.ranked:
        return None
    figure, axes = _panels(
        m.style, len(stats.METRICS), len(stats.METRICS), 0.16 * len(m.ranked) + 0.5
    )
    rows = []
    for axis, metric in zip(axes, stats.METRICS, strict=True):
        for place, row in enumerate(row for row in reversed(m.board.rows) if row.estimates):
            assert row.estimates is not None  # rows were chosen for having them
            found, colour = row.estimates[metric], m.look(row.method)["color"]
            rows.append((row.method, metric, found.value, found.low, found.high))
            if found.low is not None and found.high is not None:
                ends = (100 * found.low, 100 * found.high)
                axis.barh(place, ends[1] - ends[0], left=ends[0], height=0.6, color=colour,
                          alpha=0.5, linewidth=0)  # fmt: skip
            axis.plot([100 * found.value] * 2, [place - 0.3, place + 0.3], color=colour, lw=1.5)
        axis.set_title(f"{metric} {'↓' if metric == 'Optimality gap' else '↑'}")
        axis.set_yticks(range(len(m.ranked)), m.ranked[::-1] if axis is axes[0] else [])
        axis.tick_params(axis="y", length=0)
        axis.use_sticky_edges = False
        axis.margins(x=0.12)
        axis.grid(visible=False, axis="y")
    figure.supxlabel("normalised score × 100", fontsize=m.style.font_size)
    data = pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high"])
    return figure, data, "95 % percentile intervals, stratified bootstrap over seeds"


def _profiles(m: _Material) -> Drawn | None:
    import pandas as pd

    if not m.ranked:
        return None
    every = [value for method in m.ranked for task in m.scores(method) for value in task]
    at = np.linspace(min(0.0, *every), max(every), THRESHOLDS)
    figure, (axis,) = _panels(m.style, 1, 1, 1.9, column=True)
    rows = []
    for method in m.ranked:
        profile = stats.performance_profile(m.scores(method), at.tolist(), seed=m.seed)
        look = m.look(method)
        axis.plot(100 * at, profile.value, label=method, **look)
        bounds = (profile.low, profile.high)
        if bounds[0] is not None and bounds[1] is not None:
            axis.fill_between(100 * at, *bounds, color=look["color"], alpha=0.18, linewidth=0)
        low, high = (np.full(len(at), np.nan) if b is None else b for b in bounds)
        rows += [(method, *values) for values in zip(at, profile.value, low, high, strict=True)]
    axis.set(
        xlabel="normalised score × 100 (threshold)", ylabel="share of runs above", ylim=(0, 1.02)
    )
    _legend(figure, [axis])
    data = pd.DataFrame(rows, columns=["method", "threshold", "share", "low", "high"])
    return figure, data, "bands: pointwise 95 % percentile bootstrap over seeds"


def _improvement(m: _Material) -> Drawn | None:
    import pandas as pd

    comparison = m.board.comparison
    if comparison is None:
        return None
    pairs = list(comparison.pairs)
    if len(pairs) > MAX_PAIRS:
        pairs = [pair for pair in pairs if pair.x == comparison.ranks[0].method]
    figure, (axis,) = _panels(m.style, 1, 1, 0.19 * len(pairs) + 0.45, column=True)
    for place, pair in enumerate(reversed(pairs)):
        found, colour = pair.probability, m.look(pair.x)["color"]
        if found.low is not None and found.high is not None:
            axis.barh(place, found.high - found.low, left=found.low, height=0.6, color=colour,
                      alpha=0.5, linewidth=0)  # fmt: skip
        axis.plot([found.value] * 2, [place - 0.3, place + 0.3], color=colour, lw=1.5)
    axis.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(pairs)), [f"{p.x} > {p.y}" for p in reversed(pairs)])
    axis.set(xlim=(-0.02, 1.02), xlabel="probability of improvement")
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    rows = [(p.x, p.y, *vars(p.probability).values(), p.p_value, p.adjusted)
            for p in comparison.pairs]  # fmt: skip
    names = ["x", "y", "probability", "low", "high", "p_value", "p_value_holm"]
    text = "95 % percentile bootstrap over seeds; p-values: stratified permutation test, Holm"
    return figure, pd.DataFrame(rows, columns=names), text


def _bars(m: _Material) -> Drawn | None:
    import pandas as pd

    tasks = [task for task in m.board.tasks if task.normalized]
    methods = [row.method for row in m.board.rows]
    if not tasks:
        return None
    figure, (axis,) = _panels(m.style, 1, 1, 1.9)
    width = 0.84 / len(methods)
    rows = []
    for place, method in enumerate(methods):
        look = m.look(method)
        hatch = "" if look["linestyle"] == "-" else "////"
        label: str | None = method
        for column, task in enumerate(tasks):
            scores = [score for _, score in sorted(m.board.cell(method, task).scores.items())]
            if not scores:
                continue
            found = stats.mean_interval(scores, CURVE_REPS, m.seed)
            rows.append((task.name, method, len(scores), *vars(found).values()))
            x = column + (place - (len(methods) - 1) / 2) * width
            axis.bar(x, 100 * found.value, width * 0.92, color=look["color"], alpha=0.75,
                     hatch=hatch, linewidth=0, label=label)  # fmt: skip
            label = None
            if found.low is not None and found.high is not None:
                axis.vlines(x, 100 * found.low, 100 * found.high, color="0.15", linewidth=0.8)
            axis.plot([x] * len(scores), [100 * one for one in scores], ".", color="0.15",
                      markersize=2.5, alpha=0.6)  # fmt: skip
    names = [_short(task.name) for task in tasks]
    turn = {"rotation": 30, "ha": "right"} if len(tasks) > 4 else {}
    axis.set_xticks(range(len(tasks)), names, **turn)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylabel("normalised score × 100")
    axis.grid(visible=False, axis="x")
    _legend(figure, [axis])
    data = pd.DataFrame(rows, columns=["task", "method", "seeds", "mean", "low", "high"])
    return figure, data, "bars: mean; lines: 95 % percentile bootstrap over seeds; points: seeds"


def _score_latency(m: _Material) -> Drawn | None:
    import pandas as pd

    points = plots.latency_points(m.board, m.latencies, m.seed)
    if not points:
        return None
    # Times under another condition do not compare, so the most frequent one is drawn.
    found = [point.condition for point in points]
    condition = max(sorted(set(found)), key=found.count)
    tasks = [t for t in m.board.tasks if any(p.task == t.name for p in points)]
    columns = _columns(m.style, len(tasks))
    figure, axes = _panels(m.style, len(tasks), columns)
    for axis, task in zip(axes, tasks, strict=False):
        for point in points:
            if (point.task, point.condition) == (task.name, condition):
                scale = 100.0 if task.normalized else 1.0
                look = m.look(point.method)
                marker = "o" if look["linestyle"] == "-" else "s"
                plots.draw_point(axis, point, scale, look["color"], marker)
        _log_axis(axis)
        axis.set_title(_short(task.name))
    _outer_labels(axes, columns, "ms per action", _axis_label(tasks))
    _legend(figure, axes)
    rows = [
        (p.task, p.method, p.condition, p.ms, *p.ms_range, p.score, *(p.interval or (None, None)))
        for p in points
    ]
    names = ["task", "method", "condition", "ms", "ms_low", "ms_high", "score", "low", "high"]
    text = f"{condition}; score: 95 % bootstrap over seeds; ms: range of the rounds' medians"
    return figure, pd.DataFrame(rows, columns=names), text


def _tuning_budget(m: _Material) -> Drawn | None:
    import pandas as pd

    tasks = {task.name: task for task in m.board.tasks}
    found = {
        key: tuning.tuning_curve(policies, PULLS, seed=m.seed)
        for key, policies in sorted(m.policies.items())
        if len(policies) > 1
    }
    names = [name for name in tasks if any(task == name for _, task in found)]
    if not names:
        return None
    columns = _columns(m.style, len(names))
    figure, axes = _panels(m.style, len(names), columns)
    pulls = np.arange(1, PULLS + 1)
    algorithms = sorted({algorithm for algorithm, _ in found})
    rows = []
    for axis, name in zip(axes, names, strict=False):
        scale = 100.0 if tasks[name].normalized else 1.0
        for place, algorithm in enumerate(algorithms):
            curve = found.get((algorithm, name))
            if curve is None:
                continue
            look = series_style(place)
            axis.plot(pulls, scale * curve.value, label=algorithm, **look)
            bounds = [np.full(PULLS, np.nan)] * 2
            if curve.low is not None and curve.high is not None:
                bounds = [curve.low, curve.high]
                ends = (scale * curve.low, scale * curve.high)
                axis.fill_between(pulls, *ends, color=look["color"], alpha=0.18, linewidth=0)
            head = (name, algorithm, curve.num_policies)
            rows += [(*head, *v) for v in zip(pulls, curve.value, *bounds, strict=True)]
        _log_axis(axis)
        axis.set_title(_short(name))
    _outer_labels(axes, columns, "policy evaluations", _axis_label([tasks[n] for n in names]))
    _legend(figure, axes)
    header = ["task", "algorithm", "policies", "evaluations", "score", "low", "high"]
    text = "bands: 95 % percentiles over resampled pools of policies (settings and seeds)"
    return figure, pd.DataFrame(rows, columns=header), text


FIGURES: dict[str, Callable[[_Material], Drawn | None]] = {
    "learning_curves": _learning_curves,
    "aggregates": _aggregates,
    "performance_profiles": _profiles,
    "probability_of_improvement": _improvement,
    "per_dataset": _bars,
    "tuning_budget": _tuning_budget,
    "score_latency": _score_latency,
}


# --------------------------------------------------------------------------------------- pieces


def _panels(
    style: Style, count: int, columns: int, height: float = 1.35, *, column: bool = False
) -> tuple[Figure, list[Any]]:
    """A grid of axes as wide as the text, or as a column; `height` is a row's, in inches."""
    import matplotlib.pyplot as plt

    rows = math.ceil(count / columns)
    width = style.column_width if column else style.text_width
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.45),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _columns(style: Style, count: int) -> int:
    return 4 if style.text_width > 6 and count % 4 == 0 else min(3, count)


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    plots.draw_legend(figure, axes, int(figure.get_figwidth() / LEGEND_INCHES))


def _log_axis(axis: Any) -> None:
    """A logarithmic x-axis with plain numbers, also within a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _outer_labels(axes: Sequence[Any], columns: int, x: str, y: str) -> None:
    for place, axis in enumerate(axes):
        if place + columns >= len(axes):
            axis.set_xlabel(x)
        if place % columns == 0:
            axis.set_ylabel(y)


def _axis_label(tasks: Sequence[Any]) -> str:
    kinds = {task.normalized for task in tasks}
    names = {True: "score × 100", False: "return"}
    return " or ".join(names[kind] for kind in sorted(kinds, reverse=True))


def _unit(task: Any) -> str:
    return "score" if task.normalized else "return"


def _short(name: str) -> str:
    """A dataset without the namespace that all of a track share."""
    return name.split("/", 1)[-1]
