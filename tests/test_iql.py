"""IQL's update against plain PyTorch in both variants, expectiles, weights and what is detached."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bandit import bandit_dataset, train
from plain import assert_same_network, descend, move, network, rng_of, weights
from scipy.optimize import brentq
from torch import nn

from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Stream
from algorithms.iql import IQL, Config
from algorithms.testing import TinyDataset

SMALL = Config(hidden_dim=16, batch_size=32)
CORL = replace(
    SMALL,
    value_in_use="previous",
    q_loss="mean",
    log_std_min=-20.0,
    action_margin=0.0,
    orthogonal_init=False,
    normalize_obs=True,
)
DATASET = TinyDataset()
SEEDS = (3, 1)


def build(config: Config = SMALL, **changes) -> IQL:
    return IQL(replace(config, **changes), DATASET.spec, SEEDS)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("config", [SMALL, CORL], ids=["official", "corl"])
def test_two_steps_are_those_of_plain_pytorch(config, deterministic):
    learner = build(config, deterministic=deterministic, inv_temperature=2.0, steps=4)
    seed, corl = 1, config is CORL
    actor, value = network(learner.actor.net, seed), network(learner.value.net, seed)
    critics = [network(learner.critic.net, seed, e) for e in (0, 1)]
    targets = [network(learner.critic.net, seed, e) for e in (0, 1)]
    log_std = nn.Parameter(torch.zeros(2))
    actor_adam = torch.optim.Adam([*actor.parameters(), log_std], 3e-4)
    value_adam = torch.optim.Adam(value.parameters(), 3e-4)
    critic_adam = torch.optim.Adam([p for c in critics for p in c.parameters()], 3e-4)
    mean = torch.tensor(DATASET.spec.statistics.obs_mean) if corl else torch.zeros(3)
    scale = torch.tensor(DATASET.spec.statistics.obs_std) + 1e-3 if corl else torch.ones(3)
    for step in (0, 1):
        numbers = rng_of(SEEDS, step)
        batch = learner.sample(DATASET, numbers)
        with torch.no_grad():
            metrics = learner.update(batch, numbers)
        obs, next_obs = ((o[seed] - mean) / scale for o in (batch.obs, batch.next_obs))
        action = batch.action[seed] if corl else batch.action[seed].clamp(-1 + 1e-5, 1 - 1e-5)
        pair = torch.cat((obs, action), -1)
        q = torch.minimum(*(net(pair).squeeze(-1).detach() for net in targets))
        before, next_before = value(obs).squeeze(-1).detach(), value(next_obs).squeeze(-1).detach()
        difference = q - value(obs).squeeze(-1)
        loss = (torch.where(difference > 0, 0.7, 0.3) * difference**2).mean()
        descend(loss, value_adam)
        torch.testing.assert_close(metrics["value_loss"][seed], loss.detach())
        with torch.no_grad():
            v = before if corl else value(obs).squeeze(-1)
            next_v = next_before if corl else value(next_obs).squeeze(-1)
            weight = torch.exp(2.0 * (q - v)).clamp(max=100.0)
            target = batch.reward[seed] + 0.99 * (1 - batch.terminated[seed]) * next_v
        chosen = torch.tanh(actor(obs))
        if deterministic:
            error = ((chosen - action) ** 2).sum(-1)
        else:
            density = torch.distributions.Normal(chosen, log_std.exp())
            error = -density.log_prob(action).sum(-1)
        loss = (weight * error).mean()
        for group in actor_adam.param_groups:
            group["lr"] = 3e-4 * 0.5 * (1 + math.cos(math.pi * step / 4))
        descend(loss, actor_adam)
        torch.testing.assert_close(metrics["actor_loss"][seed], loss.detach())
        losses = [((net(pair).squeeze(-1) - target) ** 2).mean() for net in critics]
        loss = sum(losses) / (2 if corl else 1)
        descend(loss, critic_adam)
        torch.testing.assert_close(metrics["critic_loss"][seed], loss.detach())
        for old, new in zip(targets, critics, strict=True):
            move(old, new, 0.005)
    assert_same_network(learner.value.net, seed, value)
    assert_same_network(learner.actor.net, seed, actor)
    torch.testing.assert_close(learner.actor.log_std[seed], log_std.data, atol=2e-6, rtol=0)
    for e in (0, 1):
        assert_same_network(learner.critic.net, seed, critics[e], e)
        assert_same_network(learner.target_critic.net, seed, targets[e], e)


@pytest.mark.parametrize("expectile", [0.3, 0.5, 0.9])
def test_value_of_one_state_converges_to_the_expectile_of_the_rewards(expectile):
    """One state whose q is 0, 1, ..., 9: the fixed point solves the expectile's equation."""
    learner = build(expectile=expectile, critic_lr=3e-2)
    q = torch.arange(10.0).expand(2, 10)
    obs = torch.ones(2, 10, 3)
    with torch.no_grad():
        for _ in range(400):
            grads, _ = gradients(learner.value, lambda value: learner.value_loss(value, obs, q))
            learner.value_optim.step(learner.value, grads)
        found = learner.value(obs)[:, 0]
    gaps = np.arange(10.0)
    expected = brentq(
        lambda v: np.sum(np.where(gaps > v, expectile, 1 - expectile) * (gaps - v)), 0, 9
    )
    assert found.tolist() == pytest.approx([expected] * 2, abs=0.05)


