"""DOSER's update against plain PyTorch, its masks and regularisers, and where they lead."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain import assert_same_network, descend, move, network, rng_of
from torch import nn
from torch.nn import functional

from algorithms import doser_models
from algorithms.api import StageInput
from algorithms.blocks.denoising_error import denoiser_of, level_errors, mean_error
from algorithms.blocks.edm import Preconditioning
from algorithms.blocks.rng import Rng, Stream
from algorithms.doser import DOSER, Config, Verdict, agent_needs, recipe, stages
from algorithms.testing import Case, TinyDataset, cases

SEEDS = (3, 1)
DATASET = TinyDataset(bound=2.0)
SMALL = Config(
    steps=40,
    hidden_dim=16,
    batch_size=32,
    diffusion_batch_size=16,
    dynamics_batch_size=16,
    num_candidates=3,
    sampler_steps=2,
    percentile=50.0,
)


def case_of(dataset: TinyDataset = DATASET, **changes) -> Case:
    """The agent's stage, its models trained for a few steps."""
    *_, case = cases(recipe, replace(SMALL, **changes), dataset, SEEDS)
    return case


def advance(learner: DOSER, step: int, dataset: TinyDataset = DATASET) -> dict:
    rng = rng_of(SEEDS, step)
    with torch.no_grad():
        return learner.update(learner.sample(dataset, rng), rng, step % learner.period)


# ---------------------------------------------------------------------------------- the update


