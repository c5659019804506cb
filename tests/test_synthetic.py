"""Generated data: measured against the simulator and the data, and stored as a dataset."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from algorithms.api import Batch
from algorithms.testing import TinyDataset
from harness import cli, datasets
from harness.cli.policies import strengths_of
from harness.datasets.errors import DatasetError
from harness.environments import EnvironmentSpec
from harness.home import Home
from harness.simulator import Simulator
from harness.spec import load_experiment
from harness.synthetic import Generated, measure, quality, write
from results.store import Store
from tests import inline

SPEC = """
name: generated
algorithms:
  guided: {algorithm: policy_guided, config: {training_data: guided}}
  model: {algorithm: policy_guided, config: {training_data: world_model}}
  real: {algorithm: policy_guided, config: {training_data: real}}
config: {window: 2, num_blocks: 1, final_row: next_obs, stride: null, width: 16, denoise_steps: 4,
  diffusion_steps: 4, diffusion_batch_size: 8, dynamics_steps: 4, dynamics_hidden_dim: 8,
  num_windows: 40, refresh_every: 5, batch_size: 16, hidden_dim: 8}
datasets: [generated/bandit2d-v0]
seeds: "0"
steps: 10
evaluation: {every: 10, episodes: 2}
run: {compile: "off", device: cpu, checkpoint_every: 5}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a store of its own, as these tests write into it."""
    shutil.copytree(os.environ["MINARI_DATASETS_PATH"], tmp_path / "data")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    path = tmp_path / "generated.yaml"
    path.write_text(SPEC)
    return path


def only(spec: Path, label: str) -> Path:
    """The experiment with one of its algorithms."""
    lines = spec.read_text().splitlines()
    labels = ("guided", "model", "real")
    kept = [x for x in lines if not x.startswith(tuple(f"  {n}:" for n in labels if n != label))]
    path = spec.with_name(f"{label}.yaml")
    path.write_text("\n".join(kept))
    return path


def test_what_a_sweep_trained_is_measured_stored_and_trained_on(spec, tmp_path):
    home = Home.find(tmp_path / "home")
    inline.sweep(spec, home.root)
    with Store.open(home.database_url()) as store:
        table, left_out = quality(load_experiment(spec, []), store, home, (0.0, 1.0))
        assert list(left_out) == ["real on generated/bandit2d-v0, seed 0"]
        assert sorted(table.coef.dropna()) == [0.0, 1.0]
        assert set(table[table.coef.isna()].label) == {"model"}
        assert table.dynamics_error.isna().all(), "the bandit has no state to set"
        assert np.isfinite(table[["log_density", "behaviour_distance", "coverage"]]).all(axis=None)
        experiment = load_experiment(only(spec, "guided"), [])
        raw, _ = write(experiment, store, home, "synthetic/bandit2d-v0", 1.0)
        with pytest.raises(DatasetError, match="already exists"):
            write(experiment, store, home, "synthetic/bandit2d-v0")
        with pytest.raises(ValueError, match="3 trials; a dataset is written from one"):
            write(load_experiment(spec, []), store, home, "synthetic/other-v0")
    assert (raw.num_episodes, raw.num_steps) == (40, 40)
    card = datasets.card("synthetic/bandit2d-v0")
    (trial,) = experiment.trials
    made = card["synthetic"]
    assert (made["trial"], made["coef"], made["source"]) == (trial.id, 1.0, "generated/bandit2d-v0")
    assert set(made["quality"]) == {"behaviour_distance", "coverage", "log_density"}
    assert datasets.card("generated/bandit2d-v0")["synthetic"] is None
    other = spec.with_name("bc.yaml")
    other.write_text(
        "name: other\nalgorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}\n"
        'datasets: [synthetic/bandit2d-v0]\nseeds: "0"\nsteps: 4\n'
        "evaluation: {every: 4, episodes: 2}\ndata: {truncated_last_step: keep}\n"
        'run: {compile: "off", device: cpu}\n'
    )
    inline.sweep(other, home.root)
    assert set(pd.DataFrame(inline.rows(home.root)["runs"])[3]) == {"done"}


def test_the_commands_measure_and_draw(spec, tmp_path):
    def invoke(*arguments: object):
        done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    home = tmp_path / "home"
    inline.sweep(spec, home)
    table, figures = tmp_path / "synthetic.parquet", tmp_path / "figures"
    invoke("synthetic", spec, "--coefs", "0,1", "--out", table, "--home", home)
    files = json.loads(invoke("guidance", table, "--out", figures, "--json"))["files"]
    assert all(Path(file).stat().st_size > 0 for file in files)
    numbers = pd.read_csv(figures / "guidance.csv")
    assert set(numbers.label) == {"guided", "model"}


class Hopper(TinyDataset):
    """Two hundred steps of the real environment."""

    def __init__(self):
        super().__init__(obs_dim=11, action_dim=3, num_episodes=20)
        env = EnvironmentSpec("Hopper-v5").make()
        rng = np.random.default_rng(0)
        rows = []
        for episode in range(20):
            obs, _ = env.reset(seed=episode)
            for _ in range(10):
                action = 0.1 * rng.uniform(-1.0, 1.0, 3).astype(np.float32)
                after, reward, *_ = env.step(action)
                rows.append((obs, action, np.float32(reward), after))
                obs = after
        env.close()
        columns = (torch.from_numpy(np.stack(c)) for c in zip(*rows, strict=True))
        self.obs, self.action, self.reward, self.next_obs = columns
        self.terminated = torch.zeros(200)
        std = tuple(self.obs.std(dim=0).tolist())
        self.spec = replace(self.spec, statistics=replace(self.spec.statistics, obs_std=std))

    def windows(self) -> Batch:
        names = ("obs", "action", "reward", "next_obs", "terminated")
        rows = {name: getattr(self, name).unflatten(0, (20, 10)) for name in names}
        return Batch(**rows, truncated=torch.zeros(20, 10))


@pytest.fixture(scope="module")
def hopper():
    dataset = Hopper()
    simulator = Simulator(EnvironmentSpec("Hopper-v5"))
    yield dataset, simulator
    simulator.close()


def measured(windows, hopper):
    class Trial:
        id, label, algorithm, dataset_id, seed = "t", "label", "algorithm", "test/hopper-v0", 0

    return measure(Generated(Trial, None, windows, None), *hopper)


def test_strengths_are_numbers_with_commas():
    assert strengths_of("0,0.3,1") == [0.0, 0.3, 1.0]
    assert strengths_of("") == [None]
    with pytest.raises(ValueError, match="--coefs is '0,abc'; expected numbers with commas"):
        strengths_of("0,abc")


def test_real_steps_have_no_error_and_lie_on_the_data(hopper):
    table = measured(hopper[0].windows(), hopper)
    assert table["index"].tolist() == list(range(10))
    assert (table.steps == 20).all()
    assert table.dynamics_error.max() < 1e-3
    assert table.reward_error.max() < 1e-2
    assert table.behaviour_distance.max() == pytest.approx(0.0, abs=1e-4)
    assert (table.coverage == 1.0).all()


def test_errors_are_found_at_their_horizon_index_in_their_units(hopper):
    windows = hopper[0].windows()
    next_obs = windows.next_obs.clone()
    next_obs[:, 7] += 2.0 * torch.tensor(hopper[0].spec.statistics.obs_std)
    reward = windows.reward.clone()
    reward[:, 3] += 0.5
    table = measured(replace(windows, next_obs=next_obs, reward=reward), hopper)
    assert table.dynamics_error[7] == pytest.approx(4.0, rel=0.05)
    assert table.dynamics_error_median[7] == pytest.approx(4.0, rel=0.05)
    assert table.reward_error[3] == pytest.approx(0.5, rel=0.05)
    assert table.dynamics_error.drop(7).max() < 1e-3


def test_what_follows_a_termination_is_not_counted(hopper):
    windows = hopper[0].windows()
    terminated = windows.terminated.clone()
    terminated[5:, 4] = 1.0
    table = measured(replace(windows, terminated=terminated), hopper)
    assert table.steps.tolist() == [20] * 5 + [5] * 5


def test_a_single_place_covers_little_and_another_place_is_far(hopper):
    windows = hopper[0].windows()
    stuck = replace(windows, obs=windows.obs[:1, :1].expand_as(windows.obs))
    assert measured(stuck, hopper).coverage.max() < 0.2
    far = replace(windows, obs=windows.obs + 3.0 * torch.tensor(hopper[0].spec.statistics.obs_std))
    assert measured(far, hopper).behaviour_distance.min() > 2.0