def test_weights_are_clipped_at_max_weight_and_zero_temperature_is_cloning():
    batch = build().sample(DATASET, rng_of(SEEDS))
    seen = {}
    for inv_temperature in (0.0, 3.0):
        learner = build(inv_temperature=inv_temperature, max_weight=7.0)
        learner.target_critic.net.layers[-1].bias.add_(100.0)
        with torch.no_grad():
            seen[inv_temperature] = learner.update(batch, rng_of(SEEDS, 0))["weight"].tolist()
    assert seen == {0.0: [1.0, 1.0], 3.0: [7.0, 7.0]}


def test_v_and_advantage_use_the_min_of_the_target_critics():
    batch = build().sample(DATASET, rng_of(SEEDS))

    def losses(change) -> dict:
        learner = build()
        change(learner)
        with torch.no_grad():
            metrics = learner.update(batch, rng_of(SEEDS))
        return {name: metrics[name].tolist() for name in ("value_loss", "actor_loss")}

    def lift(height: float, member: slice = slice(None)):
        return lambda x: x.target_critic.net.layers[-1].bias[:, member].add_(height)

    base = losses(lift(0.0))
    assert losses(lambda x: x.critic.net.layers[-1].bias.add_(5.0)) == base
    # With one critic far below, the other does not matter.
    low = slice(0, 1), slice(1, 2)
    for one, other in (low, low[::-1]):

        def sink(x, one=one, other=other, more=0.0):
            lift(-2.0, one)(x)
            lift(50.0 + more, other)(x)

        assert losses(sink) == losses(lambda x, s=sink: s(x, more=9.0)) != base


def test_target_critics_move_by_tau_towards_the_updated_critics():
    learner = build(tau=0.1)
    before = weights(learner.target_critic)
    with torch.no_grad():
        learner.update(learner.sample(DATASET, rng_of(SEEDS)), rng_of(SEEDS))
    expected = before + 0.1 * (weights(learner.critic) - before)
    torch.testing.assert_close(weights(learner.target_critic), expected, atol=1e-7, rtol=0)


def test_dropout_is_drawn_while_training_only_and_differs_between_steps():
    learner = build(dropout_rate=0.5)
    batch = learner.sample(DATASET, rng_of(SEEDS))
    weight = torch.ones(2, 32)

    def loss(step: int) -> list[float]:
        numbers = rng_of(SEEDS, step)
        return learner.actor_loss(learner.actor, batch.obs, batch.action, weight, numbers)[
            0
        ].tolist()

    assert loss(0) == loss(0) != loss(1)
    first = learner.act(batch.obs, rng_of(SEEDS, 0, Stream.EVALUATION))
    assert torch.equal(first, learner.act(batch.obs, rng_of(SEEDS, 1, Stream.EVALUATION)))


def test_networks_start_orthogonal_with_gain_root_two_or_as_pytorchs():
    weight = build().critic.net.layers[1].weight
    identity = 2.0 * torch.eye(16).expand(2, 2, 16, 16)
    torch.testing.assert_close(weight.mT @ weight, identity, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        build().actor.net.layers[-1].weight.mT @ build().actor.net.layers[-1].weight,
        2.0 * torch.eye(2).expand(2, 2, 2), atol=1e-4, rtol=0,
    )  # fmt: skip
    plain = build(CORL).critic.net.layers[1].weight
    assert 0.2 < plain.abs().max() <= 0.25


@pytest.mark.parametrize(
    "changes", [{"q_loss": "max"}, {"value_in_use": "old"}, {"expectile": 1.0}]
)
def test_a_wrong_option_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        Config(**changes)


def test_iql_moves_to_the_best_corner_as_the_temperature_says():
    """At 0 the mean of the corners (cloning); with weights exp(3 (Q - V)) the best corner."""
    dataset = bandit_dataset(per_corner=500)
    dataset.obs = dataset.next_obs = torch.ones_like(dataset.obs)  # zero biases are dead at 0
    found = {}
    for inv_temperature in (0.0, 3.0):
        config = Config(
            hidden_dim=32, batch_size=128, lr=3e-3, critic_lr=3e-3, lr_decay=False, tau=0.05,
            inv_temperature=inv_temperature,
        )  # fmt: skip
        learner, _ = train(IQL(config, dataset.spec, SEEDS), dataset, SEEDS, 400)
        found[inv_temperature] = learner.act(torch.ones(2, 1, 2), None)[:, 0].numpy()
    assert np.abs(found[0.0]).max() < 0.3
    assert np.abs(found[3.0] - np.array([0.8, -0.8])).max() < 0.2, found
