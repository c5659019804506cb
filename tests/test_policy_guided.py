"""Policy-guided diffusion: what is generated, when, for whom, and that guidance does its work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from algorithms import iql, policy_guided, td3_bc
from algorithms.api import Batch, StageInput
from algorithms.blocks.rng import Rng, Stream
from algorithms.policy_guided import (
    COLUMNS,
    Config,
    PolicyGuided,
    ScaleConfig,
    WindowDiffusion,
    measure_scale,
    stages,
)
from algorithms.testing import TinyDataset
from harness.worker import MakeOutput

SEEDS = (0, 1)
SMALL = Config(
    window=4,
    diffusion_steps=300,
    diffusion_batch_size=64,
    diffusion_lr=3e-3,
    width=16,
    num_blocks=2,
    diffusion_ema_decay=0.9,
    final_row="next_obs",
    stride=None,
    denoise_steps=16,
    num_windows=64,
    refresh_every=2,
    batch_size=16,
    hidden_dim=16,
    dynamics_hidden_dim=16,
)
GAIN = torch.tensor([[0.5, 0.0, 0.2], [0.0, 0.5, -0.2]])


def linear_dataset():
    """s' = 0.8 s + a GAIN exactly; actions tanh(N(0, 0.5)), uncorrelated with the observations."""
    dataset = TinyDataset(num_episodes=200, episode_length=10)
    rng = Rng.at_step([0], 5, Stream.TEST)
    dataset.action = torch.tanh(0.5 * rng.normal(2000, 2)[0])
    obs = dataset.obs.view(200, 10, 3).clone()
    action = dataset.action.view(200, 10, 2)
    for t in range(9):
        obs[:, t + 1] = 0.8 * obs[:, t] + action[:, t] @ GAIN
    dataset.obs = obs.reshape(-1, 3)
    dataset.next_obs = (0.8 * obs + action @ GAIN).reshape(-1, 3)
    std, mean = torch.std_mean(dataset.obs, dim=0)
    statistics = replace(
        dataset.spec.statistics, obs_mean=tuple(mean.tolist()), obs_std=tuple(std.tolist())
    )
    dataset.spec = replace(dataset.spec, statistics=statistics)
    return dataset


def rng_at(step, stream=Stream.MAKE):
    return Rng.at_step(SEEDS, step, stream)


def scale_of(dataset):
    out = MakeOutput(len(SEEDS))
    measure_scale(ScaleConfig(draws=2048), dataset, {}, rng_at(0), out)
    return StageInput(ScaleConfig(), out.arrays)


@pytest.fixture(scope="module")
def made():
    """Dataset and the artifacts of a diffusion model trained on it for 300 steps."""
    dataset = linear_dataset()
    inputs = {"scale": scale_of(dataset)}
    model = WindowDiffusion(SMALL, dataset.spec, SEEDS, inputs)
    with torch.no_grad():
        for i in range(SMALL.diffusion_steps):
            rng = rng_at(i, Stream.TRAIN)
            metrics = model.update(model.sample(dataset, rng), rng)
    assert metrics["diffusion_loss"].max() < 0.95, "1 is what a network of zeros has"
    return dataset, {**inputs, "diffusion": StageInput(SMALL, model.state_dict())}


def agent_of(made, **changes):
    return PolicyGuided(replace(SMALL, **changes), made[0].spec, SEEDS, made[1])


class Pull(torch.nn.Module):
    """A policy N(0.6, 0.3^2) in both actions, whatever is observed."""

    def log_density(self, obs, action):
        return (-0.5 * ((action - 0.6) / 0.3).square()).sum(dim=-1)


def dynamics_error(batch: Batch):
    return (batch.next_obs - 0.8 * batch.obs - batch.action @ GAIN).square().mean().item()


