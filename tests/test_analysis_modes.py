"""Task entropy: closed forms, which episodes count, the page, the figure, the command."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from typer.testing import CliRunner

from analysis import modes
from harness import cli
from results.records import EvalRecord
from results.store import Store
from tests.test_analysis_leaderboard import dataset, trial

MAZE, OTHER = dataset("maze/a-v0", low=0.0, high=1.0), dataset("line/a-v0")


def told(label, seed, by_step, data=MAZE, **options):
    """A trial whose episodes had these modes; None is an episode without a solution."""
    returns = {step: [float(m is not None) for m in found] for step, found in by_step.items()}
    for record in trial(label, data, seed, returns=returns, **options):
        if isinstance(record, EvalRecord):
            record = dataclasses.replace(record, mode=by_step[record.step][record.episode])
        yield record


def fill(store):
    records = [MAZE, OTHER]
    for seed in range(3):
        records += told("all", seed, {10: [0, 0, 0, 0], 20: [0, 1, 2, 3]})
        records += told("half", seed, {20: [0, 0, 2, 2, None, None, None, None]})
        records += told("one", seed, {20: [3] * (seed + 1) + [None]})
        records += told("none", seed, {20: [None, None if seed else 1]})
        records += trial("all", OTHER, seed)
    records += told("half", 3, {20: [1, 1]}, status="running")
    store.append(records)


@pytest.fixture
def store():
    with Store.open("sqlite://") as store:
        fill(store)
        yield store


@pytest.mark.parametrize(
    ("counts", "base", "expected"),
    [
        ([5, 5, 5, 5], 4, 1.0),
        ([7, 7, 0, 0], 4, 0.5),
        ([9, 0], 2, 0.0),
        ([3, 1], 2, 0.8112781244591328),  # of a fair coin's bits
        ([4], 1, 0.0),
    ],
)
def test_entropy_is_a_share_of_the_log_of_the_number_of_solutions(counts, base, expected):
    assert modes.entropy(counts, base) == pytest.approx(expected)
    assert math.isnan(modes.entropy([0] * len(counts), base))


def test_the_last_evaluation_of_finished_runs_counts_and_failures_are_no_solution(store):
    report = modes.build(store)
    assert report.modes == {"maze/a-v0": 4}
    found = {method: row for (_, method), row in report.estimates.items()}
    assert {task for task, _ in report.estimates} == {"maze/a-v0"}
    values = {m: (row["solved"].value, row["entropy"] and row["entropy"].value)
              for m, row in found.items()}  # fmt: skip
    assert values == {
        "all": (1.0, pytest.approx(1.0)),
        "half": (0.5, pytest.approx(0.5)),
        "one": (pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3), 0.0),
        "none": (pytest.approx(1 / 6), None),  # two of the seeds have no solution at all
    }
    assert report.notes == (
        "1 trials have no finished run",
        "left out, as its environment tells no modes: line/a-v0",
    )
    assert len(report.numbers) == 12


def test_the_number_of_solutions_can_be_said_and_not_be_too_small(store):
    assert modes.build(store, modes=16).estimates["maze/a-v0", "all"]["entropy"].value == (
        pytest.approx(0.5)
    )
    with pytest.raises(ValueError, match="3 modes were given, but mode 3 was seen"):
        modes.build(store, modes=3)
    others = store.trials().query("dataset_id == 'line/a-v0'").trial_id
    with pytest.raises(ValueError, match=r"says which solution.*generated/pointmaze/routes-v0"):
        modes.build(store, others)


def test_the_command_writes_page_numbers_and_figure(tmp_path):
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as store:
        fill(store)
    arguments = ["modes", "--db", url, "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["numbers"]) == 12
    page = (tmp_path / "out" / "modes.md").read_text()
    assert "| 0.500" in page
    assert "none solved in some seed" in page
    assert "1.00/0.00/0.00/0.00" not in page  # every method's mean over all of its seeds
    source = json.loads((tmp_path / "out" / "modes.json").read_text())
    assert len(source["run_ids"]) == 12
    assert (tmp_path / "out" / "modes.png").stat().st_size > 10_000


def test_each_task_has_its_own_number_of_solutions(store):
    other = dataset("maze/b-v0", low=0.0, high=1.0)
    store.append([other])
    store.append([r for seed in range(3) for r in told("all", seed, {20: [0, 1]}, data=other)])
    report = modes.build(store)
    assert report.modes == {"maze/a-v0": 4, "maze/b-v0": 2}
    assert report.estimates["maze/b-v0", "all"]["entropy"].value == pytest.approx(1.0)
    assert "maze/a-v0: 4, maze/b-v0: 2" in modes.about(report)
    _, body = modes.rows(report)
    assert body[-1][-1] == "0.50/0.50"
    modes.figure(report)
