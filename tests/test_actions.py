"""Actions of trained policies: which, where from, repeatable, and written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from harness import actions, cli
from harness.actions import draw_actions, write_parquet
from harness.cli.reproducing import published_settings
from harness.datasets import DatasetError
from harness.home import Home
from harness.spec import load_experiment
from results.store import Store
from tests import inline

SPEC = """
name: tiny
algorithms:
  wide: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8, sample_actions: true}}
  point: {algorithm: bc, config: {hidden_dim: 8, batch_size: 8, head: deterministic, sample_actions: false}}
datasets: [generated/bandit2d-v0]
seeds: 0-1
steps: 10
evaluation: {every: 10, episodes: 4}
run: {log_every: 5, compile: "off", device: cpu}
"""  # noqa: E501
KEYS = ["trial_id", "label", "algorithm", "dataset_id", "seed", "draw", "row"]


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def draw(spec: Path, home: Path, overrides=(), **options) -> actions.Drawn:
    found = Home.find(home)
    with Store.open(found.database_url()) as store:
        return draw_actions(load_experiment(spec, list(overrides)), store, found, **options)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_every_finished_trial_is_in_the_table_with_its_observations(spec, tmp_path):
    home = tmp_path / "home"
    inline.sweep(spec, home)
    table = draw(spec, home, count=50).table
    assert list(table.columns) == [
        *KEYS, "obs_0", "obs_1", "action_0", "action_1", "unclamped_0", "unclamped_1"
    ]  # fmt: skip
    trials = {(t.label, t.seed): t.id for t in load_experiment(spec, []).trials}
    assert dict(table.groupby(["label", "seed"]).trial_id.first()) == trials
    for _, part in table.groupby("trial_id"):
        assert part.draw.tolist() == list(range(50))
        assert part.row.tolist() == [8 * i for i in range(50)]  # evenly spaced over 400
    assert (table[["obs_0", "obs_1"]] == 0).all(axis=None)
    assert table[["action_0", "action_1"]].abs().max(axis=None) <= 1.0
    free = table[["unclamped_0", "unclamped_1"]].to_numpy()
    np.testing.assert_array_equal(free.clip(-1, 1), table[["action_0", "action_1"]])
    spread = table.groupby(["label", "seed"]).action_0.nunique()
    assert (spread["point"] == 1).all()  # one observation, no noise
    assert (spread["wide"] > 20).all()


def test_actions_at_held_out_data_are_at_rows_that_no_learner_saw(spec, tmp_path):
    spec.write_text(SPEC + "data: {held_out: 0.25}\n")
    home = tmp_path / "home"
    inline.sweep(spec, home)
    seen, held = (draw(spec, home, count=100, held_out=held).table for held in (False, True))
    assert (seen.row.max(), held.row.max()) == (3 * 99, 99)  # of 300 and of 100 rows
    spec.write_text(SPEC)
    inline.sweep(spec, home)
    with pytest.raises(DatasetError, match=r"no episode is held out.*data\.held_out"):
        draw(spec, home, held_out=True)


def test_no_held_out_data_leaves_identities_as_they_were(spec):
    (trial, *_) = load_experiment(spec, ["data.held_out=0.0"]).trials
    assert "held_out" not in trial.data
    assert trial.id == load_experiment(spec, []).trials[0].id
    assert load_experiment(spec, ["data.held_out=0.1"]).trials[0].id != trial.id
    settings = published_settings(trial.algorithm, "", (trial.dataset_id,))
    asked = {name.removeprefix("data.") for name in settings if name.startswith("data.")}
    assert asked == set(trial.data), "or every run would have other settings than published"


def test_a_policy_with_a_density_says_how_likely_its_draws_and_the_datas_actions_are(
    spec, tmp_path
):
    """IQL's policy is a Gaussian of one standard deviation around tanh(mean)."""
    spec.write_text(
        SPEC.replace("wide: {algorithm: bc, config: {", "wide: {algorithm: iql, config: {").replace(
            ", sample_actions: true}}", "}}"
        )
    )
    home = tmp_path / "home"
    inline.sweep(spec, home, ["algorithms=[wide]"])
    table = draw(spec, home, ["algorithms=[wide]"], count=30).table
    columns = ["log_density", "data_log_density"]
    assert np.isfinite(table[columns]).all(axis=None)
    drawn = table[table.seed == 0][["unclamped_0", "unclamped_1"]].to_numpy()
    assert (drawn == drawn[0]).all(), "it acts by its mean"
    own = table[table.seed == 0].log_density
    assert own.std() < 1e-6
    assert (own >= table[table.seed == 0].data_log_density - 1e-6).all(), "nothing is likelier"