def test_an_exponent_of_zero_is_bitwise_unguided(made):
    guided, unguided = agent_of(made), agent_of(made, training_data="unguided")
    first = guided.generate(made[0], rng_at(1), 0.0)
    second = unguided.generate(made[0], rng_at(1))
    for name in COLUMNS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    other = guided.generate(made[0], rng_at(1))
    assert not torch.equal(other.action, first.action)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_jacobian": "network"},
        {"guidance": "additive", "guidance_coef": 0.03},
    ],
    ids=["calibrated", "whole gradient", "additive"],
)
def test_likelihood_rises_with_the_coefficient_and_the_dynamics_stay(made, changes):
    agent = agent_of(made, **changes)
    agent.agent = Pull()
    scale = agent.config.guidance_coef
    found = [agent.generate(made[0], rng_at(1), scale * c) for c in (0.0, 0.3, 3.0)]
    likelihood = [agent.log_density(b.obs, b.action).mean().item() for b in found]
    assert likelihood == sorted(likelihood)
    assert likelihood[2] > likelihood[0] + 0.5
    spread = [b.action.var().item() for b in found]
    assert spread[2] < spread[0]
    errors = [dynamics_error(b) for b in found]
    assert max(errors) < 1.2 * errors[0]
    shuffled = replace(found[0], next_obs=found[0].next_obs.flip(1))
    assert max(errors) < 0.7 * dynamics_error(shuffled)


def test_the_first_set_is_unguided_and_later_ones_follow_the_policy(made):
    agent, unguided = agent_of(made), agent_of(made, training_data="unguided")
    agent.refresh(made[0], rng_at(0))
    unguided.refresh(made[0], rng_at(0))
    assert torch.equal(agent.synthetic_action, unguided.synthetic_action)
    agent.refresh(made[0], rng_at(2))
    expected = agent.generate(made[0], rng_at(2))
    assert torch.equal(agent.synthetic_action, expected.action.flatten(1, 2))
    assert not torch.equal(agent.generate(made[0], rng_at(2), 0.0).action, expected.action)


def test_generations_share_the_rows_and_the_oldest_goes_first(made):
    agent = agent_of(made, generations=2, training_data="unguided")
    rows = SMALL.num_windows * (SMALL.window - 1)
    assert agent.synthetic_obs.shape == (2, 2 * rows, 3)
    agent.refresh(made[0], rng_at(0))
    sets = [agent.generate(made[0], rng_at(i)).obs.flatten(1, 2) for i in (0, 2, 4)]
    assert torch.equal(agent.synthetic_obs, torch.cat((sets[0], sets[0]), dim=1))
    agent.refresh(made[0], rng_at(2))
    assert torch.equal(agent.synthetic_obs, torch.cat((sets[0], sets[1]), dim=1))
    agent.refresh(made[0], rng_at(4))
    assert torch.equal(agent.synthetic_obs, torch.cat((sets[1], sets[2]), dim=1))


def test_fifteen_sixteenths_of_a_batch_are_generated(made):
    agent = agent_of(made)
    agent.synthetic_reward.fill_(1e6)
    batch = agent.sample(made[0], rng_at(0, Stream.TRAIN))
    assert (batch.reward == 1e6).sum(dim=1).tolist() == [15, 15]
    real = PolicyGuided(replace(SMALL, training_data="real"), made[0].spec, SEEDS, {})
    assert real.refresh_every == 0
    assert (real.sample(made[0], rng_at(0, Stream.TRAIN)).reward < 1e3).all()
    with pytest.raises(ValueError, match="no model to generate with"):
        real.generate(made[0], rng_at(0))


def test_the_model_is_not_part_of_the_agents_state_but_what_it_generated_is(made):
    state = agent_of(made).state_dict()
    assert not [name for name in state if name.startswith("model.")]
    assert {f"synthetic_{name}" for name in COLUMNS} <= set(state)