def test_two_steps_are_those_of_plain_pytorch():
    case = case_of(
        penalty_coef=0.3, compensation_coef=0.7, state_levels=2, percentile=50.0, action_levels=1
    )
    learner, seed, rows = case.build(), 1, SMALL.batch_size
    scales = Preconditioning()
    actor, target_actor = network(learner.actor, seed), network(learner.actor, seed)
    critics = [network(learner.critic.net, seed, e) for e in range(4)]
    critic_targets = [network(learner.critic.net, seed, e) for e in range(4)]
    values = [network(learner.value, seed, e) for e in (0, 1)]
    value_targets = [network(learner.value, seed, e) for e in (0, 1)]
    dynamics = network(learner.models["dynamics"].net, seed, 0)
    log_alpha = torch.zeros(1, requires_grad=True)
    actor_adam = torch.optim.Adam(actor.parameters(), 3e-4)
    parts = [p for net in (*critics, *values) for p in net.parameters()]
    critic_adam = torch.optim.Adam(parts, 3e-4)
    alpha_adam = torch.optim.Adam([log_alpha], 3e-4)
    mean = torch.tensor(DATASET.spec.statistics.obs_mean)
    std = torch.tensor(DATASET.spec.statistics.obs_std)
    candidates = case.inputs["candidates"][SEEDS[seed]].state["actions"][0]
    limits = {k: v[0] for k, v in case.inputs["thresholds"][SEEDS[seed]].state.items()}

    def policy(net, obs, noise):
        mu, log_std = net(obs).chunk(2, -1)
        spread = torch.exp(log_std.clamp(-5.0, 2.0))
        raw = mu + spread * noise
        action = torch.tanh(raw)
        log_prob = torch.distributions.Normal(mu, spread).log_prob(raw).sum(-1)
        return action, log_prob - torch.log(1 - action**2 + 1e-9).sum(-1)

    def q(nets, obs, action):
        x = torch.cat((obs, action), -1)
        return torch.stack([net(x).squeeze(-1) for net in nets])

    def v(nets, obs):
        return torch.stack([net(obs).squeeze(-1) for net in nets])

    def error(name, clean, condition, sigma, noise):
        """Mean over levels; only the raw network is the learner's."""
        total = torch.zeros(rows)
        for level in range(sigma.shape[1]):
            s = sigma[:, level : level + 1]
            noisy = clean + s * noise[:, level]
            norm = (s**2 + 0.25).sqrt()
            inputs = [torch.stack([x] * 2) for x in (noisy / norm, torch.log(s[:, 0]) / 4)]
            given = None if condition is None else torch.stack([condition] * 2)
            output = learner.models[name](*inputs, given)[seed]
            denoised = 0.25 / norm**2 * noisy + s * 0.5 / norm * output
            total = total + (denoised - clean).norm(dim=-1)
        return total / sigma.shape[1]

    seen = [0.0, 0.0]
    for step in (0, 1):
        numbers = rng_of(SEEDS, step)
        index = numbers.integers(60, rows)[seed]
        noises = numbers.normal(rows, 4, 2)[seed]
        action_noise = numbers.normal(rows, 1, 2)[seed]
        action_sigma = scales.log_logistic(numbers.uniform(rows, 1))[seed]
        state_noise = numbers.normal(rows, 2, 3)[seed]
        state_sigma = scales.log_logistic(numbers.uniform(rows, 2))[seed]
        obs, next_obs = (
            (getattr(DATASET, name)[index] - mean) / (std + 1e-3) for name in ("obs", "next_obs")
        )
        action, reward = DATASET.action[index] / 2.0, DATASET.reward[index]
        alive = 1.0 - DATASET.terminated[index]
        metrics = advance(learner, step)

        log_pi = policy(actor, obs, noises[:, 0])[1].detach()
        descend(-(log_alpha * (log_pi - 2.0)).mean(), alpha_adam)
        alpha = log_alpha.exp().detach()
        if step == 1:
            chosen, log_pi = policy(actor, obs, noises[:, 1])
            descend((alpha * log_pi - q(critics, obs, chosen).amin(0)).mean(), actor_adam)
        with torch.no_grad():
            next_action, next_log_pi = policy(target_actor, next_obs, noises[:, 2])
            next_q = q(critic_targets, next_obs, next_action).amin(0) - alpha * next_log_pi
            target = reward + 0.99 * alive * next_q
            next_v = v(value_targets, next_obs).amin(0)
            value_target = reward + 0.99 * alive * next_v
            chosen = policy(actor, obs, noises[:, 3])[0]
            ood = error("behaviour", chosen, obs, action_sigma, action_noise)
            ood = ood > limits["action_threshold"]
            led_to = dynamics(torch.cat((obs, chosen), -1))[:, :-1]
            unseen = error("states", led_to, None, state_sigma, state_noise)
            unseen = unseen > limits["state_threshold"]
            some = candidates[index]  # [B, N, A]
            of_each = torch.stack([q(critics, obs, some[:, n]).amin(0) for n in range(3)], -1)
            id_q, best = of_each.max(-1)
            id_action = some[torch.arange(rows), best]
            id_v = v(values, dynamics(torch.cat((obs, id_action), -1))[:, :-1]).amin(0)
            own_v = v(values, led_to).amin(0)
            bad = ood & (unseen | (own_v < id_v))
            good = ood & ~unseen & (own_v >= id_v)
            goal = 0.9 * (id_q + (own_v - id_v).clamp(min=0.0))
            q_min = min(DATASET.reward.min().item(), 0.0) / 0.01
        loss = sum(functional.mse_loss(each, target) for each in q(critics, obs, action))
        td_error = loss.item()
        own = q(critics, obs, chosen)
        loss = loss + 0.3 * ((own - q_min) ** 2 * bad).mean()
        loss = loss + 0.7 * ((own - goal) ** 2 * good).mean()
        critic_loss = loss.item()
        for difference in value_target - v(values, obs):
            loss = loss + (torch.where(difference > 0, 0.9, 0.1) * difference**2).mean()
        descend(loss, critic_adam)
        if step == 1:
            for old, new in zip(
                (*critic_targets, *value_targets, target_actor),
                (*critics, *values, actor),
                strict=True,
            ):
                move(old, new, 0.005)
        found = {name: value[seed].item() for name, value in metrics.items()}
        assert found["td_error"] == pytest.approx(td_error, rel=1e-4)
        assert found["critic_loss"] == pytest.approx(critic_loss, rel=1e-4)
        assert found["detrimental_rate"] == pytest.approx(bad.float().mean().item())
        assert found["beneficial_rate"] == pytest.approx(good.float().mean().item())
        seen = [seen[0] + bad.sum().item(), seen[1] + good.sum().item()]
    assert min(seen) > 0, "both kinds of actions must have been there"
    assert_same_network(learner.actor, seed, actor)
    assert_same_network(learner.target_actor, seed, target_actor)
    for e in range(4):
        assert_same_network(learner.critic.net, seed, critics[e], e)
        assert_same_network(learner.target_critic.net, seed, critic_targets[e], e)
    for e in (0, 1):
        assert_same_network(learner.value, seed, values[e], e)
        assert_same_network(learner.target_value, seed, value_targets[e], e)
    assert learner.entropy_coef.value()[seed].item() == pytest.approx(
        log_alpha.exp().item(), rel=1e-5
    )


