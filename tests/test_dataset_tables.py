"""Tables of datasets and methods: averages, what is bold, captions, the same numbers everywhere."""

from __future__ import annotations

import csv
import io

import pytest
from test_analysis_leaderboard import complete, dataset, fill, trial

from analysis import dataset_tables, tables
from results.store import Store

HOPPER = [dataset(f"mujoco/hopper/{name}-v0") for name in ("expert", "medium")]
WALKER = dataset("mujoco/walker2d/medium-v0")
RETURNS = {0: 50, 1: 60, 2: 70}


@pytest.fixture
def store():
    with Store.open("sqlite://") as store:
        yield store


def seeded(label, data, shift=0.0):
    return [
        record
        for seed, value in RETURNS.items()
        for record in trial(label, data, seed, returns={10: [value + shift]})
    ]


def test_averages_are_over_means_of_datasets_by_environment(store):
    fill(store, [*HOPPER, WALKER], seeded("m", HOPPER[0]), seeded("m", HOPPER[1], 10))
    fill(store, seeded("m", WALKER, -30))
    (table,) = dataset_tables.make(store)
    found = {row.name: row.entries[0].mean for row in table.rows}
    assert found["Average of hopper"] == pytest.approx(0.65)
    assert found["Average"] == pytest.approx((0.6 + 0.7 + 0.3) / 3)
    assert "Average of walker2d" not in found  # one dataset is its own average


def test_bold_is_the_best_and_what_its_interval_reaches(store):
    fill(store, [WALKER], seeded("best", WALKER, 5), seeded("close", WALKER))
    fill(store, seeded("far", WALKER, -40), trial("one_seed", WALKER, 0, returns={10: [64]}))
    (table,) = dataset_tables.make(store)
    (row,) = table.rows
    bold = {m for m, entry in zip(table.methods, row.entries, strict=True) if entry.bold}
    assert bold == {"best", "close"}  # without an interval, only the best mean itself


def test_an_average_that_lacks_a_seed_is_left_out_and_says_so(store):
    fill(store, HOPPER, complete("m", HOPPER[0]), complete("m", HOPPER[1], [0, 1]))
    fill(store, trial("m", HOPPER[1], 2, status="diverged"))
    (table,) = dataset_tables.make(store)
    average = next(row for row in table.rows if row.kind == "average").entries[0]
    assert average.mean is None
    assert "seed 2 diverged" in average.note
    text = dataset_tables.render([table], "markdown")
    assert "m on mujoco/hopper/medium\\-v0" in text or "seed 2 diverged" in text
    assert "\\*" in text


@pytest.mark.parametrize("form", dataset_tables.FORMATS)
def test_every_form_carries_protocol_seeds_spread_references_and_version(store, form):
    fill(store, [WALKER], seeded("m", WALKER))
    text = dataset_tables.render(dataset_tables.make(store), form)
    for part in ("2 episodes every 10", "standard deviation", "measured", "Code: ", "Bold: "):
        assert part in text, part


def test_forms_agree(store):
    fill(store, [WALKER], seeded("a_b", WALKER), seeded("far", WALKER, -40))
    made = dataset_tables.make(store)
    rows = list(csv.DictReader(io.StringIO(dataset_tables.render(made, "csv"))))
    cell = next(row for row in rows if row["method"] == "a_b")
    assert (float(cell["mean"]), float(cell["std"]), cell["seeds"]) == (
        0.6,
        pytest.approx(0.1),
        "3",
    )
    assert "**60.0 ± 10.0 (3)**" in dataset_tables.render(made, "markdown")
    latex = dataset_tables.render(made, "latex")
    assert r"\textbf{60.0 $\pm$ 10.0 (3)} & 20.0 $\pm$ 10.0 (3) \\" in latex
    assert r"a\_b" in latex
    assert tables.tex("-6.8 [-7, 3-4] a-2 (-1)") == "$-$6.8 [$-$7, 3-4] a-2 ($-$1)"
    for command in ("toprule", "midrule", "bottomrule"):
        assert f"\\{command}" in latex


def test_planned_seeds_that_never_ran_are_missing_where_they_are_asked_for(store):
    planned = trial("m", WALKER, 3, status=None)
    fill(store, [WALKER], seeded("m", WALKER), planned)
    (table,) = dataset_tables.make(store, list(store.trials().trial_id))
    assert any("seed 3 never run" in note for note in table.notes)
    (table,) = dataset_tables.make(store)  # of all that ran it is no part
    assert not table.notes


def test_an_unknown_form_and_nothing_to_show_are_said(store):
    with pytest.raises(ValueError, match="expected one of markdown, latex, csv"):
        dataset_tables.render([], "html")
    with pytest.raises(ValueError, match="no run to show"):
        dataset_tables.make(store)
