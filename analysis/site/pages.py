"""The leaderboard as static pages that open from a file.

Owns files and their links; what they show comes from `analysis.site.collect`. Pages need no server
and ask the network for nothing: what a script reads is in script files of its own. Equal databases
give equal bytes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis import stats, tables
from analysis.comparison import Rank
from analysis.load import Task, missing_text
from analysis.plots import step_label
from analysis.site import svg
from analysis.site.collect import CellView, Content, RowView, TrackView, collect
from analysis.tracks import slug
from analysis.verdicts import stem
from results.archive import save_table
from results.published import PublishedScore, published_scores

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

    from results.store import Store

HERE = Path(__file__).parent
OVERVIEW_ROWS = 250  # of all tables together: keeps the first page below a megabyte
ORIGINS = ("own", "rerun", "quoted")
CHART_LINES = 16  # of a dataset's page; eight colours, solid and dashed

COLUMNS = {
    "suite": "group of datasets that is aggregated",
    "tier": "ours or imported",
    "environment": "version of environment and simulator",
    "protocol": "how policies were evaluated",
    "select": "which evaluation counts",
    "method": "row of the table: a label, with what tells its variants apart",
    "algorithm": "registered name",
    "task": "dataset, with what tells its contents apart",
    "dataset_id": "dataset",
    "digest": "sha256 of its content",
    "seed": "training seed",
    "score": "score of the selected evaluation; empty where there is none",
    "unit": "score (a fraction) or return",
    "missing": "why there is no score",
    "run_id": "the run behind the score",
}


class Chart(NamedTuple):
    svg: str
    names: list[str]
    left_out: int


def write(
    store: Store,
    out: Path,
    trial_ids: Iterable[str] | None = None,
    select: str = "last",
    seed: int = 0,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    interval: Any = "percentile",
) -> Path:
    """Writes the pages into a folder and returns the first one.

    Args:
        out: made if need be; files of the same names are replaced, others are left alone.
        trial_ids: None for all that ran.
        select: which evaluation counts, as for a leaderboard.
        seed: of the bootstraps.
        defaults: algorithm -> its default config, which cells are compared with.
        interval: of the aggregates: "percentile", "bca" or "t".
    Raises:
        ValueError: if there is nothing to show, or the rule is unknown.
    """
    content = collect(store, trial_ids, select, seed, defaults, interval)
    writer = _Writer(content, out, frozenset(defaults or ()))
    for folder in ("tracks", "datasets", "algorithms", "cells", "data"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    shutil.copytree(HERE / "static", out / "static", dirs_exist_ok=True)
    writer.data()
    writer.overview()
    writer.tracks()
    writer.datasets()
    writer.algorithms()
    writer.cells()
    writer.compare()
    return out / "index.html"


class _Writer:
    def __init__(self, content: Content, out: Path, known: frozenset[str]) -> None:
        self.content, self.out, self.known = content, out, known
        self.environment = _environment(content)
        self.latency = any(row.latency is not None for t in content.tracks for row in t.rows)

    def page(self, template: str, path: str, **values: Any) -> None:
        text = self.environment.get_template(template).render(
            root="../" * path.count("/"), here=path, latency=self.latency, **values
        )
        (self.out / path).write_text(text, encoding="utf-8")

    def overview(self) -> None:
        tracks = self.content.tracks
        left = OVERVIEW_ROWS
        shown = []
        for place, track in enumerate(tracks):
            share = max(left // (len(tracks) - place), 1)
            shown.append((track, track.rows[:share]))
            left -= len(shown[-1][1])
        rows = [row for track in tracks for row in track.rows]
        self.page(
            "index.html",
            "index.html",
            shown=shown,
            choices=_choices(tracks),
            totals={
                "runs": sum(len(row.runs) for row in rows),
                "algorithm": len({row.algorithm for row in rows}),
                "dataset": len(self.content.datasets),
            },
            dataset_pages=[(name, dataset_page(name)) for name in sorted(self.content.datasets)],
            algorithms=sorted({row.algorithm for row in rows}),
        )

    def tracks(self) -> None:
        for track in self.content.tracks:
            self.page(
                "track.html",
                f"tracks/{track.key.slug}.html",
                track=track,
                choices=_choices([track]),
            )

    def datasets(self) -> None:
        for name, contents in self.content.datasets.items():
            found = [
                _dataset_table(track, task, place)
                for track in self.content.tracks
                for place, task in enumerate(track.tasks)
                if task.dataset_id == name
            ]
            values = {"id": name, "contents": contents, "tables": found, "printed": _printed(name)}
            self.page("dataset.html", dataset_page(name), **values)

    def algorithms(self) -> None:
        rows: dict[str, list[tuple[TrackView, RowView]]] = {}
        for track in self.content.tracks:
            for row in track.rows:
                rows.setdefault(row.algorithm, []).append((track, row))
        for name, found in rows.items():
            self.page("algorithm.html", algorithm_page(name), name=name, rows=found)

    def cells(self) -> None:
        for track in self.content.tracks:
            for row in track.rows:
                for cell in filter(None, row.cells):
                    versions = {_plain(run.versions) for run in cell.runs}
                    self.page(
                        "cell.html",
                        f"cells/{cell.slug}.html",
                        track=track,
                        row=row,
                        cell=cell,
                        chart=_cell_chart(cell),
                        cell_versions=sorted(versions),
                        known_default=cell.algorithm in self.known,
                    )

    def compare(self) -> None:
        for track in self.content.tracks:
            text = json.dumps(_comparison(track), sort_keys=True, allow_nan=False)
            line = f"window.comparisons[{json.dumps(track.key.slug)}] = {text};\n"
            path = self.out / "data" / f"compare-{track.key.slug}.js"
            path.write_text(f"window.comparisons ??= {{}};\n{line}", encoding="utf-8")
        self.page("compare.html", "compare.html", tracks=self.content.tracks)

    def data(self) -> None:
        import pyarrow as pa

        folder = self.out / "data"
        frame = score_frame(self.content)
        frame.to_csv(folder / "scores.csv", index=False, lineterminator="\n")
        save_table(pa.Table.from_pandas(frame, preserve_index=False), folder / "scores.parquet")
        frame.to_json(folder / "scores.json", orient="records", indent=0, double_precision=15)
        boards = [
            {
                "track": track.key.title,
                "tier": track.key.tier,
                **json.loads(tables.json(track.board)),
            }
            for track in self.content.tracks
        ]
        (folder / "leaderboards.json").write_text(
            json.dumps(boards, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        texts = {
            "scores.csv": "one row per seed, text",
            "scores.parquet": "the same, typed and small",
            "scores.json": "the same, as a list of objects",
            "leaderboards.json": "aggregates, intervals, cells, captions and gaps of every table",
        }
        files = [
            (name, text, _size((folder / name).stat().st_size)) for name, text in texts.items()
        ]
        self.page("download.html", "download.html", files=files, columns=COLUMNS.items())
        self.page("methodology.html", "methodology.html", min_seeds=stats.MIN_SEEDS)


def score_frame(content: Content) -> pd.DataFrame:
    """One row per track, method, task and seed, with `COLUMNS`."""
    import pandas as pd

    rows = []
    for track in content.tracks:
        for row in track.rows:
            for cell in filter(None, row.cells):
                head = (
                    track.key.suite,
                    track.key.tier,
                    track.key.environment,
                    track.key.protocol,
                    content.select,
                )
                what = (row.board.method, row.algorithm, cell.task.name, cell.task.dataset_id)
                unit = "score" if cell.task.normalized else "return"
                runs = {run.seed: run.run_id for run in cell.runs if run.score is not None}
                for one, score in sorted(cell.cell.scores.items()):
                    place = (*head, *what, cell.task.digest, one)
                    rows.append((*place, score, unit, "", runs[one]))
                for one, why in sorted(cell.cell.missing.items()):
                    place = (*head, *what, cell.task.digest, one)
                    rows.append((*place, math.nan, unit, why, ""))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def dataset_page(dataset_id: str) -> str:
    return f"datasets/{slug(dataset_id)}.html"


def algorithm_page(name: str) -> str:
    """Names of foreign code may hold anything."""
    return f"algorithms/{name if re.fullmatch(r'[A-Za-z0-9_.-]+', name) else slug(name)}.html"


def row_id(row: RowView, track: TrackView) -> str:
    """The anchor of a row on its algorithm's page."""
    return slug(row.board.method, track.key.slug)


