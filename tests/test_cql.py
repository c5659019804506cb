"""CQL's update against plain PyTorch with torch.distributions, its regulariser by brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bandit import bandit_dataset, train
from plain import assert_same_network, descend, move, network, rng_of
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from algorithms.cql import CQL, Config
from algorithms.testing import TinyDataset

SMALL = Config(hidden_dim=16, batch_size=32, num_actions=4, cql_coef=3.0, temperature=1.5)
DATASET = TinyDataset(bound=2.0)
SEEDS = (3, 1)


def build(**changes) -> CQL:
    return CQL(replace(SMALL, **changes), DATASET.spec, SEEDS)


class PlainActor(nn.Module):
    """One seed of the actor; draws with given noise through torch.distributions."""

    def __init__(self, actor, seed: int) -> None:
        super().__init__()
        self.net = network(actor.net, seed)
        self.multiplier = nn.Parameter(actor.multiplier[seed].clone())
        self.offset = nn.Parameter(actor.offset[seed].clone())

    def forward(self, obs, noise):
        """[B, O] and [(C,) B, A] -> actions scaled to the bound 2 and log densities."""
        mean, log_std = self.net(obs).chunk(2, -1)
        std = (self.multiplier * log_std + self.offset).clamp(-20, 2).exp()
        squashed = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
        action = squashed.transforms[0](mean + std * noise)  # cached, so log_prob is exact
        return 2.0 * action, squashed.log_prob(action).sum(-1)


VARIANTS = {
    "gym": {},
    "lagrange": {"lagrange": True, "target_gap": 0.7},
    "antmaze": {
        "lagrange": True, "target_gap": 0.8, "max_backup": True, "gap_min": 5.5,
        "critic_layers": 5, "normalize_obs": False,
    },
    "entropy": {"backup_entropy": True, "max_backup": True, "orthogonal_init": False},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_are_those_of_plain_pytorch(name):
    learner = build(**VARIANTS[name])
    config, seed = learner.config, 1
    groups = learner.critic.groups
    places = [(groups[0], 0), (groups[0], 1)] if len(groups) == 1 else [(g, 0) for g in groups]
    actor = PlainActor(learner.actor, seed)
    critics, targets = ([network(g.net, seed, e) for g, e in places] for _ in (0, 1))
    log_entropy, log_multiplier = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
    actor_adam = torch.optim.Adam(actor.parameters(), config.lr)
    entropy_adam = torch.optim.Adam([log_entropy], config.lr)
    critic_adam = torch.optim.Adam([p for c in critics for p in c.parameters()], config.critic_lr)
    multiplier_adam = torch.optim.Adam([log_multiplier], config.critic_lr)
    mean = torch.tensor(DATASET.spec.statistics.obs_mean) * config.normalize_obs
    std = torch.tensor(DATASET.spec.statistics.obs_std) + 1e-3 if config.normalize_obs else 1.0
    count = config.num_actions

    def value(nets, obs, action):
        """[B, O] and [(C,) B, A] -> [2, (C,) B]."""
        pair = torch.cat((obs.expand(*action.shape[:-1], 3), action), -1)
        return torch.stack([net(pair).squeeze(-1) for net in nets])

    for step in (0, 1):
        numbers, draws = rng_of(SEEDS, step), rng_of(SEEDS, step)
        batch = learner.sample(DATASET, numbers)
        with torch.no_grad():
            metrics = learner.update(batch, numbers)
        learner.sample(DATASET, draws)
        backups = count if config.max_backup else 1
        noise, next_noise = draws.normal(32, 2)[seed], draws.normal(backups, 32, 2)[seed]
        uniform = 2.0 * (2.0 * draws.uniform(count, 32, 2)[seed] - 1.0)
        noises = [draws.normal(count, 32, 2)[seed] for _ in (0, 1)]
        obs, next_obs = ((o[seed] - mean) / std for o in (batch.obs, batch.next_obs))
        action = batch.action[seed]

        entropy_coef = log_entropy.exp().detach()
        chosen, log_pi = actor(obs, noise)
        actor_loss = (entropy_coef * log_pi - value(critics, obs, chosen).min(0).values).mean()
        entropy_loss = -(log_entropy * (log_pi - 2.0).detach()).mean()
        with torch.no_grad():
            next_action, next_log_pi = actor(next_obs, next_noise)
            next_q = value(targets, next_obs, next_action).min(0).values
            next_v, best = next_q.max(0)
            if config.backup_entropy:
                next_v = next_v - entropy_coef * next_log_pi.gather(0, best[None])[0]
            target = batch.reward[seed] + 0.99 * (1 - batch.terminated[seed]) * next_v
            at_next, at_obs = actor(next_obs, noises[0]), actor(obs, noises[1])
        data_q = value(critics, obs, action)
        scores = torch.cat(
            [
                value(critics, obs, uniform) - 2 * math.log(0.5),
                value(critics, obs, at_next[0]) - at_next[1],
                value(critics, obs, at_obs[0]) - at_obs[1],
            ],
            dim=1,
        )
        # Brute force: log of a sum of exponentials.
        ood = 1.5 * torch.log(torch.exp(scores / 1.5).sum(1))
        gap = (ood - data_q).clamp(min=config.gap_min).mean(-1)
        multiplier = log_multiplier.exp()
        if config.lagrange:
            terms = 3.0 * (gap - config.target_gap)
            multiplier_loss = -0.5 * (multiplier * terms.detach()).sum()
            critic_loss = ((data_q - target) ** 2).mean(-1).sum()
            critic_loss = critic_loss + (multiplier.detach() * terms).sum()
            descend(multiplier_loss, multiplier_adam)
        else:
            critic_loss = ((data_q - target) ** 2).mean(-1).sum() + (3.0 * gap).sum()
        for loss, name_ in ((actor_loss, "actor_loss"), (critic_loss, "critic_loss")):
            torch.testing.assert_close(metrics[name_][seed], loss.detach(), rtol=1e-4, atol=1e-4)
        # The actor's loss goes through the critics: their step must come after its backward.
        descend(entropy_loss, entropy_adam)
        descend(actor_loss, actor_adam)
        descend(critic_loss, critic_adam)
        for old, new in zip(targets, critics, strict=True):
            move(old, new, 0.005)
    close = {"atol": 5e-6, "rtol": 0}
    assert_same_network(learner.actor.net, seed, actor.net, tolerance=5e-6)
    torch.testing.assert_close(learner.actor.offset[seed], actor.offset.data, **close)
    torch.testing.assert_close(learner.actor.multiplier[seed], actor.multiplier.data, **close)
    torch.testing.assert_close(learner.entropy_coef.log[seed, 0], log_entropy.data, **close)
    if config.lagrange:
        torch.testing.assert_close(learner.multiplier.log[seed, 0], log_multiplier.data, **close)
    for (group, e), critic, target_net in zip(places, critics, targets, strict=True):
        assert_same_network(group.net, seed, critic, e, tolerance=2e-5)
        other = learner.target_critic.groups[list(groups).index(group)]
        assert_same_network(other.net, seed, target_net, e, tolerance=5e-6)


def test_gap_is_zero_mean_for_a_constant_q_up_to_the_number_of_actions():
    """Importance weights estimate the log of the volume times 3 C; with Q = c the sum is known."""
    learner = build(temperature=1.0)
    batch = learner.sample(DATASET, rng_of(SEEDS))
    actions, log_density = learner.ood_actions(
        batch.obs, batch.next_obs, batch.action, rng_of(SEEDS, 1)
    )
    flat = torch.full((2, 2, actions.shape[1], 32), 7.0)
    _, metrics = learner.critic_loss(
        lambda obs, action: flat, batch.obs, actions, log_density, torch.full((2, 32), 7.0)
    )
    expected = torch.logsumexp(-log_density, dim=1).mean(-1)
    torch.testing.assert_close(metrics["gap"], expected)
    torch.testing.assert_close(metrics["td_error"], torch.zeros(2))
    assert torch.equal(actions[:, 0], batch.action)
    assert (log_density[:, :4] == 2 * math.log(0.5)).all()


def test_entropy_coefficient_rises_when_the_policy_is_too_sure_and_falls_otherwise():
    for shift, rises in ((-6.0, True), (1.0, False)):
        learner = build(lr=1e-2)
        learner.actor.offset.add_(shift)
        with torch.no_grad():
            learner.update(learner.sample(DATASET, rng_of(SEEDS)), rng_of(SEEDS))
        assert (learner.entropy_coef.log[:, 0] > 0).tolist() == [rises, rises]


def test_multiplier_grows_while_the_gap_is_above_its_target():
    for target_gap, grows in ((-100.0, True), (100.0, False)):
        learner = build(lagrange=True, target_gap=target_gap)
        assert learner.multiplier.value().tolist() == pytest.approx([math.e] * 2)
        with torch.no_grad():
            learner.update(learner.sample(DATASET, rng_of(SEEDS)), rng_of(SEEDS))
        assert (learner.multiplier.log[:, 0] > 1).tolist() == [grows, grows]


def test_critics_have_the_layers_of_corls_antmaze_networks():
    critic = build(critic_layers=5).critic
    assert [len(group.net.layers) for group in critic.groups] == [6, 4]
    obs, action = torch.zeros(2, 7, 3), torch.zeros(2, 7, 2)
    assert critic(obs, action).shape == (2, 2, 7)
    assert len(build().critic.groups) == 1


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Config(critic_layers=0)


def test_cql_moves_to_the_best_corner():
    """Cloning would answer with the middle; far from the data Q is held down."""
    dataset = bandit_dataset(per_corner=500)
    config = Config(
        hidden_dim=32, batch_size=128, lr=3e-3, critic_lr=3e-3, cql_coef=0.5, num_actions=4,
        normalize_obs=False,
    )  # fmt: skip
    learner, _ = train(CQL(config, dataset.spec, SEEDS), dataset, SEEDS, 400)
    found = learner.act(torch.zeros(2, 1, 2), None)[:, 0].numpy()
    assert np.abs(found - np.array([0.8, -0.8])).max() < 0.3, found