def test_the_actors_rate_falls_to_zero_over_its_own_updates():
    learner = case_of(steps=40).build()
    learner.actor_optim.count.fill_(20)  # of 40 / 2
    before = learner.actor.layers[0].weight.clone()
    advance(learner, 1)
    assert torch.equal(before, learner.actor.layers[0].weight)


# ----------------------------------------------------------------- candidates, arrangements


def invented(obs: torch.Tensor) -> torch.Tensor:
    """Candidates that are a function of the normalised observation: [..., 3, 2]."""
    direction = torch.tensor([[0.3, -0.6], [-0.9, 0.2], [0.1, 0.7]])
    return torch.tanh(obs[..., :2].unsqueeze(-2) * direction + direction)


def test_the_arrangements_of_candidates_agree_on_losses():
    found = {}
    for arrangement in product(("cached", "sampled"), (0, 31)):  # 31: OOD rows are fewer
        candidates, ood_rows = arrangement
        learner = case_of(candidates=candidates, ood_rows=ood_rows).build()
        if candidates == "cached":
            obs = learner.normalizer(DATASET.obs.expand(len(SEEDS), -1, -1))
            learner.cached = invented(obs)
        else:
            learner.sample_candidates = lambda obs, rng: invented(obs)
        found[arrangement] = [advance(learner, step) for step in range(4)]
    for step in range(4):
        expected = found["cached", 0][step]
        assert expected["ood_rate"].min() > 0
        assert (expected["ood_rate"] * 32 <= 31).all()
        for metrics in found.values():
            assert metrics[step].keys() == expected.keys()
            for name, value in metrics[step].items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_few_ood_rows_stand_for_all():
    wide = case_of(candidates="sampled").build()
    narrow = case_of(candidates="sampled", ood_rows=3).build()
    for learner in (wide, narrow):
        learner.sample_candidates = lambda obs, rng: invented(obs)
    everything, part = advance(wide, 0), advance(narrow, 0)
    number = everything["ood_rate"] * 32
    assert (number > 3).all()
    torch.testing.assert_close(part["overflow_rate"], (number - 3) / 32)
    judged = part["detrimental_rate"] + part["beneficial_rate"]
    torch.testing.assert_close(judged, everything["ood_rate"])
    assert (part["td_error"] == everything["td_error"]).all()


@pytest.mark.parametrize("flagged", [0, 1, 4, 5])
def test_a_few_rows_regularisers_have_the_expectation_of_all_rows(flagged):
    """By brute force: the mean over all orders of 5 rows, of which at most 2 are classified."""
    learner = case_of(ood_rows=2).build()
    learner.state_noise = SimpleNamespace(draw=lambda rng, *shape: (values, values))
    learner.candidate_actions = lambda *rest: None
    learner.classify_rows = lambda obs, chosen, ood, *rest: Verdict(
        ood & chosen, ood & ~chosen, obs.squeeze(-1), ood, ood
    )
    values = torch.linspace(-1.0, 2.0, 10).view(2, 5)
    q = torch.stack((values, -2.0 * values), dim=1)
    ood, bad = (torch.arange(5) < flagged).expand(2, 5), (torch.arange(5) % 2 == 0).expand(2, 5)
    found = []
    for order in permutations(range(5)):
        given = values[:, order].unsqueeze(-1), bad[:, order], ood[:, order]
        verdict = learner.classify(None, *given, None)
        masks = (verdict.detrimental, verdict.beneficial)
        parts = [learner.regulariser(q[:, :, order], verdict.target, mask) for mask in masks]
        found.append(torch.stack(parts) * verdict.weight)
    whole = [learner.regulariser(q, values, ood & mask) for mask in (bad, ~bad)]
    torch.testing.assert_close(torch.stack(found).mean(dim=0), torch.stack(whole))