def _environment(content: Content) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals["content"] = content
    made.filters |= {
        "bar": lambda found, span: svg.interval_bar(found.value, found.low, found.high, span),
        "algorithm_page": algorithm_page,
        "dataset_page": lambda task: dataset_page(task.dataset_id),
        "estimate": _estimate,
        "exact": lambda value: f"{value:.6g}",
        "known": lambda value: value is not None and value == value,
        "missing": missing_text,
        "one": lambda value: f"{value:.1f}",
        "plain": _plain,
        "pretty": lambda value: json.dumps(value, indent=2, sort_keys=True),
        "rank": _rank,
        "row_id": row_id,
        "short": lambda value: f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}",
        "step_range": _step_range,
        "swatch": svg.swatch,
    }
    return made


def _estimate(found: stats.Estimate, scale: float = 100.0) -> str:
    text = f"{scale * found.value:.1f}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{scale * found.low:.1f}, {scale * found.high:.1f}]"


def _rank(rank: Rank) -> str:
    if rank.low is None or rank.high is None:
        return f"{rank.rank:g}"
    return f"{rank.rank:g} [{rank.low:g}, {rank.high:g}]"


def _plain(value: Any) -> str:
    """A setting on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in sorted(value.items())) or "none"
    if isinstance(value, (list, tuple)) and not value:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _step_range(steps: list[int]) -> str:
    if not steps:
        return "–"
    return (
        step_label(steps[0])
        if len(steps) == 1
        else f"{step_label(steps[0])}–{step_label(steps[-1])}"
    )


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{max(num_bytes / 1e3, 0.1):.1f} kB"
    )


def _printed(dataset_id: str) -> list[PublishedScore]:
    """What papers print for the D4RL dataset of a like name, the authors' own numbers first."""
    own = stem(dataset_id)
    found = [score for score in published_scores() if stem(score.dataset) == own]
    return sorted(found, key=lambda one: (ORIGINS.index(one.origin), -one.value, one.name))


