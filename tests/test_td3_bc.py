"""TD3+BC's update against plain PyTorch, and which parts move when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bandit import bandit_dataset, train
from plain import assert_same_network, descend, move, moved_by, network, rng_of, weights
from torch.nn import functional

from algorithms.bc import BehaviourCloning
from algorithms.bc import Config as BCConfig
from algorithms.td3_bc import TD3BC, Config
from algorithms.testing import TinyDataset

SMALL = Config(hidden_dim=16, batch_size=32)
DATASET = TinyDataset(bound=2.0)
SEEDS = (3, 1)


def build(**changes) -> TD3BC:
    return TD3BC(replace(SMALL, **changes), DATASET.spec, SEEDS)


def test_two_steps_are_those_of_plain_pytorch():
    learner = build(q_coef=1.5)
    seed = 1
    actor, target_actor = network(learner.actor, seed), network(learner.actor, seed)
    critics = [network(learner.critic.net, seed, e) for e in (0, 1)]
    targets = [network(learner.critic.net, seed, e) for e in (0, 1)]
    actor_adam = torch.optim.Adam(actor.parameters(), 3e-4)
    critic_adam = torch.optim.Adam([p for c in critics for p in c.parameters()], 3e-4)
    mean = torch.tensor(DATASET.spec.statistics.obs_mean)
    std = torch.tensor(DATASET.spec.statistics.obs_std)

    def value(nets, obs, action):
        return [net(torch.cat((obs, action), -1)).squeeze(-1) for net in nets]

    for step in (0, 1):
        numbers = rng_of(SEEDS, step)
        batch = learner.sample(DATASET, numbers)
        noise = rng_of(SEEDS, step)
        learner.sample(DATASET, noise)
        noise = (0.2 * noise.normal(32, 2)[seed]).clamp(-0.5, 0.5) * 2.0
        with torch.no_grad():
            metrics = learner.update(batch, numbers, step % 2)
        obs, next_obs = ((o[seed] - mean) / (std + 1e-3) for o in (batch.obs, batch.next_obs))
        action, reward = batch.action[seed], batch.reward[seed]
        with torch.no_grad():
            next_action = (2.0 * torch.tanh(target_actor(next_obs)) + noise).clamp(-2.0, 2.0)
            q_next = torch.minimum(*value(targets, next_obs, next_action))
            target = reward + 0.99 * (1 - batch.terminated[seed]) * q_next
        loss = sum(functional.mse_loss(q, target) for q in value(critics, obs, action))
        descend(loss, critic_adam)
        torch.testing.assert_close(metrics["critic_loss"][seed], loss.detach())
        if step == 1:
            chosen = 2.0 * torch.tanh(actor(obs))
            q = value(critics[:1], obs, chosen)[0]
            loss = -1.5 / q.abs().mean().detach() * q.mean()
            loss = loss + functional.mse_loss(chosen, action)
            descend(loss, actor_adam)
            torch.testing.assert_close(metrics["actor_loss"][seed], loss.detach())
            move(target_actor, actor, 0.005)
            for old, new in zip(targets, critics, strict=True):
                move(old, new, 0.005)
    assert_same_network(learner.actor, seed, actor)
    assert_same_network(learner.target_actor, seed, target_actor)
    for e in (0, 1):
        assert_same_network(learner.critic.net, seed, critics[e], e)
        assert_same_network(learner.target_critic.net, seed, targets[e], e)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_actor_and_targets_move_in_every_nth_step_counted_from_one(every):
    learner = build(policy_every=every)
    assert learner.period == every
    for step in range(2 * every):
        numbers = rng_of(SEEDS, step)
        batch = learner.sample(DATASET, numbers)
        moved = moved_by(
            lambda b=batch, n=numbers, s=step: learner.update(b, n, s % every),
            learner.critic,
            learner.actor,
            learner.target_actor,
            learner.target_critic,
        )
        due = (step + 1) % every == 0
        assert moved == [True, due, due, due]
    assert learner.actor_optim.count.tolist() == [2, 2]
    assert learner.critic_optim.count.tolist() == [2 * every] * 2


def test_scale_of_q_carries_no_gradient():
    """With a q of one sign, the scaled term is the constant q_coef: a gradient would vanish."""
    learner = build()
    batch = learner.sample(DATASET, rng_of(SEEDS))
    learner.critic.net.layers[-1].bias.add_(100.0)
    for parameter in learner.actor.parameters():
        parameter.requires_grad_(True)
    loss, metrics = learner.actor_loss(learner.actor, batch.obs, batch.action)
    torch.testing.assert_close(loss, metrics["bc_loss"] - 2.5)
    (loss - metrics["bc_loss"]).sum().backward()
    assert sum(p.grad.abs().sum() for p in learner.actor.parameters()) > 1e-6


def test_actor_follows_the_first_critic_only():
    learner = build()
    batch = learner.sample(DATASET, rng_of(SEEDS))
    loss = learner.actor_loss(learner.actor, batch.obs, batch.action)[0]
    for parameter in learner.critic.parameters():
        parameter[:, 1] += 1.0
    assert torch.equal(learner.actor_loss(learner.actor, batch.obs, batch.action)[0], loss)


def test_observations_are_normalised_with_the_datasets_statistics_or_not_at_all():
    learner, plain = build(), build(normalize_obs=False)
    obs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(DATASET.spec.statistics.obs_mean)
    std = torch.tensor(DATASET.spec.statistics.obs_std)
    torch.testing.assert_close(learner.act(obs, None), plain.act((obs - mean) / (std + 1e-3), None))
    assert not any("normalizer" in name for name in plain.state_dict())


def test_targets_start_as_copies():
    learner = build()
    assert torch.equal(weights(learner.actor), weights(learner.target_actor))
    assert torch.equal(weights(learner.critic), weights(learner.target_critic))


def test_policy_every_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Config(policy_every=0)


def test_td3_bc_moves_to_the_best_corner_and_cloning_stays_between_them():
    """A deterministic policy: cloning answers with the mean of the four corners."""
    dataset = bandit_dataset(per_corner=500)
    config = Config(
        hidden_dim=32, batch_size=128, lr=3e-3, critic_lr=3e-3, normalize_obs=False, q_coef=10.0
    )
    learner, _ = train(TD3BC(config, dataset.spec, SEEDS), dataset, SEEDS, 400)
    found = learner.act(torch.zeros(2, 1, 2), None)[:, 0].numpy()
    bc_config = BCConfig(hidden_dim=32, batch_size=128, lr=3e-3, normalize_obs=False)
    clone, _ = train(BehaviourCloning(bc_config, dataset.spec, SEEDS), dataset, SEEDS, 200)
    cloned = clone.act(torch.zeros(2, 1, 2), None)[:, 0].numpy()
    assert np.abs(cloned).max() < 0.3
    assert (found[:, 0] > 0.5).all(), found
    assert (found[:, 1] < -0.5).all(), found