@pytest.mark.parametrize("ood_rows", [0, 5])
def test_cached_candidates_are_those_of_the_row_and_of_the_seed(ood_rows):
    case = case_of(ood_rows=ood_rows)
    learner = case.build()
    stored = torch.cat([case.inputs["candidates"][s].state["actions"] for s in SEEDS])
    assert stored.shape == (2, 60, 3, 2)
    assert "cached" not in learner.state_dict(), "too large for checkpoints"
    given = {}
    nothing = torch.zeros(len(SEEDS), ood_rows or SMALL.batch_size, dtype=torch.bool)
    verdict = Verdict(nothing, nothing, nothing.float(), nothing, torch.ones(len(SEEDS)))

    def classify_rows(obs, chosen, ood, actions, *rest):
        given.update(a=actions)
        return verdict

    learner.classify_rows = classify_rows
    rng = rng_of(SEEDS)
    batch = learner.sample(DATASET, rng)
    ood = batch.reward > batch.reward.median()
    asked = learner.classify(batch, batch.obs, batch.action, ood, rng)
    overflow = ood.sum(dim=1) - ood_rows if ood_rows else torch.zeros(len(SEEDS), dtype=torch.int64)
    assert asked.overflow.sum(dim=1).tolist() == overflow.tolist()
    for k in (0, 1):
        index = batch.index[k][ood[k]][:5] if ood_rows else batch.index[k]
        assert torch.equal(given["a"][k], stored[k, index])


def test_heun_samples_an_exact_gaussian_and_the_releases_sampler_draws_it_together():
    std = 0.6

    class Exact(nn.Module):
        dim = 1

        def forward(self, scaled, level, condition):  # F of the denoiser std^2/(std^2+sigma^2) x
            sigma = torch.exp(4.0 * level).unsqueeze(-1)
            total = sigma**2 + 0.25
            noisy = scaled * total.sqrt()
            wanted = std**2 / (std**2 + sigma**2) * noisy
            return (wanted - 0.25 / total * noisy) / (sigma * 0.5 / total.sqrt())

    obs = torch.zeros(1, 4000, 1)
    spread = {}
    for sampler, steps in (("heun", 15), ("release", 100)):
        config = doser_models.CandidateConfig(1, sampler, steps)
        drawn = doser_models.sample_behaviour(Exact(), obs, config, rng_of((0,)))
        by_parts = doser_models.sample_behaviour(Exact(), obs, config, rng_of((0,)), 1500)
        torch.testing.assert_close(by_parts, drawn)
        spread[sampler] = drawn.std().item()
    clipped = np.clip(std * np.random.default_rng(0).standard_normal(200_000), -1, 1).std()
    assert spread["heun"] == pytest.approx(clipped, rel=0.05)
    assert spread["release"] < 0.8 * std


# ----------------------------------------------------------------------------------------- masks


def verdict_of(learner: DOSER, chosen: torch.Tensor | None = None, step: int = 0):
    rng = rng_of(SEEDS, step)
    batch = learner.sample(DATASET, rng)
    obs = learner.normalizer(batch.obs)
    chosen = learner.bounds.unit(batch.action) if chosen is None else chosen
    with torch.no_grad():
        return learner.judge(batch, obs, chosen, rng)[0], batch, obs


def test_the_masks_are_disjoint_and_together_all_ood_actions():
    learner = case_of().build()
    verdict, batch, obs = verdict_of(learner)
    rng = rng_of(SEEDS, 0)
    learner.sample(DATASET, rng)
    score = learner.action_score(obs, learner.bounds.unit(batch.action), rng)
    ood = score > learner.action_threshold.unsqueeze(1)
    assert not (verdict.detrimental & verdict.beneficial).any()
    assert torch.equal(verdict.detrimental | verdict.beneficial, ood)
    assert 0 < ood.float().mean() < 1
    without, *_ = verdict_of(case_of(treatment="no_compensation").build())
    assert torch.equal(without.detrimental, verdict.detrimental)
    assert not without.beneficial.any()


def test_no_more_than_the_percentile_is_flagged_where_the_actor_is_the_behaviour():
    dataset = TinyDataset(num_episodes=200, seed=4)
    case = case_of(dataset, percentile=90.0, batch_size=2000)
    learner = case.build()
    metrics = []
    for step in range(3):
        rng = rng_of(SEEDS, step)
        batch = learner.sample(dataset, rng)
        obs = learner.normalizer(batch.obs)
        _, found = learner.judge(batch, obs, learner.bounds.unit(batch.action), rng)
        metrics.append(found["ood_rate"])
    rates = torch.stack(metrics).mean(dim=0)  # of 6000 draws and a threshold of 2000 rows
    assert rates.tolist() == pytest.approx([0.1] * 2, abs=0.02)
    assert set(found) == {"ood_rate", "detrimental_rate", "beneficial_rate", "overflow_rate"}


