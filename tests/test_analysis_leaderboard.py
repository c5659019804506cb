"""From rows in a database to tables and figures: what is pooled, chosen, refused and named."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import leaderboard, plots
from analysis.load import MissingScoresError, evaluation_frame, load_scores, parse_select
from results.records import DatasetRecord, EvalRecord, MetricRecord, RunRecord, TrialRecord
from results.store import Store

TIME = "2031-05-06T07:08:09Z"
ROOT = Path(__file__).parent.parent


def dataset(name="line/a-v0", digest="d1", low=0.0, high=100.0) -> DatasetRecord:
    return DatasetRecord(name, digest, "Line-v0", "local", low, high, "measured", 10, 1)


def trial(label, data, seed, *, variant="v", returns=None, status="done", simulator="none"):
    """A trial with its run; returns: step -> returns of its episodes."""
    name = f"{label}/{data.dataset_id}/{data.digest}/{variant}/{simulator}/{seed}"
    records = [
        TrialRecord(
            trial_id=name,
            variant_id=f"{variant}{label}{data.dataset_id}",
            label=label,
            algorithm=label,
            revision=1,
            dataset_id=data.dataset_id,
            dataset_digest=data.digest,
            data={},
            config={"variant": variant},
            seed=seed,
            evaluation={"episodes": 2, "every": 10, "first_env_seed": 0},
            simulator=simulator,
            created_at=TIME,
        )
    ]
    if status is None:
        return records
    ended = None if status == "running" else TIME
    records.append(
        RunRecord(
            *(f"{name}#1", name, 1, status, TIME, ended, "", False, {}, {}, "cpu", False, (seed,))
        )
    )
    for step, values in (returns or {10: [50, 70]}).items():
        records += [
            EvalRecord(f"{name}#1", step, episode, episode, float(value), 5)
            for episode, value in enumerate(values)
        ]
    return records


@pytest.fixture
def store():
    with Store.open("sqlite://") as store:
        yield store


def fill(store, *groups):
    store.append([record for group in groups for record in group])


A, B = dataset(), dataset("line/b-v0", low=-100.0, high=300.0)


def complete(label, data, seeds=range(3), **options):
    return [record for seed in seeds for record in trial(label, data, seed, **options)]


def test_scores_are_fractions_between_the_references(store):
    fill(store, [A, B], complete("m", A), complete("m", B))
    scores = load_scores(store)
    assert scores.matrix("m") == [[0.6] * 3, [0.4] * 3]


@pytest.mark.parametrize(
    ("select", "expected"), [("last", 0.3), ("last-2", 0.5), ("last-3", 0.4), ("best", 0.7)]
)
def test_each_selection_rule_takes_its_evaluations(store, select, expected):
    curve = {10: [10, 30], 20: [60, 80], 30: [20, 40]}
    fill(store, [A], trial("m", A, 0, returns=curve))
    scores = load_scores(store, select=select)
    assert scores.matrix("m")[0][0] == pytest.approx(expected)
    assert scores.uses_test_rollouts == (select == "best")


@pytest.mark.parametrize("select", ["first", "last-0", "last-", "last-2.5", "", "bestt"])
def test_an_unknown_selection_rule_is_refused(select):
    with pytest.raises(ValueError, match=r"expected last, last-K .* or best"):
        parse_select(select)


def test_a_run_with_fewer_evaluations_than_the_rule_needs_is_named(store):
    fill(store, [A], trial("m", A, 0))
    (gap,) = load_scores(store, select="last-5").gaps("m", load_scores(store).tasks)
    assert "seed 0" in gap


@pytest.mark.parametrize("status", ["diverged", "failed", "running", "interrupted", None])
def test_a_seed_without_a_finished_run_is_named_and_its_method_not_aggregated(store, status):
    fill(
        store, [A], complete("whole", A), complete("m", A, [0, 1]), trial("m", A, 7, status=status)
    )
    ids = store.trials().trial_id
    board = leaderboard.build(store, ids)
    rows = {row.method: row for row in board.rows}
    assert rows["whole"].estimates is not None
    assert rows["m"].estimates is None
    assert "seed 7" in rows["m"].gaps[0]
    assert (status or "never run") in rows["m"].gaps[0]
    for form in ("markdown", "json", "csv", "rich", "latex"):
        assert (status or "never run") in board.render(form)
    with pytest.raises(MissingScoresError, match="m on line/a-v0: seed 7"):
        leaderboard.build(store, ids, on_missing="refuse")


def test_dropping_tasks_compares_all_methods_on_what_all_have(store):
    fill(store, [A, B], complete("m", A), complete("m", B), complete("other", A))
    shown = leaderboard.build(store)
    assert [row.method for row in shown.rows if row.estimates] == ["m"]
    dropped = leaderboard.build(store, on_missing="drop-task")
    assert [task.name for task in dropped.aggregated] == ["line/a-v0"]
    assert all(row.estimates for row in dropped.rows)
    assert any("other on line/b-v0: never run" in note for note in dropped.notes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_evaluation_that_is_not_finite_is_no_score(store, value):
    fill(store, [A], trial("m", A, 0, returns={10: [value, 1.0]}), complete("other", A))
    board = leaderboard.build(store)
    (gap,) = board.scores.gaps("m", board.tasks)
    assert gap == "line/a-v0: seed 0 has a return that is not finite"


def test_simulators_are_not_pooled(store):
    fill(
        store, [A], complete("m", A, simulator="mujoco 3.3"), complete("m", A, simulator="mujoco 4")
    )
    scores = load_scores(store)
    assert [task.name for task in scores.tasks] == [
        *("line/a-v0 [mujoco 3.3]", "line/a-v0 [mujoco 4]"),
    ]
    assert [len(values) for values in scores.matrix("m")] == [3, 3]


def test_contents_of_one_dataset_id_are_not_pooled(store):
    other = dataset(digest="d2", high=50.0)
    fill(store, [A, other], complete("m", A), complete("m", other))
    scores = load_scores(store)
    assert len(scores.tasks) == 2
    assert sorted(values[0] for values in scores.matrix("m")) == pytest.approx([0.6, 1.2])


def test_variants_of_one_label_are_rows_of_their_own_and_reported(store):
    low, high = {10: [10, 10]}, {10: [90, 90]}
    fill(
        store,
        *([A], complete("m", A, variant="x", returns=low)),
        complete("m", A, variant="y", returns=high),
    )
    scores = load_scores(store)
    assert len(scores.methods) == 2
    assert {scores.matrix(method)[0][0] for method in scores.methods} == {0.1, 0.9}
    assert any("m" in note and "configurations" in note for note in scores.notes)


def test_variants_that_differ_alike_meet_in_one_row_over_all_tasks(store):
    fill(store, [A, B], *(complete("m", A, variant=name) for name in "xy"))
    fill(store, complete("m", B, variant="x"))
    board = leaderboard.build(store)
    rows = {row.method: row for row in board.rows}
    assert set(rows) == {"m (variant=x)", "m (variant=y)"}
    assert rows["m (variant=x)"].estimates is not None
    assert rows["m (variant=y)"].gaps == ("line/b-v0: never run",)


def test_a_long_difference_is_named_by_a_hash_and_told_in_a_note(store):
    fill(store, [A], *(complete("m", A, variant=letter * 60) for letter in "xy"))
    scores = load_scores(store)
    assert len(scores.methods) == 2
    assert all(len(method) < 20 for method in scores.methods)
    assert any("variant=" + "x" * 60 in note for note in scores.notes)


def test_a_seed_evaluated_less_far_than_the_others_does_not_count(store):
    long = {10: [50, 50], 20: [60, 60]}
    fill(store, [A], complete("m", A, returns=long), trial("m", A, 5, returns={10: [50, 50]}))
    (gap,) = load_scores(store).gaps("m", load_scores(store).tasks)
    assert gap == "line/a-v0: seed 5 was evaluated only up to step 10 of 20"


def test_a_dataset_without_references_shows_raw_returns_and_is_not_aggregated(store):
    raw = dataset("line/raw-v0", low=None, high=None)
    fill(store, [A, raw], complete("m", A), complete("m", raw))
    board = leaderboard.build(store)
    assert [task.name for task in board.aggregated] == ["line/a-v0"]
    assert "line/raw-v0 (raw return)" in board.render("rich")
    assert any("line/raw-v0" in note for note in board.notes)
    cells = json.loads(board.render("json"))["cells"]
    assert {cell["unit"] for cell in cells if cell["task"] == "line/raw-v0"} == {"return"}


def test_tables_agree_in_every_form(store):
    returns = {10: [40, 60]}
    fill(store, [A, B], complete("weak_m", A, returns=returns), complete("weak_m", B))
    fill(store, complete("strong", A, returns={10: [90, 90]}), complete("strong", B))
    board = leaderboard.build(store, reps=500)
    assert [row.method for row in board.rows] == ["strong", "weak_m"]
    content = json.loads(board.render("json"))
    assert content["methods"][0]["aggregates"]["Mean"]["value"] == pytest.approx((0.9 + 0.4) / 2)
    lines = list(csv.DictReader(io.StringIO(board.render("csv"))))
    (mean,) = (line for line in lines if (line["method"], line["metric"]) == ("strong", "Mean"))
    assert float(mean["value"]) == content["methods"][0]["aggregates"]["Mean"]["value"]
    assert len([line for line in lines if line["kind"] == "score"]) == 12
    for form in ("markdown", "rich", "latex"):
        assert "65.0 [65.0, 65.0]" in board.render(form).replace("\\[", "[").replace("\\]", "]")
    assert r"weak\_m" in board.render("latex")
    with pytest.raises(ValueError, match="'html'; expected one of rich, markdown"):
        board.render("html")


def test_the_caption_names_protocol_references_and_simulator(store):
    fill(store, [A], complete("m", A, simulator="mujoco 3.11.0"))
    caption = " ".join(leaderboard.build(store, select="best").caption)
    for part in ("2 episodes every 10", "measured", "mujoco 3.11.0", "chosen by test rollouts"):
        assert part in caption


def test_the_caption_of_single_seeds_claims_no_interval_and_no_spread(store):
    fill(store, [A], complete("a", A, [0]))
    caption = " ".join(leaderboard.build(store).caption)
    assert "Aggregates over 1 task " in f"{caption} "
    assert "interval" not in caption
    assert "deviation" not in caption
    figure = plots.aggregate_intervals(leaderboard.build(store))
    assert "over 1 task, 1 seed, protocol last." in figure._supxlabel.get_text()


def test_few_evaluations_have_their_ticks(store):
    fill(store, [A], complete("a", A, returns={10: [50], 20: [60], 25: [70]}))
    figure = plots.learning_curves(evaluation_frame(store), leaderboard.build(store))
    assert list(figure.axes[0].get_xticks()) == [10, 20, 25]


def test_few_seeds_have_no_interval_and_the_leaderboard_says_so(store):
    fill(store, [A], complete("m", A, range(2)))
    board = leaderboard.build(store)
    assert board.rows[0].estimates["IQM"].low is None
    assert any("No interval, for want of 3 seeds" in note for note in board.notes)


def test_methods_with_enough_seeds_have_ranks_and_tie_groups(store):
    fill(store, [A, B])
    for label, mean in (("top", 80), ("twin", 80), ("low", 10)):
        for data in (A, B):
            for seed in range(5):
                fill(store, trial(label, data, seed, returns={10: [mean + seed, mean - seed]}))
    for data in (A, B):
        fill(store, complete("few", data, seeds=range(2)))
    built = leaderboard.build(store)
    ranks = {rank.method: rank for rank in built.comparison.ranks}
    assert set(ranks) == {"top", "twin", "low"}
    assert (ranks["top"].rank, ranks["twin"].rank, ranks["low"].rank) == (1.5, 1.5, 3)
    assert (ranks["low"].low, ranks["low"].high) == (3, 3)
    assert [ranks[m].group for m in ("top", "twin", "low")] == ["a", "a", "b"]
    text = built.render("markdown")
    assert "| low | 3 \\[3, 3\\] b |" in text
    assert "| few | – |" in text
    assert "share a letter" in text
    assert "low,,Rank,,3.0,3.0,3.0,rank,b" in built.render("csv")
    content = json.loads(built.render("json"))["comparison"]
    assert len(content["pairs"]) == 3
    assert content["ranks"][2]["group"] == "b"


def test_an_interval_of_another_kind_is_named_in_the_caption(store):
    for seed, score in enumerate((20, 50, 80)):
        fill(store, [A], trial("m", A, seed, returns={10: [score]}))
    percentile, t = (leaderboard.build(store, interval=kind) for kind in ("percentile", "t"))
    assert t.rows[0].estimates["Mean"].low < percentile.rows[0].estimates["Mean"].low
    assert "95 % t intervals" in t.render("markdown")
    assert "95 % percentile intervals of a stratified bootstrap" in percentile.render("markdown")
    with pytest.raises(ValueError, match="interval is 'z'; expected percentile, bca, t"):
        leaderboard.build(store, interval="z")


def test_one_method_has_no_rank(store):
    fill(store, [A], complete("m", A))
    built = leaderboard.build(store)
    assert built.comparison is None
    assert "Rank" not in built.render("markdown")


def test_equal_databases_give_equal_bytes(store, tmp_path):
    curve = {step: [step, step + 5] for step in (10, 20, 30)}
    fill(store, [A, B], complete("m", A, returns=curve), complete("m", B, returns=curve))
    fill(store, complete("n", A, returns=curve), complete("n", B, [0, 1], returns=curve))
    for form in leaderboard.FORMATS:
        first = leaderboard.build(store, seed=4).render(form)
        assert first == leaderboard.build(store, seed=4).render(form)
    first = plots.write_figures(store, tmp_path / "a")
    again = plots.write_figures(store, tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in again]
    assert {path.suffix for path in first} == {".pdf", ".png", ".json"}
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_figure_names_its_runs_seeds_and_interval(store, tmp_path):
    curve = {step: [step, step + 5] for step in (10, 20)}
    diverged = trial("m", A, 9, returns=curve, status="diverged")
    fill(store, [A], complete("m", A, returns=curve), diverged)
    plots.write_figures(store, tmp_path)
    content = json.loads((tmp_path / "learning_curves.json").read_text())
    (line,) = content["lines"]
    assert line["seeds"] == [0, 1, 2]
    assert len(line["run_ids"]) == len(line["trial_ids"]) == 3
    assert "bootstrap" in content["interval"]
    assert content["not_drawn"] == ["m on line/a-v0: seed 9 diverged"]


def test_nothing_to_draw_is_said(store, tmp_path):
    fill(store, [A], trial("m", A, 0, status="running"))
    with pytest.raises(ValueError, match="no finished run"):
        plots.write_figures(store, tmp_path)


def test_importing_analysis_imports_neither_seaborn_nor_pandas():
    code = (
        "import analysis.plots, analysis.leaderboard, sys;"
        "print([name for name in ('seaborn', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


def with_losses(records, losses):
    run = next(record.run_id for record in records if isinstance(record, RunRecord))
    return [*records, *(MetricRecord(run, step, "bc_loss", v) for step, v in losses.items())]


FALLING = {5: 9.0, 10: 7.0, 20: 6.0, 30: 5.0, 40: 4.0}
RISING = {5: 9.0, 10: 1.0, 20: 3.0, 30: 4.0, 40: 0.0}  # stops at 30; 10 and 5 average to 5


@pytest.mark.parametrize(
    ("losses", "select", "expected"),
    [
        (FALLING, "cloning-loss", 0.4),
        (FALLING, "cloning-loss-2", 0.3),  # the code's quirk and the paper agree here
        (FALLING, "cloning-loss-3", 0.2),
        (RISING, "cloning-loss", 0.2),
        (RISING, "cloning-loss-2", 0.3),
        (RISING, "cloning-loss-3", 0.1),
        (RISING, "cloning-loss-9", 0.1),  # the last rank there is
    ],
)
def test_offline_selection_takes_the_checkpoint_of_that_rank(store, losses, select, expected):
    curve = {10: [10], 20: [20], 30: [30], 40: [40]}
    fill(store, [A], with_losses(trial("m", A, 0, returns=curve), losses))
    scores = load_scores(store, select=select)
    assert scores.matrix("m") == [[pytest.approx(expected)]]
    assert not scores.uses_test_rollouts


@pytest.mark.parametrize(
    ("losses", "select", "reason"),
    [
        ({}, "cloning-loss", "has no metric bc_loss"),
        ({5: 1.0}, "cloning-loss", "no finite bc_loss between steps 10 and 20"),
    ],
)
def test_offline_selection_names_what_it_lacks(store, losses, select, reason):
    curve = {10: [10], 20: [20], 30: [30], 40: [40]}
    fill(store, [A], with_losses(trial("m", A, 0, returns=curve), losses))
    scores = load_scores(store, select=select)
    assert reason in scores.gaps("m", scores.tasks)[0]


def test_one_variant_under_two_labels_is_one_method(store):
    """Two experiments named it differently; seeds of one setting are not told apart by that."""
    first, second = complete("iql", A), complete("iql", A, [3, 4])
    renamed = [
        dataclasses.replace(record, label="tuned") if isinstance(record, TrialRecord) else record
        for record in second
    ]
    fill(store, [A], first, renamed, complete("bc", A))
    scores = load_scores(store)
    assert scores.methods == ("bc", "iql")
    assert sorted(scores.cells["iql", A.dataset_id].scores) == [0, 1, 2, 3, 4]
    assert "tuned shown as iql: the same settings" in scores.notes
    store.show_labels({record.trial_id: "tuned" for record in (*first, *second)
                       if isinstance(record, TrialRecord)})  # fmt: skip
    assert load_scores(store).methods == ("bc", "tuned")


def test_what_was_planned_and_never_ran_is_no_part_of_all_that_ran(store):
    other = dataset(digest="d2")
    fill(store, [A, other], complete("m", A), trial("m", other, 0, status=None, variant="w"))
    frame = evaluation_frame(store)
    assert set(frame.method) == {"m"}
    assert set(frame.task) == {A.dataset_id}


@pytest.mark.parametrize(("low", "high"), [(5.0, 5.0), (100.0, 0.0)])
def test_references_that_do_not_span_a_range_normalise_nothing(store, low, high):
    odd = dataset(low=low, high=high)
    fill(store, [odd], complete("m", odd))
    assert load_scores(store).matrix("m") == [[60.0] * 3]
    assert not load_scores(store).tasks[0].normalized


def test_lines_of_a_second_round_of_colours_differ():
    colours = plots.palette([f"m{i:02d}" for i in range(20)])
    shown = {(colour, str(plots.line_style(i))) for i, colour in enumerate(colours.values())}
    assert len(shown) == 20
