"""A plan in words and tables: what `harness.plan.Plan.describe` returned, on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from harness.typed import canonical_json

MOST_SHOWN = 6  # stacks of one kind, and datasets of one change, that are listed one by one


def plan_tables(plan: Mapping[str, Any]) -> list[Any]:
    """What `Plan.describe` returned, as rich renderables for a terminal."""
    counts = plan["counts"]
    settings = _folding_table("algorithm", "dataset", "relation", "settings", "trials", "done")
    notes: dict[str, None] = {}  # each once, in order
    for row in plan["settings"]:
        algorithm = row["label"]
        if row["label"] != row["algorithm"]:
            algorithm += f" ({row['algorithm']})"
        dataset = row["dataset_id"]
        if row["requested"] != dataset:
            dataset += f" for {row['requested']}"
        block, _, source = row["hparams"].partition(" (")
        cells = (algorithm, dataset, row["relation"], block, str(row["trials"]), str(row["done"]))
        settings.add_row(*map(Text, cells))
        if source:
            notes[f"table of {row['algorithm']}, {block}: {source.removesuffix(')')}"] = None
        if row["note"]:
            notes[f"{dataset}: {row['note']}"] = None
    found: list[Any] = [settings, *map(Text, [*notes, *_changes(plan["settings"])])]
    if plan["stacks"]:
        stacks = _folding_table(
            "stage", "dataset", "seeds, stack by stack", "steps", "memory", "estimate"
        )
        for rows in _alike(plan["stacks"]):
            stacks.add_row(*map(Text, _stack_cells(rows)))
        found.append(stacks)
    estimate = f", about {duration(plan['seconds'])}" if plan["stacks"] else ""
    if plan["stacks"] and plan["seconds"] is None:
        estimate = ", duration unknown (no finished run to measure)"
    left = f"{counts['trials_todo']} to do in {numbered(counts['stacks'], 'stack')}{estimate}"
    found.append(f"{numbered(counts['trials'], 'trial')}: {counts['trials_done']} done, {left}")
    return found


def _changes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For each label what was changed of its table, and on which datasets unless on all."""
    found: dict[tuple[str, str], list[str]] = {}
    datasets: dict[str, int] = Counter(row["label"] for row in rows)
    for row in rows:
        parts = [
            f"by the {who}: {', '.join(f'{name}={_value(item)}' for name, item in given.items())}"
            for who, given in row["changed"].items()
        ]
        if parts:
            found.setdefault((row["label"], "; ".join(parts)), []).append(row["dataset_id"])
    for (label, text), ids in found.items():
        where = "" if len(ids) == datasets[label] else f" on {_some(ids)}"
        yield f"settings of {label}{where} changed {text}"


def _value(item: Any) -> str:
    return item if isinstance(item, str) else canonical_json(item)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _alike(stacks: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Described stacks that differ only in their seeds, together."""
    keys = (
        "labels",
        "algorithm",
        "stage",
        "dataset_id",
        "steps",
        "resume_step",
        "evaluate_only",
        "retrain",
    )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for stack in stacks:
        groups.setdefault(repr([stack[key] for key in keys]), []).append(stack)
    return list(groups.values())


def seed_ranges(seeds: Iterable[int]) -> str:
    """Seeds as `parse_seeds` reads them: [0, 1, 2, 5] is "0-2,5"; none is "shared"."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    return ",".join(texts) or "shared"


def _folding_table(*columns: str) -> Table:
    """A table that wraps long cells; an id cut short could be any of several."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _stack_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Cells for described stacks that differ only in their seeds."""
    row = rows[0]
    stage = f"{','.join(row['labels']) or row['algorithm']}: {row['stage']}"
    steps = str(row["steps"]) if row["kind"] == "train" else "computed"
    if row["evaluate_only"]:
        steps = "evaluation only"
    elif row["retrain"]:
        steps += " again, for the curve"
    elif row["resume_step"]:
        steps += f" from {row['resume_step']}"
    seeds = " | ".join(seed_ranges(item["seeds"]) for item in rows[:MOST_SHOWN])
    if len(rows) > MOST_SHOWN:
        seeds += f" | {len(rows) - MOST_SHOWN} more"
    known = [item["seconds"] for item in rows if item["seconds"] is not None]
    estimate = duration(sum(known) if len(known) == len(rows) else None)
    needs = [item["bytes"] for item in rows if item.get("bytes")]
    memory = f"{max(needs) / 2**30:.1f} GiB" if needs else "unknown"
    return stage, row["dataset_id"], seeds, steps, memory, estimate


def numbered(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