@pytest.mark.parametrize(
    "changes",
    [
        {"action_levels": 3, "state_levels": 3},
        {"detector": "stratified"},
        {"detector": "stratified", "fixed_levels": (0.5,)},
        {"detector": "cvae"},
    ],
)
def test_every_threshold_is_the_percentile_of_what_is_compared_with_it(changes):
    dataset = TinyDataset(num_episodes=200, seed=4)
    gate = {"dynamics_members": 2, "dynamics_gate": True, "gate_percentile": 90.0}
    learner = case_of(dataset, percentile=90.0, **gate, **changes).build()
    batch = dataset.rows(torch.arange(dataset.spec.num_steps).expand(len(SEEDS), -1))
    obs, action = learner.normalizer(batch.obs), learner.bounds.unit(batch.action)
    rng = rng_of(SEEDS, 0)
    with torch.no_grad():
        draws = learner.state_noise.draw(rng, *obs.shape[1:])
        errors = level_errors(denoiser_of(learner.models["states"]), obs, *draws)
        scores = {
            "action": learner.action_score(obs, action, rng),
            "state": mean_error(errors, getattr(learner, "state_scale", None)),
            "disagreement": learner.models["dynamics"].disagreement(obs, action),
        }
    for name, score in scores.items():
        above = score > getattr(learner, f"{name}_threshold").unsqueeze(1)
        assert above.float().mean(dim=1).tolist() == pytest.approx([0.1] * 2, abs=0.03), name


def test_the_gate_calls_detrimental_what_the_networks_disagree_on():
    learner = case_of(dynamics_members=2, dynamics_gate=True).build()
    free, *_ = verdict_of(learner)
    learner.disagreement_threshold.fill_(-1.0)
    gated, *_ = verdict_of(learner)
    assert free.beneficial.any()
    assert not gated.beneficial.any()
    assert torch.equal(gated.detrimental, free.detrimental | free.beneficial)


def test_uniform_penalty_is_the_whole_algorithm_with_every_ood_action_detrimental():
    uniform, whole = case_of(treatment="uniform").build(), case_of().build()
    whole.state_threshold.fill_(-1.0)  # every next state is unseen
    for step in range(4):
        one, other = advance(uniform, step), advance(whole, step)
        assert one["ood_rate"].min() > 0
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert not hasattr(uniform, "value")


# ------------------------------------------------------------------------ where they lead


class Known(nn.Module):
    """Stands in for dynamics (s' = a) and for a denoiser that gives back points right of zero.

    Left of zero it denoises to 100 away.
    """

    def next_obs(self, obs, action):
        return action.clone()

    def forward(self, scaled, level, condition=None):
        sigma = torch.exp(4.0 * level).unsqueeze(-1)
        total = sigma**2 + 0.25
        noisy = scaled * total.sqrt()
        wanted = torch.where(noisy > 0, noisy, noisy + 100.0)
        return (wanted - 0.25 / total * noisy) / (sigma * 0.5 / total.sqrt())


def simple_learner(**changes) -> DOSER:
    """One observation, one action; actions of the data are 0 with reward 1."""
    dataset = TinyDataset(obs_dim=1, action_dim=1)
    dataset.obs = dataset.next_obs = torch.zeros(60, 1)
    dataset.action, dataset.reward = torch.zeros(60, 1), torch.ones(60)
    dataset.terminated, dataset.truncated = torch.ones(60), torch.zeros(60)
    statistics = replace(dataset.spec.statistics, obs_mean=(0.0,), obs_std=(1.0,))
    dataset.spec = replace(dataset.spec, statistics=statistics)
    settings = {"critic_lr": 1e-2, "q_min_rule": "constant", "q_min": -5.0} | changes
    learner = case_of(dataset, **settings).build()
    learner.dataset = dataset
    return learner