def test_draws_repeat_and_depend_neither_on_the_others_nor_on_chunks(spec, tmp_path, monkeypatch):
    home = tmp_path / "home"
    inline.sweep(spec, home)
    table = draw(spec, home, count=40).table
    pd.testing.assert_frame_equal(draw(spec, home, count=40).table, table)
    alone = draw(spec, home, ["seeds=1", "algorithms=[wide]"], count=40).table
    same = table[(table.label == "wide") & (table.seed == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, same)
    monkeypatch.setattr(actions, "CHUNK_ROWS", 8)
    pd.testing.assert_frame_equal(draw(spec, home, count=40).table, table, atol=1e-6)


def test_they_are_not_the_draws_of_an_evaluation(spec, tmp_path):
    """Numbers of their own, so that what is looked at was not chosen by what was scored."""
    import torch

    from algorithms.blocks.rng import RowRng, Stream

    seeds, row = torch.tensor([0]), torch.arange(4).unsqueeze(0)
    one, two = (
        RowRng(seeds, seeds, stream, row, row * 0).normal(4, 2)
        for stream in (Stream.EVALUATION, Stream.ACTIONS)
    )
    assert not torch.equal(one, two)


def test_a_trial_without_a_policy_is_named_and_refused_or_left_out(spec, tmp_path):
    home = tmp_path / "home"
    with pytest.raises(ValueError, match=r"4 of 4 trials .*never run.*Sweep the experiment first$"):
        draw(spec, home, count=5)
    inline.sweep(spec, home, ["seeds=0"])
    with pytest.raises(ValueError, match=r"2 of 4 trials .*wide seed 1 \(never run\).*--partial"):
        draw(spec, home, count=5)
    drawn = draw(spec, home, count=5, partial=True)
    assert drawn.trials == 2
    assert set(drawn.left_out.values()) == {"never run"}
    with pytest.raises(ValueError, match="4 of 4"):
        draw(spec, home, ["steps=11"], count=5, partial=True)  # other trials


def test_an_artifact_that_is_gone_is_said_so(spec, tmp_path):
    import shutil

    home = tmp_path / "home"
    inline.sweep(spec, home)
    shutil.rmtree(Home.find(home).artifacts)
    with pytest.raises(ValueError, match="done, but its artifact is not in this home"):
        draw(spec, home, count=5)


def test_policies_in_a_storage_that_only_the_spec_names_are_found(spec, tmp_path):
    import shutil

    home = tmp_path / "home"
    shared = [f"run.storage={tmp_path / 'storage'}", "seeds=0", "algorithms=[point]"]
    inline.sweep(spec, home, shared)
    shutil.rmtree(Home.find(home).artifacts)  # as on a node that did not train it
    assert draw(spec, home, shared, count=5).trials == 1
    arguments = ["latency", spec, *shared, "--seconds", "0.01", "--rounds", "1", "--home", home]
    timed = invoke(*arguments, "--json")
    assert timed.exit_code == cli.OK, timed.output
    written = invoke("export", spec, *shared, "--out", tmp_path / "out", "--home", home, "--json")
    assert written.exit_code == cli.OK, written.output


@pytest.mark.parametrize("count", [0, -3, 2**24])
def test_a_count_out_of_range_is_refused(spec, tmp_path, count):
    with pytest.raises(ValueError, match="expected 1 to"):
        draw(spec, tmp_path / "home", count=count)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    path = tmp_path / "folder" / "table.parquet"
    table = pd.DataFrame({"a": [1.5, 2.5]})
    write_parquet(table, path, {"experiment": "x"})
    before = path.read_bytes()
    write_parquet(table, path, {"experiment": "x"})
    assert path.read_bytes() == before
    assert json.loads(pq.read_schema(path).metadata[b"harness"]) == {"experiment": "x"}

    def broken(arrow, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        write_parquet(table, path, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_command_writes_the_file_and_says_what_it_left_out(spec, tmp_path):
    import os

    inline.sweep(spec, Path(os.environ["HARNESS_HOME"]), ["seeds=0"])
    out = tmp_path / "actions.parquet"
    refused = invoke("actions", spec, "--count", 5, "--out", out)
    assert cli.exit_code(refused.exception) == cli.USAGE
    assert not out.exists()
    done = invoke("actions", spec, "--count", 5, "--out", out, "--partial", "--json")
    assert done.exit_code == cli.OK, done.output
    summary = json.loads(done.stdout)
    assert (summary["trials"], summary["rows"], len(summary["left_out"])) == (2, 10, 2)
    assert len(pd.read_parquet(out)) == 10