def _choices(tracks: Iterable[TrackView]) -> list[tuple[str, str, list[str]]]:
    tracks = list(tracks)
    return [
        ("suite", "Suite", sorted({track.key.suite for track in tracks})),
        ("family", "Algorithm", sorted({row.algorithm for t in tracks for row in t.rows})),
        ("protocol", "Protocol", sorted({track.key.protocol for track in tracks})),
        ("environment", "Environment", sorted({track.key.environment for track in tracks})),
        ("tier", "Tier", sorted({track.key.tier for track in tracks})),
    ]


def _dataset_table(track: TrackView, task: Task, place: int) -> tuple[Any, ...]:
    cells = [cell for row in track.rows if (cell := row.cells[place])]
    cells.sort(key=lambda cell: (-cell.estimate.value if cell.estimate else math.inf, cell.method))
    ends = [
        end for cell in cells if cell.estimate for end in vars(cell.estimate).values()
        if end is not None
    ]  # fmt: skip
    span = (min(ends), max(ends)) if ends else (0.0, 1.0)
    drawn = [cell for cell in cells if cell.curve and cell.curve.steps]
    chart = None
    if drawn:
        lines = [_line(cell) for cell in drawn[:CHART_LINES]]
        picture = svg.curves(lines, f"Learning curves on {task.name}", _unit(task))
        chart = Chart(picture, [line.name for line in lines], len(drawn) - len(lines))
    return track, task, [(cell, span) for cell in cells], chart


def _unit(task: Task) -> str:
    return "normalised score x 100" if task.normalized else "episode return"


def _line(cell: CellView, with_seeds: bool = False) -> svg.Line:
    assert cell.curve is not None  # asked for cells with a curve only
    scale, curve = cell.scale, cell.curve
    thin = [[(step, scale * value) for step, value in one] for one in curve.seeds.values()]
    return svg.Line(
        cell.method,
        curve.steps,
        [scale * value for value in curve.mean],
        curve.bounds
        and ([scale * v for v in curve.bounds[0]], [scale * v for v in curve.bounds[1]]),
        thin if with_seeds else (),
    )


def _cell_chart(cell: CellView) -> str:
    if cell.curve is None:
        return ""
    label = f"Learning curves of {cell.method} on {cell.task.name}"
    return svg.curves([_line(cell, with_seeds=True)], label, _unit(cell.task))


def _comparison(track: TrackView) -> dict[str, Any]:
    """What the page that compares two methods of a track shows: means of cells, tests of pairs."""
    names = [row.board.method for row in track.rows]
    methods = []
    for row in track.rows:
        found = {}
        for place, cell in enumerate(row.cells):
            if cell and cell.estimate and not cell.cell.missing:
                values = (cell.estimate.value, cell.estimate.low, cell.estimate.high)
                shown = [None if v is None else round(cell.scale * v, 2) for v in values]
                found[place] = [*shown, len(cell.cell.scores), cell.slug]
        methods.append({"name": row.board.method, "cells": found})
    pairs = {
        f"{names.index(pair.x)},{names.index(pair.y)}": [
            *(None if v is None else round(v, 4) for v in vars(pair.probability).values()),
            float(f"{pair.adjusted:.2g}"),
        ]
        for pair in (track.board.comparison.pairs if track.board.comparison else ())
    }
    tasks = [{"name": task.name, "unit": _unit(task)} for task in track.tasks]
    alpha = track.board.comparison.alpha if track.board.comparison else None
    return {"methods": methods, "tasks": tasks, "pairs": pairs, "alpha": alpha}
