"""The two consoles, and what several commands print: tables, paths, what was left out, checks.

What is printed is shown as it is: it holds names, paths and errors of others, in which `[x]` is no
style and `:x:` no emoji. What is to have a style is a `Text`, such as `styled` makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from harness.preflight import Check

console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


def styled(start: str, style: str, rest: str = "") -> Text:
    """Text whose start has a style."""
    return Text.assemble((start, style), rest)


def print_table(
    header: Sequence[str], body: Iterable[Sequence[str]], title: str = "", lines: bool = False
) -> None:
    """Prints a table whose long cells are folded, not cut; `lines` between its rows."""
    table = Table(*header, title=Text(title, "table.title") if title else None, show_lines=lines)
    for column in table.columns:
        column.overflow = "fold"
    for row in body:
        table.add_row(*row)
    console.print(table)


def print_numbers(numbers: Any, paths: Iterable[Path]) -> None:
    """Prints a frame of numbers and the files written, as JSON."""
    records = json.loads(numbers.to_json(orient="records"))
    print(json.dumps({"numbers": records, "files": [str(path) for path in paths]}))


def print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def print_left_out(left_out: Mapping[str, str]) -> None:
    for trial_id, reason in left_out.items():
        console.print(f"  left out {trial_id[:12]}: {reason}", highlight=False)


def print_checks(checks: list[Check]) -> None:
    if not checks:
        return
    table = Table("check", "", "what was found")
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    for item in checks:
        table.add_row(item.name, styled(item.state, colours[item.state]), item.text)
    console.print(table)