def fit(learner: DOSER, chosen: torch.Tensor, steps: int = 250) -> None:
    """Critics only, the policy's actions being given."""
    target = torch.ones(2, 32)
    for step in range(steps):
        rng = rng_of(SEEDS, step)
        batch = learner.sample(learner.dataset, rng)
        obs = learner.normalizer(batch.obs)
        with torch.no_grad():
            verdict, _ = learner.judge(batch, obs, chosen, rng)
            learner.update_critic(batch, obs, chosen, target, verdict)


def q_of(learner: DOSER, action: float) -> list[float]:
    at = torch.full((2, 1, 1), action)
    return learner.critic(torch.zeros(2, 1, 1), at).mean(dim=(1, 2)).tolist()


def test_a_large_penalty_pulls_flagged_actions_to_q_min_and_leaves_the_data():
    learner = simple_learner(treatment="uniform", penalty_coef=40.0)
    learner.action_threshold.fill_(-1.0)
    fit(learner, torch.full((2, 32, 1), 0.8), 400)
    assert q_of(learner, 0.8) == pytest.approx([-5.0] * 2, abs=0.1)
    assert q_of(learner, 0.0) == pytest.approx([1.0] * 2, abs=0.3)


def test_no_coefficients_leave_the_bellman_error_alone():
    learner = simple_learner(penalty_coef=0.0, compensation_coef=0.0)
    learner.action_threshold.fill_(-1.0)
    plain = simple_learner(penalty_coef=0.0, compensation_coef=0.0)
    plain.action_threshold.fill_(math.inf)
    for each in (learner, plain):
        fit(each, torch.full((2, 32, 1), 0.8), 20)
    for one, other in zip(learner.critic.parameters(), plain.critic.parameters(), strict=True):
        assert torch.equal(one, other)


def test_compensation_ends_at_its_fixed_point():
    learner = simple_learner(compensation_coef=10.0)
    learner.action_threshold.fill_(-1.0)
    learner.state_threshold.fill_(math.inf)
    learner.models["dynamics"] = Known()
    learner.cached = torch.zeros(2, 60, 3, 1)  # the data's action
    learner.values = lambda value, obs: (2.0 * obs).unsqueeze(1).squeeze(-1)  # V(s') = 2 s'
    fit(learner, torch.full((2, 32, 1), 0.5))
    (id_q, *_), expected = q_of(learner, 0.0), []
    assert id_q == pytest.approx(1.0, abs=0.1)
    expected = [0.9 * (q + 1.0) for q in q_of(learner, 0.0)]  # delta_V = 2 (0.5 - 0)
    assert q_of(learner, 0.5) == pytest.approx(expected, abs=0.1)


def test_only_the_action_that_leads_to_a_good_seen_state_gains_value():
    """Two OOD actions; V believes both are good, but one leads where no data are."""
    learner = simple_learner(compensation_coef=10.0, penalty_coef=10.0)
    learner.action_threshold.fill_(-1.0)
    learner.state_threshold.fill_(50.0)
    learner.models["dynamics"] = learner.models["states"] = Known()
    learner.state_noise.fixed, learner.state_noise.count = (0.002,), 1
    learner.cached = torch.zeros(2, 60, 3, 1)
    learner.values = lambda value, obs: (3.0 * obs.abs()).unsqueeze(1).squeeze(-1)
    before = [q_of(learner, 0.7), q_of(learner, -0.7)]
    chosen = torch.full((2, 32, 1), 0.7)
    chosen[:, ::2] = -0.7
    fit(learner, chosen)
    good, bad = q_of(learner, 0.7), q_of(learner, -0.7)
    expected = [0.9 * (q + 2.1) for q in q_of(learner, 0.0)]
    assert good == pytest.approx(expected, abs=0.2)
    assert bad == pytest.approx([-5.0] * 2, abs=0.3)
    assert all(after > first for after, first in zip(good, before[0], strict=True))
    assert all(after < first for after, first in zip(bad, before[1], strict=True))


# ----------------------------------------------------------------------------- options and stages


def test_in_sample_backup_takes_the_datas_next_action_without_entropy():
    learner = case_of(backup="behaviour").build()
    rng = rng_of(SEEDS)
    batch = learner.sample(DATASET, rng)
    next_obs = learner.normalizer(batch.next_obs)
    q = learner.target_critic(next_obs, batch.next_action / 2.0).amin(dim=1)
    expected = batch.reward + 0.99 * (1 - batch.terminated) * q
    torch.testing.assert_close(learner.q_target(batch, next_obs, torch.zeros(())), expected)


