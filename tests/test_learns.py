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

from algorithms import policy_guided, vdd
from algorithms.api import Pretrained, StageInput
from algorithms.bc import BehaviourCloning
from algorithms.bc import Config as BCConfig
from algorithms.blocks.ddpm import Diffusion
from algorithms.blocks.rng import Rng, Stream
from algorithms.diffusion_ql import Config, DiffusionQL
from algorithms.doser import Config as DOSERConfig
from algorithms.doser import recipe as doser_recipe
from algorithms.edp import Config as EDPConfig
from algorithms.edp import EfficientDiffusionPolicy
from algorithms.testing import Case, MadeArrays, TinyDataset, cases
from harness.worker import MakeOutput
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


def test_edp_moves_to_the_best_corner():
    dataset = bandit_dataset()
    config = EDPConfig(
        hidden_dim=64,
        batch_size=96,
        lr=1e-3,
        ema_start=0,
        schedule="vp",
        denoise_steps=20,
        evaluations=6,
    )
    learner = EfficientDiffusionPolicy(config, dataset.spec, SEEDS)
    learner, _ = train(learner, dataset, SEEDS, 400)
    assert nearest_corner(actions(learner, SEEDS))[:, 3].min() > 0.9


@pytest.mark.slow
def test_an_agent_that_sees_generated_rows_alone_moves_to_the_best_corner():
    """The diffusion model has learned which corner is paid best; guidance does not hide it."""
    dataset = bandit_dataset()
    config = policy_guided.Config(
        window=2,
        num_blocks=1,
        width=32,
        final_row="next_obs",
        stride=None,
        diffusion_steps=1500,
        diffusion_batch_size=128,
        diffusion_ema_decay=0.98,
        denoise_steps=18,
        num_windows=1024,
        synthetic_fraction=1.0,
        refresh_every=200,
        steps=400,
        lr=1e-3,
        hidden_dim=64,
        normalize_obs=False,
        q_coef=10.0,
    )
    scale, diffusion, agent = policy_guided.stages(config)
    out = MakeOutput(len(SEEDS))
    rng = Rng.at_step(SEEDS, 0, Stream.MAKE)
    scale.function(scale.config, dataset, {}, rng, out)
    inputs = {"scale": StageInput(scale.config, out.arrays)}
    model, _ = train(
        diffusion.learner(diffusion.config, dataset.spec, SEEDS, inputs),
        dataset,
        SEEDS,
        config.diffusion_steps,
    )
    inputs["diffusion"] = StageInput(diffusion.config, model.state_dict())
    learner = agent.learner(config, dataset.spec, SEEDS, inputs)
    case = Case(agent, dataset, seeds=SEEDS, steps=config.steps)
    case.train(learner)
    drawn = actions(learner, SEEDS, 1)[:, 0]
    assert np.abs(drawn - CORNERS[3]).max() < 0.25, drawn
    windows = learner.generate(dataset, Rng.at_step(SEEDS, 1, Stream.MAKE), 0.0)
    shares = nearest_corner(windows.action[:, :, 0].numpy())
    assert shares.min() > 0.15, "unguided, all corners are kept"


@pytest.mark.slow
def test_a_student_keeps_the_corners_of_its_diffusion_teacher():
    """Cloning by diffusion covers all four corners; so does a mixture distilled from it."""
    dataset = bandit_dataset()
    settings = {"hidden_dim": 64, "batch_size": 128, "lr": 2e-3, "ema_decay": 0.99, "steps": 600}
    pretrained = Pretrained("diffusion_bc", config=settings)
    config = vdd.Config(
        teacher=pretrained,
        hidden_dim=32,
        batch_size=16,
        num_samples=4,
        sigma_low=0.05,
        sigma_high=0.1,
        initial_std=0.2,
        initial_means="kmeans",
        gate_states=256,
        expert_updates=1,
        lr=5e-3,
        steps=300,
    )
    teacher, samples, student = vdd.stages(config)
    policy, _ = train(teacher.learner(teacher.config, dataset.spec, SEEDS), dataset, SEEDS, 600)
    shares = nearest_corner(actions(policy, SEEDS))
    assert corner_fractions(actions(policy, SEEDS), 0.3).sum(axis=1).min() > 0.75
    assert shares.min() > 0.15
    inputs = {"policy": StageInput(teacher.config, policy.state_dict())}
    made = MadeArrays()
    samples.function(samples.config, dataset, inputs, Rng.at_step(SEEDS, 0, Stream.MAKE), made)
    inputs["samples"] = StageInput(samples.config, made)
    learner = student.learner(student.config, dataset.spec, SEEDS, inputs)
    train(learner, dataset, SEEDS, 300)
    found = actions(learner, SEEDS)
    assert corner_fractions(found, 0.2).sum(axis=1).min() > 0.9, "experts' means are on corners"
    assert nearest_corner(found).min() > 0.1
    entropy = learner.log_density(torch.zeros(2, 100, 2), torch.zeros(2, 100, 2))
    assert entropy.max() < -5, "nothing is in the middle"


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
