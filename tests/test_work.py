"""Shares of a sweep without Ray: who works on what, and what the sweep after them finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness import cli
from harness.home import Home
from harness.plan import make_plan
from harness.spec import load_experiment
from harness.work import Shard, work
from results.store import Store
from tests import inline

SPEC = """
name: shares
algorithms:
  bc: {config: {hidden_dim: 8, batch_size: 8}}
  wide: {algorithm: bc, config: {hidden_dim: 16, batch_size: 8}}
datasets: [generated/bandit2d-v0]
seeds: 0-4
steps: 20
evaluation: {every: 10, episodes: 2}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu, max_stack: 2}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "shares.yaml"
    path.write_text(SPEC)
    return path


def do(spec, home, shard, stop_file, store=None, report=lambda stack, progress: None):
    ended = []
    experiment = Shard.parse(shard).of(load_experiment(spec, []))
    done = work(experiment, home, store, report, lambda stack, text: ended.append(text), stop_file)
    return done, ended


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shares_are_a_partition_and_keep_stacks_together(spec, count):
    experiment = load_experiment(spec, [])
    shares = [Shard(index, count).of(experiment).trials for index in range(count)]
    ids = [trial.id for share in shares for trial in share]
    assert sorted(ids) == sorted(trial.id for trial in experiment.trials)
    assert len(set(ids)) == len(ids)
    for share in shares:
        for label in ("bc", "wide"):
            seeds = {trial.seed for trial in share if trial.label == label}
            # Five seeds in stacks of at most two: {0, 1}, {2, 3}, {4}.
            assert all((seed ^ 1) in seeds for seed in seeds if seed < 4)


@pytest.mark.parametrize(
    ("count", "overrides", "sizes"),
    [
        (4, ["algorithms=bc", "run.max_stack=16"], [2, 1, 1, 1]),
        (3, ["run.max_stack=16"], [3, 2, 5]),
        (9, [], [1, 1, 1, 1, 1, 2, 1, 1, 1]),
        (12, [], [1] * 10 + [0, 0]),
    ],
)
def test_stacks_are_made_smaller_where_there_are_more_shares(spec, count, overrides, sizes):
    experiment = load_experiment(spec, overrides)
    shares = [Shard(index, count).of(experiment).trials for index in range(count)]
    ids = [trial.id for share in shares for trial in share]
    assert sorted(ids) == sorted(trial.id for trial in experiment.trials)
    assert [len(share) for share in shares] == sizes


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "1/", "0/0"])
def test_impossible_shares_are_refused(text):
    with pytest.raises(ValueError, match="expected INDEX/COUNT"):
        Shard.parse(text)


