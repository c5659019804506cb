"""Numbers printed by others, as data, each with its source.

`scores.csv` holds what papers' tables print, a row per number; `tables.csv` says of each table what
it is, how its numbers came about and where they were read. Printed averages are left out: they can
be computed. Fields of a row are those of `PublishedScore`.

`d4rl_reference_scores.csv` holds D4RL's reference returns of its original datasets and
environments (repository Farama-Foundation/D4RL, Apache-2.0). Rows named `maze2d-*-v0` and
`maze2d-eval-*` come from the environments' registration (`d4rl/pointmaze/__init__.py`), all others
from `d4rl/infos.py`. `ref_min` is the mean return of 100 episodes of random actions, `ref_max` an
expert's mean return; Gym-MuJoCo and Adroit use one pair per environment for all datasets and
versions. Known doubts: the v1 and v2 Gym-MuJoCo pairs were never estimated anew (D4RL issue
#114), and maze2d's expert value is questioned (D4RL issue #215).
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

SpreadKind = Literal["std", "sem_rollouts", "none", "unknown"]
Origin = Literal["own", "rerun", "quoted"]
RULES = ("last", "last-10", "cloning-loss-1", "cloning-loss-2", "cloning-loss-3", "best")
"""Selections that are rules of `harness leaderboard --select`."""

SELECTIONS = (*RULES, "unknown", "after online finetuning")


@dataclass(frozen=True)
class PublishedTable:
    """Where numbers were printed."""

    table: str  # its key
    paper: str
    reference: str  # arXiv number, or ""
    place: str
    protocol: str
    read_in: str  # the paper itself, or where its numbers are quoted


@dataclass(frozen=True)
class PublishedScore:
    """A printed number.

    Attributes:
        name: the method as the table calls it.
        algorithm: the algorithm of ours that it stands for, or "".
        preset: the preset of that algorithm with these settings, or "" for its defaults.
        dataset: as D4RL calls it.
        metric: "d4rl_normalized_score" (times 100), "success_rate" or "env_return".
        spread, spread_kind: what stands behind the plus-minus: standard deviation over seeds,
            standard error over pooled rollouts, nothing, or something that is not said.
        seeds: trained; None where it is not said.
        rollouts: behind a standard error over rollouts, of all seeds together.
        steps: gradient steps; None where it is not known.
        selection: which evaluation was reported.
        origin: the authors' own method or run, another's method run again by them, or taken from
            earlier work.
        note: a doubt about this number.
    """

    table: PublishedTable
    name: str
    algorithm: str
    preset: str
    dataset: str
    metric: str
    value: float
    spread: float | None
    spread_kind: SpreadKind
    seeds: int | None
    rollouts: int | None
    steps: int | None
    selection: str
    origin: Origin
    note: str


def published_scores() -> tuple[PublishedScore, ...]:
    """All printed numbers, in the order of the file.

    Raises:
        ValueError: naming the line that is not valid.
    """
    return _published_scores()


@functools.cache
def _published_scores() -> tuple[PublishedScore, ...]:
    tables = {row["table"]: PublishedTable(**row) for _, row in _rows("tables.csv")}
    return read_scores(_rows("scores.csv"), tables)


def _rows(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a file with where they stand."""
    with (resources.files(__name__) / name).open(encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"{name}, line {reader.line_num}", row


def read_scores(
    rows: Iterator[tuple[str, dict[str, str]]], tables: dict[str, PublishedTable]
) -> tuple[PublishedScore, ...]:
    """Rows (where, cells) as values.

    Raises:
        ValueError: naming where a cell is not valid, or a number is there twice.
    """
    found: dict[tuple[str, str, str], PublishedScore] = {}
    for where, row in rows:
        try:
            score = _score(row, tables)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        key = (score.table.table, score.name, score.dataset)
        if key in found:
            raise ValueError(f"{where}: {' / '.join(key)} is there already")
        found[key] = score
    return tuple(found.values())


def _score(row: dict[str, str], tables: dict[str, PublishedTable]) -> PublishedScore:
    cells: dict[str, Any] = dict(row)
    cells["table"] = tables[row["table"]]
    cells["value"] = float(row["value"])
    cells["spread"] = float(row["spread"]) if row["spread"] else None
    for name in ("seeds", "rollouts", "steps"):
        cells[name] = int(row[name]) if row[name] else None
        if cells[name] is not None and cells[name] < 1:
            raise ValueError(f"{name} is {cells[name]}; expected at least 1")
    for name, known in (
        ("spread_kind", get_args(SpreadKind)),
        ("origin", get_args(Origin)),
        ("selection", SELECTIONS),
    ):
        if row[name] not in known:
            raise ValueError(f"{name} is {row[name]!r}; expected one of {', '.join(known)}")
    score = PublishedScore(**cells)
    if not math.isfinite(score.value):
        raise ValueError(f"value is {score.value}; expected a finite number")
    if (score.spread is None) != (score.spread_kind == "none"):
        raise ValueError(f"spread is {score.spread} of kind {score.spread_kind!r}")
    if score.spread is not None and not 0 <= score.spread < math.inf:
        raise ValueError(f"spread is {score.spread}; expected a finite number of at least 0")
    return score


@functools.cache
def _reference_scores() -> dict[str, tuple[float, float]]:
    scores: dict[str, tuple[float, float]] = {}
    source = resources.files(__name__) / "d4rl_reference_scores.csv"
    with source.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["env_or_dataset"]
            low, high = float(row["ref_min_score"]), float(row["ref_max_score"])
            if name in scores or not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"{source}: row {name!r} ({low}, {high}) is a duplicate or not an increasing "
                    "pair of finite numbers"
                )
            scores[name] = (low, high)
    return scores


def reference_scores() -> dict[str, tuple[float, float]]:
    """D4RL's (ref_min, ref_max), undiscounted returns, by legacy dataset or environment id."""
    return dict(_reference_scores())
