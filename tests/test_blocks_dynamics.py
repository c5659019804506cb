"""The world model: limits of its variance, its split, its elites, its roll-outs."""

from __future__ import annotations

import pytest
import torch

from algorithms.api import Batch
from algorithms.blocks.dynamics import DynamicsConfig, Ensemble, WorldModel, held_out, weighted_mean
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import TinyDataset

SEEDS = (0, 1)
SMALL = DynamicsConfig(
    hidden_dim=32, num_layers=2, num_members=3, num_elites=2, batch_size=64, lr=3e-3
)


def rng(step=0):
    return Rng.at_step(SEEDS, step, Stream.TEST)


def test_log_variances_stay_between_their_limits():
    ensemble = Ensemble(rng(), SMALL, 4, 3)
    _, log_var, _, gap = ensemble(1e4 * rng(1).normal(50, 4))
    assert log_var.max() <= 0.5 + 1e-4
    assert log_var.min() >= -10.0 - 1e-4
    assert gap.tolist() == pytest.approx([3 * 3 * 10.5] * 2)


def test_a_row_is_held_out_by_its_observation_alone():
    obs = rng().normal(4000, 3)
    aside = held_out(obs, 0.2)
    assert aside.mean().item() == pytest.approx(0.2, abs=0.02)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(held_out(obs[:, order], 0.2), aside[:, order])
    assert (held_out(obs, 0.5) >= aside).all()
    near = obs + 1e-4
    assert (held_out(near, 0.2) != aside).any(), "not a function of where the observation is"


def test_a_mean_over_nothing_is_zero():
    found = weighted_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[0, 1], [0, 0]]))
    assert found.tolist() == [3.0, 0.0]


def linear_dataset(noise=0.05):
    """s' = s + [0.3, 0.1; 0, 0.2] a + noise, r = s_0; terminated where s_1 > 1."""
    dataset = TinyDataset(obs_dim=2, num_episodes=100, episode_length=20)
    size = dataset.spec.num_steps
    draws = Rng.at_step([0], 1, Stream.TEST)
    gain = torch.tensor([[0.3, 0.0], [0.1, 0.2]])
    dataset.next_obs = dataset.obs + dataset.action @ gain + noise * draws.normal(size, 2)[0]
    dataset.reward = dataset.obs[:, 0].clone()
    dataset.terminated = (dataset.obs[:, 1] > 1.0).float()
    return dataset


def trained(steps=400):
    dataset = linear_dataset()
    model = WorldModel(SMALL, dataset.spec, SEEDS)
    seeds = torch.tensor(SEEDS)
    with torch.no_grad():
        for i in range(steps):
            draws = Rng(seeds, torch.full_like(seeds, i), Stream.TRAIN)
            model.update(model.sample(dataset, draws), draws)
    return model, dataset


def test_a_linear_system_is_learned_with_its_noise_and_its_ends():
    model, dataset = trained()
    batch = dataset.transitions(rng(2), 2000)
    with torch.no_grad():
        found, reward, terminated = model.step(batch.obs, batch.action, rng(3))
    exact = batch.obs + batch.action @ torch.tensor([[0.3, 0.0], [0.1, 0.2]])
    assert (found - exact).std().item() == pytest.approx(0.05, abs=0.03)
    assert (reward - batch.obs[..., 0]).abs().mean() < 0.1
    assert (terminated == batch.terminated).float().mean() > 0.9, "no end ever: 0.84"


def test_elites_are_the_members_with_the_smallest_error_and_only_they_are_rolled_out():
    dataset = linear_dataset()
    model = WorldModel(SMALL, dataset.spec, SEEDS)
    model.errors.copy_(torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]]))
    assert model.elites().tolist() == [[1, 2], [0, 2]]
    with torch.no_grad():
        model.ensemble.net.layers[-1].bias[0, 0] = torch.nan
        model.ensemble.net.layers[-1].bias[1, 1] = torch.nan
        batch = dataset.transitions(rng(), 100)
        found = model.step(batch.obs, batch.action, rng(1))[0]
    assert torch.isfinite(found).all()


def test_a_roll_out_follows_the_policy_and_starts_anew_after_an_end():
    class Walk(WorldModel):
        """s' = s + a; ends where s_0 > 2."""

        def step(self, obs, action, rng):
            return obs + action, action[..., 0], (obs[..., 0] > 2.0).float()

    dataset = linear_dataset()
    model = Walk(SMALL, dataset.spec, SEEDS)
    starts = torch.zeros(2, 5, 6, 2)
    starts[:, :, 4] = 0.25
    batch = model.roll_out(lambda obs, rng: torch.ones_like(obs), starts, rng())
    assert isinstance(batch, Batch)
    assert batch.obs[0, 0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 0.25, 1.25]
    assert batch.next_obs[0, 0, :, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 1.25, 2.25]
    assert batch.terminated[0, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert batch.truncated[0, 0].tolist() == [0.0] * 5 + [1.0]
    assert batch.reward.shape == (2, 5, 6)


@pytest.mark.parametrize("wrong", [{"num_elites": 8}, {"held_out": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        DynamicsConfig(**wrong)