def test_roll_outs_begin_with_the_data_and_then_follow_the_policy():
    dataset = linear_dataset()
    config = replace(SMALL, training_data="world_model")
    dynamics, agent_stage = stages(config)
    model = dynamics.learner(dynamics.config, dataset.spec, SEEDS, {})
    inputs = {"dynamics": StageInput(dynamics.config, model.state_dict())}
    agent = agent_stage.learner(config, dataset.spec, SEEDS, inputs)
    agent.refresh(dataset, rng_at(0))
    known = {tuple(row) for row in dataset.obs.tolist()}
    assert all(tuple(row) in known for row in agent.synthetic_obs[0].tolist())
    with torch.no_grad():
        agent.refresh(dataset, rng_at(2))
    chosen = agent.agent.act(agent.synthetic_obs, rng_at(0))
    torch.testing.assert_close(agent.synthetic_action, chosen)


def test_one_model_serves_every_agent_and_only_what_it_depends_on_changes_it():
    def diffusion(**changes):
        return stages(Config(**changes))[1]

    assert diffusion() == diffusion(agent="iql", guidance_coef=3.0, steps=5)
    assert diffusion() == diffusion(training_data="unguided", num_windows=8)
    assert diffusion(width=32).config != diffusion().config
    assert not diffusion().per_seed
    assert diffusion(shared_generator=False).per_seed
    assert [stage.name for stage in stages(Config(training_data="real"))] == ["agent"]


def test_settings_reach_the_agents():
    common = {"steps": 7, "batch_size": 32, "discount": 0.9, "tau": 0.01, "lr": 1e-4}
    config = Config(**common, hidden_dim=64, q_coef=1.0, expectile=0.8, inv_temperature=5.0)
    _, td3_bc_config = policy_guided.td3_bc_agent(config)
    _, iql_config = policy_guided.iql_agent(config)
    for found in (td3_bc_config, iql_config):
        assert {name: getattr(found, name) for name in common} == common
        assert (found.critic_lr, found.hidden_dim) == (1e-4, 64)
    assert td3_bc_config.q_coef == 1.0
    assert (iql_config.expectile, iql_config.inv_temperature) == (0.8, 5.0)
    assert not iql_config.lr_decay


def test_the_rate_of_the_diffusion_model_warms_up_and_falls_to_zero():
    dataset = TinyDataset()
    model = WindowDiffusion(SMALL, dataset.spec, SEEDS, {"scale": scale_of(dataset)})
    found = [model.lr_scale(torch.tensor([step])).item() for step in (0, 30, 165, 300)]
    assert found == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=1e-6)


def test_scales_are_those_of_the_rows_and_a_constant_has_scale_one():
    dataset = TinyDataset()
    dataset.terminated = torch.zeros_like(dataset.terminated)
    scale = scale_of(dataset).state
    assert scale["std"][:, -1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scale["mean"][0, :3], dataset.obs.mean(dim=0), rtol=0, atol=0.1)
    free = torch.atanh(dataset.action.clamp(-0.999, 0.999))
    torch.testing.assert_close(scale["std"][0, 3:5], free.std(dim=0), rtol=0.1, atol=0)


@pytest.mark.parametrize("algorithm", [td3_bc.TD3BC, iql.IQL])
def test_a_density_is_highest_where_the_policy_acts(algorithm):
    dataset = TinyDataset()
    config = (td3_bc if algorithm is td3_bc.TD3BC else iql).Config(hidden_dim=16)
    policy = algorithm(config, dataset.spec, SEEDS)
    obs = rng_at(0, Stream.TEST).normal(8, 3)
    action = policy.act(obs, rng_at(0))
    peak = policy.log_density(obs, action)
    assert peak.shape == (2, 8)
    # Standard normals in two dimensions: log std starts at 0.
    assert peak.flatten().tolist() == pytest.approx([-1.8378770664] * 16, rel=1e-5)
    below = policy.log_density(obs, action + torch.tensor([1.0, 0.0]))
    assert (peak - below).flatten().tolist() == pytest.approx([0.5] * 16, rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"agent": "sac"},
        {"training_data": "none"},
        {"guidance": "strong"},
        {"window": 30},
        {"synthetic_fraction": 1.5},
        {"num_windows": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Config(**wrong)
