"""Small problems solved in seconds; the 2-D bandit of Diffusion-QL's Figure 1.

How sharp a diffusion policy can be depends on its chain: with the *exact* denoiser of the bandit's
data 5 VP steps put 43 % of the samples within 0.15 of a corner, 10 steps 93 %, 20 steps 99.7 %
(`test_five_denoising_steps_cannot_resolve_the_corners`). So few steps are judged by the corner a
sample is nearest to, and distances are judged with longer chains.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.bc import BehaviourCloning
from algorithms.bc import Config as BCConfig
from algorithms.blocks.ddpm import Diffusion
from algorithms.blocks.rng import Rng, Stream
from algorithms.diffusion_ql import Config, DiffusionQL
from algorithms.doser import Config as DOSERConfig
from algorithms.doser import recipe as doser_recipe
from algorithms.testing import TinyDataset, cases
from tests.bandit import CORNERS, actions, bandit_dataset, corner_fractions, train

SEEDS = (0, 1)
SMALL = Config(
    hidden_dim=64,
    time_dim=16,
    batch_size=96,
    q_coef=2.5,
    lr=1e-3,
    critic_lr=1e-3,
    ema_start=0,
    lr_decay="off",
)


def nearest_corner(action: np.ndarray) -> np.ndarray:
    """Share of samples nearest to each corner, [K, 4]."""
    nearest = np.linalg.norm(action[:, :, None] - CORNERS, axis=-1).argmin(axis=-1)
    return np.stack([(nearest == c).mean(axis=1) for c in range(4)], axis=1)


def test_behaviour_cloning_finds_a_deterministic_policy():
    dataset = TinyDataset(num_episodes=50)
    dataset.action = torch.tanh(dataset.obs[:, :2] - dataset.obs[:, 2:])
    _, metrics = train(
        BehaviourCloning(BCConfig(hidden_dim=64, lr=3e-3), dataset.spec, SEEDS), dataset, SEEDS, 300
    )
    assert metrics["bc_loss"].max() < 5e-3
    assert dataset.action.var() > 0.3


def test_gaussian_cloning_puts_one_blob_over_the_four_corners():
    """The ideal Gaussian is N(0, 0.802**2): its mean is between the modes, its std spans them."""
    dataset = bandit_dataset()
    config = BCConfig(
        hidden_dim=64, lr=3e-3, head="gaussian", sample_actions=True, normalize_obs=False
    )
    learner, metrics = train(BehaviourCloning(config, dataset.spec, SEEDS), dataset, SEEDS, 300)
    assert metrics["std"].numpy() == pytest.approx(0.802, abs=0.05)
    assert corner_fractions(actions(learner, SEEDS)).sum(axis=1).max() < 0.15


def test_diffusion_ql_moves_to_the_best_corner_and_cloning_does_not():
    dataset = bandit_dataset()
    shares = {}
    for bc_only in (False, True):
        config = replace(SMALL, bc_only=bc_only, candidate_choice="none")
        learner, _ = train(DiffusionQL(config, dataset.spec, SEEDS), dataset, SEEDS, 250)
        shares[bc_only] = nearest_corner(actions(learner, SEEDS))
    assert shares[False][:, 3].min() > 0.9
    assert shares[True].min() > 0.1, "cloning keeps all four corners"
    assert shares[True].max() < 0.45


@pytest.mark.slow
def test_doser_moves_to_the_best_corner_through_all_of_its_stages():
    dataset = bandit_dataset()
    config = DOSERConfig(
        steps=800,
        model_steps=600,
        hidden_dim=64,
        batch_size=128,
        diffusion_batch_size=256,
        lr=1e-3,
        critic_lr=1e-3,
        entropy_lr=3e-3,
        model_lr=2e-3,
        num_candidates=4,
        sampler_steps=10,
        action_levels=10,
        percentile=95.0,
        penalty_coef=0.05,
        q_min_rule="constant",
        q_min=-5.0,
    )
    *_, case = cases(doser_recipe, config, dataset, SEEDS, full_length=True)
    learner = case.build()
    _, metrics = train(learner, dataset, SEEDS, config.steps)
    chosen = actions(learner, SEEDS, 1)[:, 0]  # deterministic
    assert np.linalg.norm(chosen - CORNERS[3], axis=-1).max() < 0.3
    assert metrics["ood_rate"].max() < 0.5
    kinds = metrics["detrimental_rate"] + metrics["beneficial_rate"]
    assert torch.allclose(kinds, metrics["ood_rate"])


@pytest.mark.parametrize(
    ("denoise_steps", "low", "high"), [(5, 0.35, 0.5), (10, 0.9, 0.96), (20, 0.99, 1.0)]
)
def test_five_denoising_steps_cannot_resolve_the_corners(denoise_steps, low, high):
    diffusion = Diffusion("vp", denoise_steps)
    corners = torch.tensor(CORNERS, dtype=torch.float32)

    def exact(noisy, t, obs):
        """E[noise | noisy] for the mixture of four Gaussians."""
        alpha_bar = diffusion.alpha_bars[t].unsqueeze(-1)
        variance = alpha_bar * 0.05**2 + 1 - alpha_bar
        offset = noisy.unsqueeze(-2) - alpha_bar.sqrt().unsqueeze(-1) * corners
        weight = torch.softmax(-offset.square().sum(dim=-1) / (2 * variance), dim=-1)
        expected_offset = (weight.unsqueeze(-1) * offset).sum(dim=-2)
        return (1 - alpha_bar).sqrt() * expected_offset / variance

    rng = Rng.at_step((0,), 0, Stream.TEST)
    obs = torch.zeros(1, 5000, 1)
    sample = diffusion.sample(exact, obs, torch.tensor([-1.0] * 2), torch.tensor([1.0] * 2), rng)
    assert low < corner_fractions(sample.numpy()).sum() < high
