"""ReBRAC's update against plain PyTorch, its order of targets, penalties and initialisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bandit import bandit_dataset, train
from plain import assert_same_network, descend, move, moved_by, network, rng_of, weights

from algorithms.bc import BehaviourCloning
from algorithms.bc import Config as BCConfig
from algorithms.rebrac import Config, ReBRAC
from algorithms.testing import TinyDataset

SMALL = Config(hidden_dim=16, batch_size=32, bc_coef=0.3, critic_bc_coef=0.2, discount=0.9)
DATASET = TinyDataset(bound=2.0)
SEEDS = (3, 1)


def build(**changes) -> ReBRAC:
    return ReBRAC(replace(SMALL, **changes), DATASET.spec, SEEDS)


def test_three_steps_are_those_of_plain_pytorch():
    learner = build()
    seed = 1
    actor, target_actor = network(learner.actor, seed), network(learner.actor, seed)
    critics, targets = (
        [network(learner.critic, seed, e, post_norm=True) for e in (0, 1)] for _ in (0, 1)
    )
    actor_adam = torch.optim.Adam(actor.parameters(), 1e-3)
    critic_adam = torch.optim.Adam([p for c in critics for p in c.parameters()], 1e-3)

    def value(nets, obs, action):
        pair = torch.cat((obs, action), -1)
        return torch.stack([net(pair).squeeze(-1) for net in nets])

    for step in range(3):
        numbers = rng_of(SEEDS, step)
        batch = learner.sample(DATASET, numbers)
        noise = rng_of(SEEDS, step)
        learner.sample(DATASET, noise)
        noise = (0.2 * noise.normal(32, 2)[seed]).clamp(-0.5, 0.5) * 2.0
        with torch.no_grad():
            metrics = learner.update(batch, numbers, step % 2)
        obs, next_obs, action = batch.obs[seed], batch.next_obs[seed], batch.action[seed]
        with torch.no_grad():
            smoothed = (2.0 * torch.tanh(target_actor(next_obs)) + noise).clamp(-2.0, 2.0)
            penalty = ((smoothed - batch.next_action[seed]) ** 2).sum(-1)
            penalty[batch.truncated[seed] == 1] = 0.0
            next_v = value(targets, next_obs, smoothed).min(0).values - 0.2 * penalty
            target = batch.reward[seed] + 0.9 * (1 - batch.terminated[seed]) * next_v
        loss = ((value(critics, obs, action) - target) ** 2).mean(1).sum(0)
        descend(loss, critic_adam)
        torch.testing.assert_close(metrics["critic_loss"][seed], loss.detach())
        if step % 2 == 0:
            move(target_actor, actor, 0.005)  # before the actor's step
            chosen = 2.0 * torch.tanh(actor(obs))
            q = value(critics, obs, chosen).min(0).values
            scale = 1 / q.abs().mean().detach()
            loss = (0.3 * ((chosen - action) ** 2).sum(-1) - scale * q).mean()
            descend(loss, actor_adam)
            torch.testing.assert_close(metrics["actor_loss"][seed], loss.detach())
            for old, new in zip(targets, critics, strict=True):
                move(old, new, 0.005)
        else:
            assert "actor_loss" not in metrics
    assert_same_network(learner.actor, seed, actor, tolerance=1e-5)
    assert_same_network(learner.target_actor, seed, target_actor)
    for e in (0, 1):
        assert_same_network(learner.critic, seed, critics[e], e, tolerance=1e-5)
        assert_same_network(learner.target_critic, seed, targets[e], e)


def test_the_first_step_moves_every_part_but_the_target_of_the_actor():
    """That one moves towards the actor as it was, from which it does not differ yet."""
    learner = build()
    batch = learner.sample(DATASET, rng_of(SEEDS))
    parts = (learner.critic, learner.actor, learner.target_critic, learner.target_actor)
    for phase, expected in ((0, [True, True, True, False]), (1, [True, False, False, False])):
        assert (
            moved_by(lambda p=phase: learner.update(batch, rng_of(SEEDS, p), p), *parts) == expected
        )
    old = weights(learner.actor)
    before = weights(learner.target_actor)
    with torch.no_grad():
        learner.update(batch, rng_of(SEEDS, 2), 0)
    expected = before + 0.005 * (old - before)
    torch.testing.assert_close(weights(learner.target_actor), expected, atol=1e-8, rtol=0)


def test_penalty_is_left_out_where_there_is_no_next_action():
    numbers = rng_of(SEEDS)
    with_penalty, without = build(critic_bc_coef=10.0), build(critic_bc_coef=0.0)
    batch = with_penalty.sample(DATASET, numbers)
    found = with_penalty.q_target(batch.next_obs, batch, rng_of(SEEDS, 1))
    plain = without.q_target(batch.next_obs, batch, rng_of(SEEDS, 1))
    ended = (batch.terminated + batch.truncated) > 0
    assert batch.truncated.any()
    assert batch.terminated.any()
    assert torch.equal(found[ended], plain[ended])
    assert (found[~ended] < plain[~ended]).all()
    assert torch.equal(found[batch.terminated == 1], batch.reward[batch.terminated == 1])
    cut_off = batch.truncated == 1
    assert not torch.equal(found[cut_off], batch.reward[cut_off])


def test_a_batch_without_next_actions_is_refused():
    learner = build()
    batch = DATASET.transitions(rng_of(SEEDS), 8)
    with pytest.raises(ValueError, match="no next actions"):
        learner.q_target(batch.next_obs, batch, rng_of(SEEDS))


def test_scale_of_q_carries_no_gradient_and_can_be_left_out():
    learner = build()
    batch = learner.sample(DATASET, rng_of(SEEDS))
    learner.critic.layers[-1].bias.add_(100.0)
    for parameter in learner.actor.parameters():
        parameter.requires_grad_(True)
    loss, metrics = learner.actor_loss(learner.actor, batch.obs, batch.action)
    torch.testing.assert_close(loss, 0.3 * metrics["bc_loss"] - 1.0)
    (loss - 0.3 * metrics["bc_loss"]).sum().backward()
    assert sum(p.grad.abs().sum() for p in learner.actor.parameters()) > 0
    raw = build(normalize_q=False)
    raw.critic.layers[-1].bias.add_(100.0)
    loss, metrics = raw.actor_loss(raw.actor, batch.obs, batch.action)
    assert (loss - 0.3 * metrics["bc_loss"] < -99.0).all()


def test_initialisation_and_norms_are_the_official_codes():
    learner = ReBRAC(Config(), DATASET.spec, SEEDS)
    for net, output in ((learner.actor, 1e-3), (learner.critic, 3e-3)):
        for layer in net.layers[:-1]:
            bound = layer.weight.shape[-2] ** -0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0.1).all()
        last = net.layers[-1]
        assert 0.9 * output < last.weight.abs().max() <= output
        assert 0 < last.bias.abs().max() <= output
    assert len(learner.actor.norms) == 0
    assert [norm.eps for norm in learner.critic.norms] == [1e-6] * 3
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    normed = learner.critic.norms[0](learner.critic.layers[0](x).relu())
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 2, 5), atol=1e-5, rtol=0)


def test_rebrac_moves_to_the_best_corner_and_cloning_stays_between_them():
    dataset = bandit_dataset(per_corner=500)
    config = Config(hidden_dim=32, batch_size=128, lr=3e-3, critic_lr=3e-3, bc_coef=0.001)
    learner, _ = train(ReBRAC(config, dataset.spec, SEEDS), dataset, SEEDS, 700)
    found = learner.act(torch.zeros(2, 1, 2), None)[:, 0].numpy()
    bc_config = BCConfig(hidden_dim=32, batch_size=128, lr=3e-3, normalize_obs=False)
    clone, _ = train(BehaviourCloning(bc_config, dataset.spec, SEEDS), dataset, SEEDS, 200)
    assert np.abs(clone.act(torch.zeros(2, 1, 2), None).numpy()).max() < 0.3
    assert (found[:, 0] > 0.5).all(), found
    assert (found[:, 1] < -0.5).all(), found


def test_policy_every_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Config(policy_every=0)
