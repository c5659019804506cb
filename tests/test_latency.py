"""Latency of trained policies: what is timed, how often, where it is kept and drawn."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from analysis import leaderboard, plots
from analysis.load import latency_frame
from harness import cli, latency, policies
from harness.cli.policies import latency_tables
from harness.home import Home
from harness.registry import Registry
from harness.spec import load_experiment
from results.records import LatencyRecord
from results.store import Store
from tests import inline
from tests.test_analysis_leaderboard import A, complete, fill

SPEC = """
name: tiny
algorithms:
  wide: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8}}
  point: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8, head: deterministic, sample_actions: false}}
datasets: [generated/bandit2d-v0]
seeds: 0-1
steps: 10
evaluation: {every: 10, episodes: 4}
run: {log_every: 5, compile: "off", device: cpu}
"""  # noqa: E501


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def home() -> Home:
    return Home.find(os.environ["HARNESS_HOME"])


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def find(words, home, **options):
    with Store.open(home.database_url()) as store:
        return policies.named([str(word) for word in words], store, home, Registry(), **options)


# ------------------------------------------------------------------------- which policies


def test_a_policy_is_found_by_experiment_run_and_trial_each_once(spec, home):
    inline.sweep(spec, home.root)
    everything, left_out = find([spec], home)
    assert left_out == {}
    assert [each.trial for each in everything] == list(load_experiment(spec, []).trials)
    (chosen,) = (each for each in everything if each.title.startswith("point") and
                 each.trial.seed == 1)  # fmt: skip
    for words in (
        [chosen.run_id],
        [chosen.trial.id],
        [chosen.trial.id[:10]],
        [spec, "seeds=1", "algorithms=[point]"],
        [chosen.run_id, chosen.trial.id],
    ):
        assert find(words, home) == ([chosen], {})


def test_what_names_no_single_policy_is_refused(spec, home):
    with pytest.raises(ValueError, match=r"4 of 4 trials .*never run.*Sweep the experiment first"):
        find([spec], home)
    inline.sweep(spec, home.root, ["seeds=0"])
    with pytest.raises(ValueError, match=r"2 of 4 .*wide seed 1 \(never run\).*--partial"):
        find([spec], home)
    trained, left_out = find([spec], home, partial=True)
    assert len(trained) == len(left_out) == 2
    for words, message in (
        (["zzz"], "no run and no trial"),
        ([""], r"of 2 trials in this database. Give more"),
        (["seeds=0"], "names no policy"),
        ([trained[0].run_id, "seeds=0"], "overrides such as seeds=0 belong to"),
    ):
        with pytest.raises(ValueError, match=message):
            find(words, home)


def test_a_row_that_hashes_to_another_trial_is_refused(spec, home):
    import sqlite3

    inline.sweep(spec, home.root, ["seeds=0"])
    ((chosen, *_), _) = find([spec, "seeds=0"], home)
    with sqlite3.connect(home.root / "results.db") as database:
        database.execute("UPDATE trials SET seed = 7 WHERE trial_id = ?", (chosen.trial.id,))
    with pytest.raises(ValueError, match="another version of the harness identified it"):
        find([chosen.trial.id], home)


# ----------------------------------------------------------------------------- measuring


def measured(words, home, **options) -> list[LatencyRecord]:
    trained, _ = find(words, home)
    loader = policies.Loader(Registry(), torch.device("cpu"))
    return latency.measure(trained, loader, **{"seconds": 0.01, "rounds": 2, **options})


def test_the_sleep_of_a_policy_is_found_at_each_batch_and_one_seed_acts(spec, home, monkeypatch):
    from algorithms.bc import BehaviourCloning

    inline.sweep(spec, home.root)
    shapes = []

    def slow(self, obs, rng):
        shapes.append(tuple(obs.shape))
        rng.normal(obs.shape[1], 1)  # the source of random numbers fits the rows
        time.sleep(0.002 * obs.shape[1])
        return torch.zeros(*obs.shape[:2], 2)

    monkeypatch.setattr(BehaviourCloning, "act", slow)
    told = []
    records = measured(
        [spec, "algorithms=[wide]"], home, batches=(1, 5), report=lambda *text: told.append(text)
    )
    assert [(r.batch, r.compiled, r.device, r.threads) for r in records] == [
        (1, False, "cpu", 1),
        (5, False, "cpu", 1),
    ] * 2
    for record in records:
        assert record.median_ms >= 2 * record.batch
        assert record.p99_ms >= record.median_ms >= min(record.round_medians_ms)
        assert record.calls >= 2 * latency.LEAST_CALLS
        assert len(record.round_medians_ms) == 2
    assert set(shapes) == {(1, 1, 2), (1, 5, 2)}
    assert told[0][0] == 0
    assert told[-1][:2] == (12, 12)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))


def test_contenders_take_turns(spec, home, monkeypatch):
    inline.sweep(spec, home.root, ["seeds=0"])
    order = []
    turn = latency._Contender.turn
    monkeypatch.setattr(
        latency._Contender,
        "turn",
        lambda self, seconds: (order.append((self.title, self.batch)), turn(self, seconds))[1],
    )
    measured([spec, "seeds=0"], home, batches=(1, 3))
    assert len(order) == 8
    assert order[:4] == order[4:]
    assert len(set(order)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (1, 0)}, "batch is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
    ],
)
def test_numbers_that_are_not_positive_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        latency.measure([], None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ms", [12.345678, 0.000123456, 12345.678])
def test_a_narrow_terminal_shows_every_number_whole(spec, ms):
    trials = {trial.id: trial for trial in load_experiment(spec).trials}
    shared = {"measured_at": "", "device": "cpu", "threads": 1, "versions": {}, "hardware": {}}
    records = [
        LatencyRecord(
            run_id=run_id,
            batch=batch,
            compiled=True,
            calls=10_000,
            median_ms=ms,
            p99_ms=3 * ms,
            round_medians_ms=(ms, 2 * ms),
            **shared,
        )
        for run_id in trials
        for batch in (1, 256)
    ]
    out = io.StringIO()
    for table in latency_tables(records, trials):
        Console(file=out, width=80).print(table)
    shown = out.getvalue()
    assert "generated/bandit2d-v0" in shown
    for number in (f"{ms:.4g} to {2 * ms:.4g}", f"{3 * ms:.4g}", f"{ms / 256:.4g}", "10000"):
        assert shown.count(number) >= len(trials), shown


def test_the_command_keeps_what_it_measured_with_the_run(spec, home):
    inline.sweep(spec, home.root)
    few = ("--batch", 4, "--rounds", 2, "--seconds", 0.01)
    done = invoke("latency", spec, "seeds=0", *few, "--json")
    assert done.exit_code == cli.OK, done.output
    shown = json.loads(done.stdout)["latencies"]
    with Store.open(home.database_url()) as store:
        stored = list(store.records([LatencyRecord]))
        assert len(stored) == len(shown) == 4
        for row in shown:
            assert row["median_ms_per_action"] == row["median_ms"] / row["batch"]
            assert any(
                (record.run_id, record.batch, record.median_ms)
                == (row["run_id"], row["batch"], row["median_ms"])
                for record in stored
            )
        assert set(latency_frame(store).ms) == {row["median_ms_per_action"] for row in shown}
    done = invoke("latency", shown[0]["run_id"], *few)
    assert done.exit_code == cli.OK, done.output
    assert "one seed's act()" in " ".join(done.stdout.split())
    done = invoke("figures", spec, "--out", home.root / "drawn")
    assert done.exit_code == cli.OK, done.output
    assert (home.root / "drawn" / "score_latency.pdf").exists()


@pytest.mark.slow
def test_a_compiled_call_is_measured_beside_the_eager_one(spec, home):
    inline.sweep(spec, home.root, ["seeds=0"])
    records = measured([spec, "seeds=0"], home, batches=(1,), compiled=True)
    assert [record.compiled for record in records] == [False, True] * 2


# ------------------------------------------------------------------------------ the figure


def latency_of(run: str, **changes) -> LatencyRecord:
    values = {
        "run_id": run,
        "measured_at": "2031-05-06T07:08:09Z",
        "batch": 1,
        "compiled": False,
        "device": "cpu",
        "threads": 1,
        "calls": 100,
        "median_ms": 2.0,
        "p99_ms": 3.0,
        "round_medians_ms": (1.0, 4.0),
        "versions": {},
        "hardware": {"cpu": "A"},
    }
    return LatencyRecord(**{**values, **changes})


def test_points_join_scores_and_the_newest_latency_and_never_pool_conditions(tmp_path):
    with Store.open("sqlite://") as store:
        fill(store, [A], complete("slow", A), complete("fast", A), complete("unmeasured", A))
        runs = dict(zip(store.runs().trial_id, store.runs().run_id, strict=True))
        slow = [run for trial, run in runs.items() if trial.startswith("slow")]
        (fast, *_) = (run for trial, run in runs.items() if trial.startswith("fast"))
        store.append(
            [
                *(latency_of(run, median_ms=2.0 + i) for i, run in enumerate(slow)),
                latency_of(slow[0], batch=256, median_ms=99.0),
                latency_of(fast, median_ms=50.0),
                latency_of(fast, median_ms=0.5, measured_at="2031-05-06T07:08:10Z"),
                latency_of(fast, median_ms=0.25, compiled=True),
                latency_of(
                    fast,
                    median_ms=0.125,
                    measured_at="2031-05-06T07:08:11Z",
                    hardware={"cpu": "B"},
                ),
            ]
        )
        board = leaderboard.build(store, reps=100)
        points = plots.latency_points(board, latency_frame(store))
        assert [(p.method, p.condition, p.ms) for p in points] == [
            ("fast", "A, 1 thread, compiled", 0.25),
            ("fast", "A, 1 thread, eager", 0.5),
            ("fast", "B, 1 thread, eager", 0.125),
            ("slow", "A, 1 thread, eager", 3.0),
        ]
        assert points[3].ms_range == (1.0, 4.0)
        assert points[3].run_ids == tuple(sorted(slow))
        assert points[3].seeds == 3
        assert points[3].score == pytest.approx(0.6)
        assert points[3].interval == pytest.approx((0.6, 0.6))
        paths = plots.write_figures(store, tmp_path)
        source = json.loads((tmp_path / "score_latency.json").read_text())
        assert {path.stem for path in paths} == {"learning_curves", "aggregates", "score_latency"}
        assert [point["ms"] for point in source["points"]] == [point.ms for point in points]
        (axis,) = plots.score_latency(points, board).axes
        drawn = sorted(line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1)
        assert drawn == [0.125, 0.25, 0.5, 3.0]


def test_without_latencies_there_is_no_such_figure(tmp_path):
    with Store.open("sqlite://") as store:
        fill(store, [A], complete("m", A))
        paths = plots.write_figures(store, tmp_path)
    assert {path.stem for path in paths} == {"learning_curves", "aggregates"}