def test_a_transition_that_was_cut_off_has_no_in_sample_target():
    learner = case_of(backup="behaviour", penalty_coef=0.0, compensation_coef=0.0).build()
    rng = rng_of(SEEDS)
    batch = learner.sample(DATASET, rng)
    assert (batch.truncated.sum(dim=1) > 0).all()
    obs, chosen = learner.normalizer(batch.obs), batch.action / 2.0
    verdict, *_ = verdict_of(learner)
    losses = []
    for extra in (0.0, 50.0):  # a wild target, only in those rows
        target = batch.reward + extra * batch.truncated
        fresh = case_of(backup="behaviour", penalty_coef=0.0, compensation_coef=0.0).build()
        losses.append(fresh.update_critic(batch, obs, chosen, target, verdict)["td_error"])
    assert torch.equal(*losses)


def test_the_papers_value_and_sum_are_options():
    online, target = case_of().build(), case_of(id_value="target").build()
    for parameter in target.target_critic.parameters():
        parameter.zero_()
    (one, *_), (other, *_) = verdict_of(online), verdict_of(target)
    assert torch.equal(one.beneficial, other.beneficial), "the choice stays with the online critics"
    assert not torch.equal(one.target, other.target)
    mean, total = case_of().build(), case_of(reduction="sum").build()
    first, second = advance(mean, 0), advance(total, 0)
    torch.testing.assert_close(4.0 * first["penalty"], second["penalty"])


def test_q_min_is_the_rule_or_the_constant():
    rule, constant = case_of().build(), case_of(q_min_rule="constant", q_min=-7.0).build()
    expected = DATASET.reward.min().item() / 0.01
    assert rule.q_min.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert constant.q_min.tolist() == [-7.0] * 2
    happy = TinyDataset()
    happy.reward = happy.reward.abs() + 1.0
    assert case_of(happy).build().q_min.tolist() == [0.0, 0.0]


