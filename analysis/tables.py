"""A leaderboard as a rich table, Markdown, CSV, LaTeX or JSON.

Owns forms only: fractions become scores times 100 here and in figures, and nowhere else (CSV and
JSON keep fractions).
"""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
import math
import re
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import stats

if TYPE_CHECKING:
    from analysis.comparison import Rank
    from analysis.leaderboard import Leaderboard, MethodRow
    from analysis.load import Task

CSV_COLUMNS = ("kind", "method", "task", "metric", "seed", "value", "low", "high", "unit", "note")
"""`kind` is "aggregate" (a metric), "score" (one seed of a cell) or "missing"."""


def aggregate_rows(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the aggregate table, as text; with ranks where methods are compared."""
    ranks = {} if board.comparison is None else {r.method: r for r in board.comparison.ranks}
    rows = []
    for row in board.rows:
        shown = [_estimate(row.estimates[name]) if row.estimates else "–" for name in stats.METRICS]
        tasks = f"{row.num_tasks}/{len(board.aggregated)}"
        rank = [_rank(ranks.get(row.method))] if ranks else []
        rows.append([row.method, *rank, _seeds(row), tasks, *shown])
    return ["Method", *(["Rank"] if ranks else []), "Seeds", "Tasks", *stats.METRICS], rows


def cell_rows(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of cells: a row per task, a column per method."""
    methods = [row.method for row in board.rows]
    rows = [
        [
            task.name if task.normalized else f"{task.name} (raw return)",
            *(_cell(board, method, task) for method in methods),
        ]
        for task in board.tasks
    ]
    return ["Task", *methods], rows


# ---------------------------------------------------------------------------- text forms


def renderables(board: Leaderboard) -> list[Any]:
    """For a rich console: two tables, the caption, the notes."""
    from rich.table import Table
    from rich.text import Text

    items: list[Any] = []
    for title, (header, rows) in (
        (board.title, aggregate_rows(board)),
        ("Cells", cell_rows(board)),
    ):
        table = Table(title=Text(title, "table.title"), title_justify="left", header_style="bold")
        for index, name in enumerate(header):
            table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        items.append(table)
    items.append(Text(_paragraph(board), style="dim"))
    items += [Text(f"! {remark}", style="yellow") for remark in _remarks(board)]
    return items


def rich(board: Leaderboard) -> str:
    """The renderables as plain text, 120 columns wide."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=False)
    for item in renderables(board):
        console.print(item)
    return text.getvalue()


def markdown(board: Leaderboard) -> str:
    """Two Markdown tables, the caption and the notes."""
    parts = [f"## {board.title}", markdown_table(*aggregate_rows(board))]
    parts += ["### Cells", markdown_table(*cell_rows(board)), _paragraph(board)]
    remarks = _remarks(board)
    if remarks:
        parts.append("\n".join(f"- {escape_markdown(remark)}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def latex(board: Leaderboard) -> str:
    r"""Two `table` environments; needs `\usepackage{booktabs}`."""
    remarks = "".join(f" {remark}." for remark in _remarks(board))
    caption = f"{board.title}. {_paragraph(board)}{remarks}"
    aggregates = _latex_table(*aggregate_rows(board), caption=caption, label="leaderboard")
    cells = _latex_table(*cell_rows(board), caption="Cells of the leaderboard.", label="cells")
    return f"{aggregates}\n{cells}"


def csv(board: Leaderboard) -> str:
    """Tidy lines with `CSV_COLUMNS`: metrics, then scores and gaps; fractions in full precision."""
    file = io.StringIO()
    writer = csv_module.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    rule = {"note": f"select={board.scores.select}"}
    for row in board.rows:
        for name, value in (row.estimates or {}).items():
            bounds = {
                key: repr(bound)
                for key, bound in (("low", value.low), ("high", value.high))
                if bound is not None
            }
            head = {"kind": "aggregate", "method": row.method, "metric": name}
            writer.writerow({**head, "value": repr(value.value), **bounds, "unit": "score", **rule})
    for rank in board.comparison.ranks if board.comparison else ():
        values = {"value": rank.rank, "low": rank.low, "high": rank.high, "note": rank.group}
        head = {"kind": "aggregate", "method": rank.method, "metric": "Rank", "unit": "rank"}
        writer.writerow({**head, **values})
    for row in board.rows:
        for task in board.tasks:
            cell = board.cell(row.method, task)
            head = {"method": row.method, "task": task.name}
            unit = "score" if task.normalized else "return"
            for seed, score in sorted(cell.scores.items()):
                values = {"seed": seed, "value": repr(float(score)), "unit": unit}
                writer.writerow({"kind": "score", **head, **values, **rule})
            for seed, why in sorted(cell.missing.items()):
                writer.writerow({"kind": "missing", **head, "seed": seed, "note": why})
            if not cell.scores and not cell.missing:
                writer.writerow({"kind": "missing", **head, "note": "never run"})
    return file.getvalue()


def json(board: Leaderboard) -> str:
    """Everything, fractions in full precision, strictly valid JSON with sorted keys."""
    content = {
        "title": board.title,
        "select": board.scores.select,
        "uses_test_rollouts": board.scores.uses_test_rollouts,
        "bootstrap": {"reps": board.reps, "seed": board.seed, "confidence": 0.95},
        "caption": list(board.caption),
        "notes": list(board.notes),
        "aggregated_over": [task.name for task in board.aggregated],
        "tasks": [
            {
                "name": task.name,
                "dataset_id": task.dataset_id,
                "digest": task.digest,
                "simulator": task.simulator,
                "relation": task.relation,
                "ref_min": task.ref_min,
                "ref_max": task.ref_max,
                "ref_source": task.ref_source,
            }
            for task in board.tasks
        ],
        "methods": [
            {
                "method": row.method,
                "complete_tasks": row.num_tasks,
                "seeds": row.seeds and list(row.seeds),
                "aggregates": None
                if row.estimates is None
                else {
                    metric: {"value": found.value, "low": found.low, "high": found.high}
                    for metric, found in row.estimates.items()
                },
                "gaps": list(row.gaps),
            }
            for row in board.rows
        ],
        "comparison": None
        if board.comparison is None
        else {
            "metric": board.comparison.metric,
            "alpha": board.comparison.alpha,
            "ranks": [vars(rank) for rank in board.comparison.ranks],
            "pairs": [
                {**vars(pair), "probability": vars(pair.probability)}
                for pair in board.comparison.pairs
            ],
        },
        "cells": [
            {
                "method": row.method,
                "task": task.name,
                "unit": "score" if task.normalized else "return",
                "variant_id": cell.variant_id or None,
                "scores": {str(seed): _finite(score) for seed, score in cell.scores.items()},
                "missing": {str(seed): why for seed, why in cell.missing.items()},
                "run_ids": list(cell.run_ids),
            }
            for row in board.rows
            for task in board.tasks
            for cell in [board.cell(row.method, task)]
        ],
    }
    return json_module.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


# ---------------------------------------------------------------------------- pieces


def _paragraph(board: Leaderboard) -> str:
    return " ".join(f"{sentence}." for sentence in board.caption)


def _remarks(board: Leaderboard) -> list[str]:
    """Notes, and one line for each cell marked with an asterisk."""
    return [*board.notes, *(f"* {sentence}" for sentence in board.incomplete())]


def _estimate(estimate: stats.Estimate) -> str:
    return estimate.text(1, 100)


def _rank(rank: Rank | None) -> str:
    """Rank, interval and tie group: "1 [1, 2] ab"."""
    if rank is None or rank.low is None or rank.high is None:
        return "–"
    return f"{rank.rank:g} [{rank.low:g}, {rank.high:g}] {rank.group}"


def _seeds(row: MethodRow) -> str:
    if row.seeds is None:
        return "0"
    low, high = row.seeds
    return f"{low}" if low == high else f"{low}–{high}"


def _cell(board: Leaderboard, method: str, task: Task) -> str:
    cell = board.cell(method, task)
    mark = "*" if cell.missing or not cell.scores else ""
    if not cell.scores:
        return f"–{mark}"
    values = np.array(list(cell.scores.values())) * (100 if task.normalized else 1)
    return f"{mean_text(values)}{mark}"


def mean_text(values: np.ndarray) -> str:
    """Mean, sample standard deviation and number of values: "102.9 ± 12.5 (4)"."""
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} ({len(values)})"


def _finite(value: float) -> float | str:
    """JSON has no infinities; a string is better than a file that most readers refuse."""
    return float(value) if math.isfinite(value) else str(value)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\|*_[]<>`":
        text = text.replace(character, f"\\{character}")
    return text


def markdown_table(header: list[str], rows: list[list[str]], *, escape: bool = True) -> str:
    shown = [list(map(escape_markdown, cells)) if escape else cells for cells in (header, *rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in shown]
    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(header) - 1)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
    "\N{MINUS SIGN}": "$-$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped; the sign of a number is a minus, no hyphen."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)
    # One pass over the characters, so that a replacement is never replaced again.
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(
    header: list[str],
    rows: list[list[str]],
    caption: str,
    label: str,
    rules: Container[int] = (),
) -> str:
    """A `table` environment with booktabs; cells and caption are LaTeX already.

    Args:
        rules: rows with a rule above.
    """
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\label{{tab:{label}}}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"]
    lines += [r"\toprule", " & ".join(header) + r" \\", r"\midrule"]
    for place, row in enumerate(rows):
        if place and place in rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_table(header: list[str], rows: list[list[str]], caption: str, label: str) -> str:
    cells = [[tex(cell) for cell in row] for row in (header, *rows)]
    return latex_table(cells[0], cells[1:], tex(caption), label)
