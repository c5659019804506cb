"""Policies of the bandit figure: closed forms, losses by hand, and what the bandit shows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from algorithms.bandit_policies import BanditPolicy, Config, laplacian_mmd
from algorithms.blocks.critics import normalized_q_loss
from algorithms.blocks.rng import Rng, Stream
from algorithms.blocks.vae import latent_kl
from algorithms.testing import TinyDataset
from tests.bandit import actions, bandit_dataset, train

SEEDS = (0, 1)
DATASET = TinyDataset()
SMALL = Config(hidden_dim=32, batch_size=16)


def numbers(step: int = 0) -> Rng:
    return Rng.at_step(SEEDS, step, Stream.TRAIN)


def build(**changes) -> BanditPolicy:
    return BanditPolicy(replace(SMALL, **changes), DATASET.spec, SEEDS)


def batch_of(learner: BanditPolicy):
    return learner.sample(DATASET, numbers())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------ formulas


def test_kl_is_that_of_two_gaussians():
    mean, log_std = noise(3, 5), noise(5, 3).T
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(latent_kl(mean, log_std), expected)
    assert latent_kl(torch.zeros(1), torch.zeros(1)).item() == 0.0


def test_mmd_is_the_sum_over_all_pairs():
    x, y = noise(2, 4, 3), noise(2, 5, 3) + 1.0
    found = laplacian_mmd(x, y, sigma=0.7)

    def mean_kernel(one, two):
        values = [np.exp(-np.abs(a - b).sum() / 1.4) for a, b in itertools.product(one, two)]
        return np.mean(values)

    for row in range(2):
        one, two = x[row].double().numpy(), y[row].double().numpy()
        squared = mean_kernel(one, one) + mean_kernel(two, two) - 2 * mean_kernel(one, two)
        assert found[row].item() == pytest.approx(np.sqrt(squared + 1e-6), rel=1e-4)


def test_mmd_of_equal_samples_is_its_floor_and_has_a_finite_slope():
    x = noise(4, 2).requires_grad_(True)
    value = laplacian_mmd(x, x.detach().clone(), sigma=20.0)
    assert value.item() == pytest.approx(1e-3, abs=3e-4)
    (slope,) = torch.autograd.grad(value, x)
    assert torch.isfinite(slope).all()


def test_normalized_q_loss_divides_the_chosen_critic_by_the_given_scale():
    q = torch.tensor([[[1.0, 3.0], [-4.0, -6.0]]] * 2)
    scale = q.abs().mean(dim=-1).flip(1)  # the other critic's
    loss = normalized_q_loss(q, scale, torch.tensor([True, False]))
    torch.testing.assert_close(loss, torch.tensor([-2.0 / 5.0, 5.0 / 2.0]))


# -------------------------------------------------------------------------------------- losses


def test_an_unguided_gaussian_is_fitted_by_likelihood_alone():
    learner = build()
    batch = batch_of(learner)
    loss, metrics = learner.gaussian_loss(learner.actor, batch, numbers())
    mean, log_std = learner.actor(batch.obs)
    expected = -Normal(mean, log_std.exp()).log_prob(batch.action).sum(-1).mean(-1)
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == {"bc_loss"}
    assert not hasattr(learner, "critic")


def test_vae_loss_is_squared_error_plus_weighted_kl():
    learner = build(policy="cvae", kl_coef=0.5)
    batch = batch_of(learner)
    loss, metrics = learner.vae_loss(learner.vae, batch, numbers())
    drawn = numbers().normal(16, 4)
    mean, log_std = learner.vae.encoder(torch.cat((batch.obs, batch.action), dim=-1))
    latent = mean + log_std.exp() * drawn
    decoded = torch.tanh(learner.vae.decoder(torch.cat((batch.obs, latent), dim=-1)))
    error = (decoded - batch.action).square().mean(dim=(1, 2))
    kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean(dim=(1, 2))
    torch.testing.assert_close(loss, error + 0.5 * kl)
    torch.testing.assert_close(metrics["vae_kl"], kl)


def test_critics_are_regressed_on_the_immediate_reward():
    learner = build(guidance="q")
    batch = batch_of(learner)
    q = learner.critic(batch.obs, batch.action)
    expected = (q - batch.reward.unsqueeze(1)).square().mean(dim=-1).sum(dim=-1)
    torch.testing.assert_close(learner.update_critic(batch)["critic_loss"], expected)


@pytest.mark.parametrize(("policy", "loss"), [("gaussian", "gaussian_loss"), ("mmd", "mmd_loss")])
def test_guidance_adds_the_weighted_q_term(policy, loss):
    learner = build(policy=policy, guidance="q", q_coef=2.5)
    total, metrics = getattr(learner, loss)(learner.actor, batch_of(learner), numbers())
    first = metrics["bc_loss"] if policy == "gaussian" else learner.multiplier() * metrics["mmd"]
    torch.testing.assert_close(total, first + 2.5 * metrics["q_loss"])


def test_the_coin_falls_for_each_step_and_seed():
    learner = build(guidance="q")
    learner.critic.net.layers[-1].bias[:, 0] += 50.0  # so that the two critics tell
    learner.critic.net.layers[-1].bias[:, 1] -= 100.0
    batch = batch_of(learner)
    signs = {
        tuple((learner.q_loss(batch.obs, batch.action, numbers(step)) < 0).tolist())
        for step in range(20)
    }
    assert {(True, False), (False, True)} & signs
    assert len(signs) >= 3


def test_the_mmd_term_clips_the_actors_noise_but_acting_does_not():
    """Without spread of its own, the actor matches a point whatever the clip; with it, not."""
    learner = build(policy="mmd", noise_clip=0.1, mmd_sigma=1.0)
    batch = batch_of(learner)
    wide = learner.mmd_loss(learner.actor, batch, numbers())[0]
    learner.config = replace(learner.config, noise_clip=10.0)
    assert not torch.equal(learner.mmd_loss(learner.actor, batch, numbers())[0], wide)
    obs = torch.zeros(2, 4000, 3)
    raw = torch.atanh(learner.act(obs, numbers()).clamp(-1 + 1e-6, 1 - 1e-6))
    mean, log_std = learner.actor(obs[:, :1])
    torch.testing.assert_close(raw.std(dim=1), log_std[:, 0].exp(), rtol=0.1, atol=0.0)
    torch.testing.assert_close(raw.mean(dim=1), mean[:, 0], rtol=0.0, atol=0.1)


@pytest.mark.parametrize(("mmd", "rises"), [(0.2, True), (0.01, False)])
def test_the_multiplier_rises_while_mmd_exceeds_its_threshold(mmd, rises):
    learner = build(policy="mmd", guidance="q")
    before = learner.multiplier.log.clone()
    metrics = learner.update_multiplier(torch.full((2,), mmd))
    # Adam's first step is its rate, whatever the size of the gradient.
    step = 1e-3 if rises else -1e-3
    torch.testing.assert_close(learner.multiplier.log - before, torch.full((2, 1), step), atol=1e-5,
                               rtol=1e-3)  # fmt: skip
    torch.testing.assert_close(metrics["multiplier"], before.squeeze(1).exp())


def test_the_multiplier_stays_within_its_limits():
    for start, mmd, limit in ((9.9999, 1.0, 10.0), (-4.9999, -1.0, -5.0)):
        learner = build(policy="mmd", guidance="q")
        learner.multiplier.log.fill_(start)
        learner.update_multiplier(torch.full((2,), mmd))
        assert learner.multiplier.log.flatten().tolist() == [limit, limit]


def test_bcq_moves_only_the_perturbation_and_only_along_the_first_critic():
    learner = build(policy="cvae", guidance="q")
    batch = batch_of(learner)
    loss, _ = learner.perturbation_loss(learner.actor, batch, numbers())
    action = learner.perturb(learner.actor, batch.obs, learner.draw_vae(batch.obs, numbers()))
    torch.testing.assert_close(loss, -learner.critic(batch.obs, action)[:, 0].mean(dim=-1))
    alone = build(policy="cvae")
    guided = build(policy="cvae", guidance="q")
    for learner in (alone, guided):
        for step in range(3):
            rng = numbers(step)
            learner.update(learner.sample(DATASET, rng), rng)
    for (name, one), (_, two) in zip(
        alone.vae.named_parameters(), guided.vae.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), f"guidance changed the VAE's {name}"


# -------------------------------------------------------------------------------------- acting


def test_a_perturbation_is_bounded_and_stays_in_the_box():
    learner = build(policy="cvae", guidance="q", perturbation=0.05)
    learner.bounds.reach.fill_(2.0)
    learner.bounds.low.fill_(-2.0)
    learner.bounds.high.fill_(2.0)
    for layer in learner.actor.layers:
        layer.weight.mul_(30.0)  # saturates the tanh
    action = 2.0 * torch.tanh(2.0 * noise(2, 500, 2))
    moved = learner.perturb(learner.actor, noise(2, 500, 3), action)
    shift = (moved - action).abs()
    assert shift.max() <= 0.1 + 1e-6
    assert shift.max() > 0.09
    assert moved.abs().max() <= 2.0


def test_latents_are_clipped_when_sampling_only():
    learner = build(policy="cvae")
    latent = learner.draw_latent(numbers(), 1000)
    assert latent.abs().max() == 0.5
    drawn = numbers().normal(1000, 4)
    inside = drawn.abs() < 0.5
    assert torch.equal(latent[inside], drawn[inside])
    decoded = torch.tanh(learner.vae.decode(torch.zeros(2, 1000, 3), latent))
    assert torch.equal(learner.act(torch.zeros(2, 1000, 3), numbers()), decoded)


def test_bcq_acts_by_plain_samples_unless_asked_otherwise():
    plain, perturbed = (
        build(policy="cvae", guidance="q", act_perturbed=perturbed) for perturbed in (False, True)
    )
    obs = torch.zeros(2, 50, 3)
    drawn = plain.act(obs, numbers())
    assert torch.equal(drawn, plain.draw_vae(obs, numbers()))
    expected = perturbed.perturb(perturbed.actor, obs, drawn)
    assert torch.equal(perturbed.act(obs, numbers()), expected)
    assert not torch.equal(drawn, expected)


def test_only_the_gaussian_leaves_the_box_and_act_moves_it_back():
    obs = torch.zeros(2, 500, 3)
    for policy in ("gaussian", "cvae", "mmd"):
        learner = build(policy=policy)
        free, action = learner.act_unclamped(obs, numbers()), learner.act(obs, numbers())
        assert torch.equal(action, free.clamp(-1.0, 1.0))
        assert (free.abs().max() > 1.0) == (policy == "gaussian")


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "flow"},
        {"guidance": "td"},
        {"act_perturbed": True},
        {"policy": "cvae", "act_perturbed": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected one of|needs policy"):
        Config(**wrong)


# ---------------------------------------------------------------------------------- the bandit


def test_the_bandits_gaussian_follows_q():
    """One blob, which only Q moves towards the best corner, (0.8, -0.8)."""
    dataset = bandit_dataset()
    means = {}
    for guidance in ("none", "q"):
        config = Config(hidden_dim=64, lr=3e-3, policy="gaussian", guidance=guidance)
        learner, _ = train(BanditPolicy(config, dataset.spec, SEEDS), dataset, SEEDS, 300)
        means[guidance] = actions(learner, SEEDS).mean(axis=1)  # [K, 2]
    assert np.abs(means["none"]).max() < 0.25
    assert means["q"][:, 0].min() > 0.2
    assert means["q"][:, 1].max() < -0.2


def test_mmd_training_brings_the_actor_to_the_vae():
    dataset = bandit_dataset()
    config = Config(hidden_dim=64, lr=3e-3, policy="mmd", mmd_sigma=1.0)
    learner, metrics = train(BanditPolicy(config, dataset.spec, SEEDS), dataset, SEEDS, 5)
    _, trained = train(learner, dataset, SEEDS, 300)
    assert (trained["mmd"] < metrics["mmd"]).all()
    assert torch.isfinite(trained["mmd"]).all()