def test_a_treatment_trains_only_the_models_it_uses():
    names = {
        treatment: [stage.name for stage in stages(replace(SMALL, **changes))]
        for treatment, changes in {
            "full": {},
            "uniform": {"treatment": "uniform"},
            "cvae": {"treatment": "uniform", "detector": "cvae"},
            "cvae, full": {"detector": "cvae"},
            "sampled": {"candidates": "sampled"},
        }.items()
    }
    models = ["behaviour", "states", "dynamics"]
    assert names["full"] == [*models, "thresholds", "candidates", "agent"]
    assert names["uniform"] == ["behaviour", "thresholds", "agent"]
    assert names["cvae"] == ["cvae", "thresholds", "agent"]
    assert names["cvae, full"] == ["behaviour", "cvae", "states", "dynamics", "thresholds",
                                   "candidates", "agent"]  # fmt: skip
    assert names["sampled"] == [*models, "thresholds", "agent"]
    shared = stages(replace(SMALL, shared_models=True))
    assert [stage.per_seed for stage in shared] == [False] * 5 + [True]
    assert agent_needs(SMALL) == ("behaviour", "states", "dynamics", "thresholds", "candidates")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"treatment": "penalty"}, "expected one of full"),
        ({"candidates": "some"}, "expected one of cached"),
        ({"dynamics_gate": True}, "at least 2"),
        ({"ood_rows": 1000}, "expected 1 to batch_size"),
        (
            {"dynamics_gate": True, "dynamics_members": 2, "treatment": "uniform"},
            "no effect under treatment 'uniform'",
        ),
        ({"detector": "stratified", "fixed_levels": ()}, "needs fixed_levels"),
        ({"percentile": 101.0}, "percentile is 101.0; expected 0 to 100"),
        ({"num_critics": 0}, "num_critics is 0; expected at least 1"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_an_agent_without_its_models_says_which_are_missing():
    with pytest.raises(ValueError, match="thresholds"):
        DOSER(SMALL, DATASET.spec, SEEDS, {"behaviour": StageInput(None, {})})


def test_a_mean_q_above_the_limit_is_a_divergence_with_step_and_reason():
    from harness.trainer import Trainer

    case = case_of(q_limit=1e3)
    learner = case.build()
    learner.critic.net.layers[-1].bias[0] += 1e4  # one seed
    chunk = Trainer(learner, DATASET, SEEDS, torch.device("cpu"), False).advance(4)
    assert list(chunk.diverged) == [0]
    assert str(chunk.diverged[0]) == "q_policy is above 1000 at step 2"


# ------------------------------------------------------------------------------------ the theory


class Tabular:
    """The operator of the paper's Definition 3 on a random MDP, masks and delta_V held fixed."""

    def __init__(self, eta: float = 0.9, discount: float = 0.99) -> None:
        rng = np.random.default_rng(0)
        states, actions = 12, 6
        self.reward = rng.normal(size=(states, actions)) - 2.0
        self.next = rng.dirichlet(np.ones(states), size=(states, actions))
        behaviour = rng.dirichlet(np.ones(actions), size=states)
        self.known = np.zeros((states, actions), bool)
        self.known[:, :3] = True
        self.behaviour = np.where(self.known, behaviour, 0.0)
        self.behaviour /= self.behaviour.sum(axis=1, keepdims=True)
        self.good = ~self.known & (rng.random((states, actions)) < 0.5)
        self.delta = rng.random((states, actions))
        self.q_min = self.reward.min() / (1.0 - discount)
        self.eta, self.discount = eta, discount

    def best(self, q):
        return np.where(self.known, q, -np.inf).max(axis=1, keepdims=True)

    def inside(self, q):
        return self.reward + self.discount * self.next @ (self.behaviour * q).sum(axis=1)

    def __call__(self, q, delta=None):
        delta = self.delta if delta is None else delta
        compensated = self.eta * (self.best(q) + delta)
        return np.where(self.known, self.inside(q), np.where(self.good, compensated, self.q_min))

    def delta_of(self, q):
        """Recomputed from V = max over known actions, as the practical algorithm does."""
        v = self.best(q)[:, 0]
        index = np.where(self.known, q, -np.inf).argmax(axis=1)
        led_to, id_led_to = self.next @ v, (self.next @ v)[np.arange(len(v)), index]
        return np.maximum(led_to - id_led_to[:, None], 0.0)


def gap(one, other) -> float:
    return float(np.abs(one - other).max())


def test_the_operator_contracts_by_gamma_and_has_one_fixed_point():
    operator = Tabular()
    rng = np.random.default_rng(1)
    q = rng.normal(size=(12, 6))
    assert gap(operator(q + 1.0), operator(q)) == pytest.approx(0.99)  # a constant shift is worst
    for _ in range(50):
        one, other = rng.normal(size=(2, 12, 6)) * 10.0
        assert gap(operator(one), operator(other)) <= 0.99 * gap(one, other) + 1e-12
    low, high = np.full((12, 6), -500.0), np.full((12, 6), 500.0)
    for _ in range(4000):
        low, high = operator(low), operator(high)
    assert gap(low, high) < 1e-9
    assert (low >= operator.q_min - 1e-9).all()


def test_what_breaks_the_contraction():
    greedy = Tabular(eta=1.05)
    q = np.random.default_rng(1).normal(size=(12, 6))
    assert gap(greedy(q + 1.0), greedy(q)) == pytest.approx(1.05)
    operator, worst = Tabular(), 0.0
    rng = np.random.default_rng(2)
    for _ in range(2000):  # the bonus of the practical algorithm moves with Q, its argmax jumps
        one = 10.0 * rng.normal(size=(12, 6))
        other = one + 0.01 * rng.normal(size=(12, 6))
        moved = gap(
            operator(one, operator.delta_of(one)), operator(other, operator.delta_of(other))
        )
        worst = max(worst, moved / gap(one, other))
    assert worst > 2.0


def test_the_seeds_of_a_draw_are_used():
    """Two seeds of one stack have other candidates and other thresholds."""
    case = case_of()
    a, b = (case.inputs["candidates"][s].state["actions"] for s in SEEDS)
    assert not torch.equal(a, b)
    one, other = (case.inputs["thresholds"][s].state["action_threshold"] for s in SEEDS)
    assert one != other
    assert Rng.at_step(SEEDS, 0, Stream.MAKE).num_seeds == 2