def test_the_command_counts_stacks(spec, tmp_path):
    """Five seeds in stacks of at most two."""
    arguments = ["work", str(spec), "algorithms=[bc]", "--home", str(tmp_path / "home")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == cli.OK, result.output
    counts = [line.partition(" ")[0] for line in result.output.splitlines() if line[0] == "["]
    assert counts == ["[1/3]", "[2/3]", "[3/3]"]


def test_shares_leave_what_a_sweep_takes_in_without_training(spec, tmp_path):
    assert inline.sweep(spec, tmp_path / "whole").ok
    home = Home.find(tmp_path / "shared")
    stacks = 0
    for shard in ("0/2", "1/2"):
        done, ended = do(spec, home, shard, tmp_path / "stop")
        assert not done.failed
        assert set(ended) == {"done"}
        stacks += done.stacks
    assert stacks == 6
    summary = inline.sweep(spec, home.root)
    assert summary.ok
    assert summary.trained == 0
    assert inline.rows(home.root) == inline.rows(tmp_path / "whole")
    with Store.open(home.database_url()) as store:
        again, ended = do(spec, home, "0/2", tmp_path / "stop", store)
    assert (again.stacks, ended) == (0, [])


def test_a_share_that_was_stopped_continues_to_the_same_rows(spec, tmp_path):
    assert inline.sweep(spec, tmp_path / "whole").ok
    home, stop = Home.find(tmp_path / "shared"), tmp_path / "stop"
    done, _ = do(spec, home, "0/1", stop, report=lambda stack, progress: stop.touch())
    assert done.interrupted
    stop.unlink()
    done, _ = do(spec, home, "0/1", stop)
    assert not done.interrupted
    assert inline.sweep(spec, home.root).trained == 0
    assert inline.rows(home.root) == inline.rows(tmp_path / "whole")


def test_one_failing_stack_does_not_stop_the_others(spec, tmp_path, monkeypatch):
    from algorithms.bc import BehaviourCloning

    loss, calls = BehaviourCloning.update, []

    def broken(learner, batch, rng):
        calls.extend([1] * (learner.config.hidden_dim == 16))
        if len(calls) > 5 and learner.config.hidden_dim == 16:  # not when it is tried beforehand
            raise RuntimeError("out of luck")
        return loss(learner, batch, rng)

    monkeypatch.setattr(BehaviourCloning, "update", broken)
    done, ended = do(spec, Home.find(tmp_path / "home"), "0/1", tmp_path / "stop")
    assert done.stacks == 3
    assert len(done.failed) == 5
    assert sorted(set(ended)) == ["done", "failed: RuntimeError: out of luck"]


def test_rows_of_another_experiments_evaluation_of_the_same_training_do_not_stop_a_sweep(
    spec, tmp_path
):
    """`work` registers no trials: those of the other evaluation are unknown to the database."""
    home = Home.find(tmp_path / "home")
    do(spec, home, "0/1", tmp_path / "stop")
    text = spec.read_text()
    spec.write_text(text.replace("episodes: 2", "episodes: 3"))
    do(spec, home, "0/1", tmp_path / "stop")
    summary = inline.sweep(spec, home.root)
    assert summary.ok
    assert summary.trained == 0
    with Store.open(home.database_url()) as store:
        assert set(store.evaluations().groupby("run_id").size()) == {2 * 3}
        assert len(store.runs()) == 10
    spec.write_text(text)  # and those of the first are taken in when their turn comes
    assert inline.sweep(spec, home.root).trained == 0
    with Store.open(home.database_url()) as store:
        assert len(store.runs()) == 20


def test_a_sweep_leaves_the_rows_of_another_experiment_where_its_own_sweep_finds_them(
    spec, tmp_path
):
    home = Home.find(tmp_path / "home")
    do(spec, home, "0/1", tmp_path / "stop")
    text = spec.read_text()
    spec.write_text(text.replace("episodes: 2", "episodes: 3"))
    other = inline.sweep(spec, home.root)
    assert other.ok
    assert other.trained == 6
    spec.write_text(text)
    assert inline.sweep(spec, home.root).trained == 0
    with Store.open(home.database_url()) as store:
        assert len(store.runs()) == 20


def test_sweeps_with_databases_of_their_own_may_share_a_home(spec, tmp_path, monkeypatch):
    """The second finds an artifact whose run its database does not have."""
    for name, episodes in (("a", 2), ("b", 3)):
        monkeypatch.setenv("HARNESS_DB", f"sqlite:///{tmp_path / name}.db")
        overrides = ["seeds=0-1", f"evaluation.episodes={episodes}"]
        first, again = (inline.sweep(spec, tmp_path / "home", overrides) for _ in range(2))
        assert first.ok
        assert (first.trained, again.trained) == (2, 0)
        with Store.open(f"sqlite:///{tmp_path / name}.db") as store:
            assert set(store.evaluations().groupby("run_id").size()) == {2 * episodes}


def test_a_share_trains_nothing_that_a_sweep_finished_since_it_was_planned(
    spec, tmp_path, monkeypatch
):
    home = Home.find(tmp_path / "home")

    def make_plan_early(*arguments, **options):
        plan = make_plan(*arguments, **options)
        assert inline.sweep(spec, home.root).ok
        return plan

    monkeypatch.setattr("harness.work.make_plan", make_plan_early)
    with Store.open(home.database_url()) as store:
        done, ended = do(spec, home, "0/1", tmp_path / "stop", store)
        assert {len(found) for found in store.runs()["segments"]} == {1}
    assert (done.stacks, done.failed, set(ended)) == (0, {}, {"done by another process"})


def test_dry_run_and_status_know_what_shares_have_done(spec, tmp_path):
    """They register no trials, and yet must not announce hours of training that nobody will do."""
    home = tmp_path / "home"
    do(spec, Home.find(home), "0/2", tmp_path / "stop")
    command = ["sweep", str(spec), "--home", str(home), "--dry-run", "--json"]
    plan = json.loads(CliRunner().invoke(cli.app, command).stdout)
    assert (plan["counts"]["trials_done"], plan["counts"]["stacks"]) == (5, 3)
    told = json.loads(
        CliRunner().invoke(cli.app, ["status", str(spec), "--home", str(home), "--json"]).stdout
    )
    assert (told["not_in_database"], told["not_planned_yet"]) == (5, 5)
    assert sum(cell["done"] for cell in told["cells"]) == 5
    with Store.open(Home.find(home).database_url()) as store:
        assert store.trials().empty
    assert inline.sweep(spec, home).trained == 3


def test_a_damaged_spool_costs_its_own_stack_only(spec, tmp_path):
    """All others go on; to do what the error says is enough for the rest."""
    assert inline.sweep(spec, tmp_path / "whole").ok
    home = Home.find(tmp_path / "home")
    do(spec, home, "0/1", tmp_path / "stop")
    spool = min(home.work.glob("*/spool.jsonl"))
    lines = spool.read_bytes().splitlines(keepends=True)
    spool.write_bytes(b"".join([*lines[:2], b"half a li\n", *lines[3:]]))
    summary = inline.sweep(spec, home.root)
    (told,) = summary.damaged
    assert str(spool) in told
    assert summary.counts["done"] >= 8
    lost = [summary.errors[i] for i, status in summary.statuses.items() if status != "done"]
    assert lost
    assert all(f"{spool} is damaged in the line at byte" in error for error in lost)
    shutil.rmtree(spool.parent)
    assert inline.sweep(spec, home.root).ok
    assert inline.rows(home.root) == inline.rows(tmp_path / "whole")


def test_another_experiments_damaged_spool_is_told_and_changes_nothing(spec, tmp_path):
    home = Home.find(tmp_path / "home")
    do(spec, home, "0/1", tmp_path / "stop")
    for spool in home.work.glob("*/spool.jsonl"):
        spool.write_bytes(b"?\n")
    result = CliRunner().invoke(
        cli.app, ["sweep", str(spec), "steps=10", "--home", str(home.root), "--dry-run"]
    )
    assert result.exit_code == cli.OK, result.output
    assert result.output.count("is damaged in the line at byte 0") == 10
    summary = inline.sweep(spec, home.root, ["steps=10"])
    assert summary.ok
    assert len(summary.damaged) == 10
    assert len(list(home.work.glob("*/spool.jsonl"))) == 10
