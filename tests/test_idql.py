"""IDQL against its specification: value losses, implied actor, sampler, network, order."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bandit import actions, bandit_dataset, train

from algorithms.blocks.critics import exponential_loss, implicit_weights, quantile_loss
from algorithms.blocks.ddpm import Diffusion
from algorithms.blocks.layers import Linear
from algorithms.blocks.optim import Adam, decay_weights
from algorithms.blocks.residual import (
    FourierFeatures,
    ResidualNoiseNet,
    lecun_normal,
    redraw,
    xavier_uniform,
)
from algorithms.blocks.rng import Rng, Stream
from algorithms.idql import IDQL, Config, rows
from algorithms.testing import TinyDataset

SMALL = Config(
    hidden_dim=16,
    batch_size=32,
    actor_batch_size=48,
    time_dim=16,
    cond_dim=16,
    denoise_steps=3,
    num_candidates=8,
)
DATASET = TinyDataset()
SEEDS = (0, 1)
PARAMETER = {"expectile": 0.7, "quantile": 0.6, "exponential": 1.0}


def build(**changes) -> IDQL:
    return IDQL(replace(SMALL, **changes), DATASET.spec, SEEDS)


def rng(step=0, stream=Stream.TRAIN) -> Rng:
    return Rng.at_step(SEEDS, step, stream)


def draw(learner, step=0):
    return learner.sample(DATASET, rng(step))


def advance(learner, step):
    numbers = rng(step)
    with torch.no_grad():
        return learner.update(learner.sample(DATASET, numbers), numbers)


def weights(module):
    return torch.cat([p.flatten(1) for p in module.parameters()], dim=1).clone()


# ------------------------------------------------------------------------------- value losses

Q = np.array([-1.0, 0.0, 0.5, 1.5])  # values of four actions ...
MU = np.array([0.3, 0.4, 0.2, 0.1])  # ... and how often the behaviour takes them


def statistic(objective: str) -> float:
    """What minimises E[f(Q - V)]: by bisection, by counting, in closed form."""
    if objective == "quantile":  # the first value with a share of at least 0.6 at or below it
        return float(Q[np.searchsorted(np.cumsum(MU), 0.6)])
    if objective == "exponential":
        return float(np.log(MU @ np.exp(Q)))
    low, high = Q.min(), Q.max()
    for _ in range(60):
        middle = 0.5 * (low + high)
        slope = MU @ (np.where(middle < Q, 0.7, 0.3) * (Q - middle))
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(low)


@pytest.mark.parametrize("objective", PARAMETER)
def test_v_converges_to_the_statistic_of_its_objective(objective):
    """One observation, four actions with known Q: V's network has one number to learn."""
    learner = build(critic_objective=objective, critic_lr=0.01)
    actions_of = torch.tensor(np.repeat(Q, (10 * MU).round().astype(int)), dtype=torch.float32)
    learner.target_critic.forward = lambda obs, action: torch.stack(
        (action[..., 0], action[..., 0] + 1.0), dim=1
    )
    batch = replace(
        rows(draw(learner), 0, 10),
        obs=torch.ones(2, 10, 3),
        action=actions_of.view(1, 10, 1).expand(2, 10, 2),
    )
    with torch.no_grad():
        for i in range(600):
            learner.value_optim.lr = 0.01 if i < 300 else 0.0005
            metrics = learner.update_value(batch)
    assert metrics["v"].numpy() == pytest.approx(statistic(objective), abs=0.02)


@pytest.mark.parametrize("objective", PARAMETER)
def test_the_implied_actors_mean_of_q_is_v(objective):
    v = statistic(objective)
    difference = torch.tensor(Q - v)
    weight = implicit_weights(difference, objective, PARAMETER[objective]).numpy()
    assert (weight > 0).all()
    assert np.isfinite(weight).all()
    policy = MU * weight / (MU * weight).sum()
    assert policy @ Q == pytest.approx(v, abs=1e-5)


def test_implicit_weights_are_the_loss_slopes_over_the_distance():
    difference = torch.tensor([-2.0, -0.5, 0.25, 1.0, 5.0], dtype=torch.float64)
    for objective, loss in (
        ("expectile", lambda u: torch.where(u < 0, 0.3, 0.7) * u**2 / 2),
        ("quantile", lambda u: quantile_loss(u, 0.6)),
        ("exponential", lambda u: exponential_loss(u, 1.0)),
    ):
        u = difference.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(u).sum(), u)
        expected = slope.abs() / difference.abs()
        found = implicit_weights(difference, objective, PARAMETER[objective])
        torch.testing.assert_close(found, expected, check_dtype=False)
    # By hand: 0.4 / 2, 0.6 / 1; e^-2, e^1 and the cap of 6.
    quantile = implicit_weights(difference, "quantile", 0.6)
    assert quantile[[0, 3]].tolist() == pytest.approx([0.2, 0.6])
    exponential = implicit_weights(difference, "exponential", 1.0)
    expected = [(1 - math.exp(-2)) / 2, math.e - 1, 5 / 5]
    assert exponential[[0, 3, 4]].tolist() == pytest.approx(expected)


def test_a_candidate_at_v_has_a_finite_weight():
    zero = torch.zeros(1)
    assert implicit_weights(zero, "quantile", 0.6).item() == pytest.approx(0.6e6)
    assert implicit_weights(zero, "exponential", 2.0).item() == pytest.approx(2.0, rel=1e-4)
    with pytest.raises(ValueError, match="expected one of expectile, quantile, exponential"):
        implicit_weights(zero, "huber", 1.0)


def test_quantile_loss_is_the_pinball():
    found = quantile_loss(torch.tensor([-2.0, 3.0]), 0.6)
    assert found.tolist() == pytest.approx([0.4 * 2, 0.6 * 3])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_exponential_gradient_stays_at_five_from_log_six_on(scale):
    u = torch.tensor([-1.0, 0.0, 0.5, math.log(6.0) / scale, 3.0, 50.0], requires_grad=True)
    (slope,) = torch.autograd.grad(exponential_loss(u, scale).sum(), u)
    expected = [min(math.exp(min(scale * x, 9.0)), 6.0) - 1.0 for x in u.tolist()]
    assert slope.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert slope[-1].item() == pytest.approx(5.0, rel=1e-6)


# ----------------------------------------------------------------------------------- the sampler


def test_the_sampler_clips_the_iterate_and_adds_noise_of_variance_beta():
    """A chain of 3 by hand, the schedule from its formula."""
    bound, numbers = 0.7, rng(4, Stream.TEST)
    obs = torch.zeros(2, 500, 3)
    sample = Diffusion("vp", 3).sample_clipping_iterates(
        lambda x, t, o: 0.3 * x + 0.2 * t.unsqueeze(-1) - 0.1,
        obs,
        torch.full((2,), -bound),
        torch.full((2,), bound),
        numbers,
        noise_scale=0.8,
    )
    noise = rng(4, Stream.TEST).normal(500, 3, 2).double().numpy()  # [K, N, T, A]
    alpha = [math.exp(-0.1 / 3 - 0.5 * 9.9 * (2 * t - 1) / 9) for t in (1, 2, 3)]
    x, clipped = noise[:, :, 0], []
    assert np.abs(x).max() > bound, "the first iterate is not clipped"
    for t, z in ((2, noise[:, :, 1]), (1, noise[:, :, 2]), (0, 0.0)):
        noise_pred = 0.3 * x + 0.2 * t - 0.1
        mean = x - (1 - alpha[t]) / math.sqrt(1 - math.prod(alpha[: t + 1])) * noise_pred
        moved = mean / math.sqrt(alpha[t]) + 0.8 * math.sqrt(1 - alpha[t]) * z
        clipped.append((np.abs(moved) > bound).mean())
        x = np.clip(moved, -bound, bound)
    np.testing.assert_allclose(sample.numpy(), x, atol=1e-5)
    assert min(clipped) > 0.02, "every level clips something, or the test is blind"


def test_the_last_level_gives_the_clipped_clean_prediction():
    diffusion, numbers = Diffusion("vp", 1), rng(2, Stream.TEST)
    one = torch.ones(2)
    sample = diffusion.sample_clipping_iterates(
        lambda x, t, o: 0.5 * x, torch.zeros(2, 64, 3), -one, one, numbers
    )
    x = rng(2, Stream.TEST).normal(64, 1, 2).squeeze(2)
    torch.testing.assert_close(sample, diffusion.denoise(x, 0, 0.5 * x).clamp(-1, 1))


# ----------------------------------------------------------------------------------- the network


def by_hand(net, noisy, t, obs, masks, activation):
    """One seed of `ResidualNoiseNet`, layer after layer in double precision.

    Args:
        masks: what each block's dropout multiplies by.
    """

    def of(module):
        return module.weight[0].double().numpy(), module.bias[0].double().numpy()

    def linear(x, module):
        weight, bias = of(module)
        return x @ weight + bias

    def norm(x, module):
        weight, bias = of(module)
        scale = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / scale * weight + bias

    angle = 2 * np.pi * t[:, None] * net.features.frequency[0].double().numpy()
    condition = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    condition = linear(condition, net.condition.layers[0])
    condition = linear(activation(condition), net.condition.layers[1])
    x = linear(np.concatenate([noisy, obs, condition], axis=-1), net.net.first)
    for block, mask in zip(net.net.blocks, masks, strict=True):
        inner = linear(norm(x * mask, block.norm), block.widen)
        x = x + linear(activation(inner), block.narrow)
    return linear(activation(x), net.net.last)


@pytest.mark.parametrize("name", ["mish", "silu"])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_the_specified_one_layer_by_layer(name, training):
    seed = Rng.at_step((5,), 0, Stream.INITIALISATION)
    net = ResidualNoiseNet(seed, 3, 2, 16, 2, name, 0.25, time_dim=8, cond_dim=12)
    for parameter in net.parameters():  # the initial biases are 0, the norms 1 and 0
        parameter.add_(0.1 * seed.normal(*parameter.shape[1:]))
    draws = Rng.at_step((5,), 1, Stream.TEST)
    noisy, obs = draws.normal(10, 2), draws.normal(10, 3)
    t = draws.integers(5, 10)
    dropout = Rng.at_step((5,), 2, Stream.TEST)
    found = net(noisy, t, obs, dropout) if training else net(noisy, t, obs)
    again = Rng.at_step((5,), 2, Stream.TEST)
    masks = [1.0, 1.0]
    if training:
        masks = [(again.uniform(10, 16)[0] >= 0.25).double().numpy() / 0.75 for _ in range(2)]
    activation = {
        "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }[name]
    arrays = (noisy[0].double().numpy(), t[0].numpy(), obs[0].double().numpy())
    np.testing.assert_allclose(
        found[0].numpy(), by_hand(net, *arrays, masks, activation), atol=2e-5
    )


def test_the_default_network_has_the_papers_size():
    net = IDQL(Config(), DATASET.spec, (0,)).actor  # obs 3, actions 2
    time = 32 + (64 * 128 + 128) + (128 * 128 + 128)
    block = 2 * 256 + (256 * 1024 + 1024) + (1024 * 256 + 256)
    ends = ((3 + 2 + 128) * 256 + 256) + (256 * 2 + 2)
    assert sum(p.numel() for p in net.parameters()) == time + 3 * block + ends


def test_initial_values_are_flaxs():
    seed = Rng.at_step(SEEDS, 0, Stream.INITIALISATION)
    xavier = redraw(Linear(seed, 200, 100), seed, xavier_uniform)
    bound = math.sqrt(6 / 300)
    assert 0.99 * bound < xavier.weight.abs().max() <= bound
    assert xavier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    lecun = lecun_normal(seed, (400, 100))
    assert lecun.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert lecun.abs().max().item() == pytest.approx(2 / 0.87962566 * 400**-0.5, rel=0.01)
    assert FourierFeatures(seed, 4000).frequency.std().item() == pytest.approx(0.2, rel=0.05)
    learner = build()
    layers = [m for m in learner.modules() if isinstance(m, Linear)]
    assert len(layers) > 15
    assert all((layer.bias == 0).all() for layer in layers)


def test_an_odd_number_of_time_features_is_refused():
    with pytest.raises(ValueError, match="even number"):
        build(time_dim=5)


# ------------------------------------------------------------------------------------- the actor


def test_the_actor_loss_sums_over_action_dimensions():
    learner = build(dropout_rate=0.0)
    batch = draw(learner)
    loss, _ = learner.actor_loss(learner.actor, batch, rng(1))
    mean = learner.diffusion.noise_loss(learner.actor, batch.action, batch.obs, rng(1))
    torch.testing.assert_close(loss, 2 * mean, rtol=1e-3, atol=0)


def test_data_actions_stay_inside_the_bounds():
    learner = build()
    seen = []
    learner.diffusion.noise_errors = lambda denoiser, clean, obs, rng: (
        seen.append(clean) or torch.zeros_like(clean)
    )
    batch = draw(learner)
    batch.action[:, 0], batch.action[:, 1] = 1.0, -1.0
    learner.actor_loss(learner.actor, batch, rng(1))
    assert seen[0].max().item() == pytest.approx(1 - 1e-5, abs=1e-7)
    assert seen[0].min().item() == pytest.approx(-(1 - 1e-5), abs=1e-7)
    assert torch.equal(seen[0][:, 2:], batch.action[:, 2:])


@pytest.mark.parametrize("objective", ["soft_adv", "hard_adv", "exp_adv"])
def test_rows_are_weighted_by_their_advantage(objective):
    learner = build(actor_objective=objective)
    batch = rows(draw(learner), 0, 5)
    advantage = torch.tensor([-0.5, -0.005, 0.0, 0.5, 3.0]).expand(2, 5)
    learner.min_q = lambda obs, action: advantage + learner.value(obs)
    expected = {
        "soft_adv": [0.3, 0.3, 0.7, 0.7, 0.7],
        "hard_adv": [0.0, 1.0, 1.0, 1.0, 1.0],
        "exp_adv": [math.exp(-1.5), math.exp(-0.015), 1.0, math.exp(1.5), 100.0],
    }[objective]
    # The third is 0 up to rounding of q - v, where soft_adv jumps.
    pick = [0, 1, 3, 4] if objective == "soft_adv" else [0, 1, 2, 3, 4]
    found = learner.row_weights(batch)[0, pick].tolist()
    assert found == pytest.approx([expected[i] for i in pick], rel=1e-4)


def test_a_step_is_two_actor_updates_on_rows_of_their_own_with_the_ema_after_each():
    learner, twin = build(lr_decay="off"), build(lr_decay="off", actor_updates=1)
    batch = draw(learner)
    assert batch.reward.shape == (2, 96)
    numbers, again = rng(7), rng(7)
    with torch.no_grad():
        learner.update_actor(batch, numbers)
        expected = weights(twin.ema_actor)
        for i in range(2):
            twin.update_actor(rows(batch, 48 * i, 48), again)
            expected = expected + 0.001 * (weights(twin.actor) - expected)
    assert torch.equal(weights(learner.actor), weights(twin.actor))
    torch.testing.assert_close(weights(learner.ema_actor), expected, atol=1e-7, rtol=0)
    assert not torch.equal(weights(learner.ema_actor), weights(learner.actor))


def test_the_critic_takes_the_first_rows_of_the_actors_batch():
    learner = build()
    seen = []
    learner.update_value = lambda batch: seen.append(batch) or {}
    batch = draw(learner)
    learner.update(batch, rng(1))
    assert torch.equal(seen[0].reward, batch.reward[:, :32])
    assert draw(build(batch_size=200)).reward.shape == (2, 200)


def test_the_actors_rate_falls_to_zero_over_its_own_updates():
    learner = build(steps=10)  # 20 actor updates
    found = learner.lr_scale(torch.tensor([0, 5, 10, 20, 25]))
    expected = [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0, 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    asked = []
    whole = learner.lr_scale
    learner.lr_scale = lambda step: asked.append(step.tolist()) or whole(step)
    advance(learner, 3)
    assert asked == [[6, 6], [7, 7]]
    assert build(lr_decay="off").lr_scale(torch.tensor([7])).tolist() == [1.0]


def test_decay_before_adam_is_adamw():
    seed = Rng.at_step((0,), 0, Stream.INITIALISATION)
    module = Linear(seed, 4, 3)
    reference = [torch.nn.Parameter(p.clone()) for p in module.parameters()]
    theirs = torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1)
    ours = Adam(module, 0.01)
    for _ in range(5):
        grads = {name: seed.normal(*p.shape[1:]) for name, p in module.named_parameters()}
        decay_weights(module, torch.full((1,), 0.01 * 0.1))
        ours.step(module, grads)
        for parameter, grad in zip(reference, grads.values(), strict=True):
            parameter.grad = grad
        theirs.step()
    for parameter, expected in zip(module.parameters(), reference, strict=True):
        torch.testing.assert_close(parameter.data, expected.data)


def test_weight_decay_shrinks_every_parameter_of_the_actor_alone():
    plain, decayed = build(), build(weight_decay=0.5)
    before = weights(plain.actor)
    for learner in (plain, decayed):
        learner.config = replace(learner.config, actor_updates=1)
        advance(learner, 0)
    difference = weights(plain.actor) - weights(decayed.actor)
    torch.testing.assert_close(difference, 3e-4 * 0.5 * before, atol=1e-7, rtol=0)
    assert torch.equal(weights(plain.critic), weights(decayed.critic))


# ------------------------------------------------------------------------------- order of updates


def test_updates_come_in_the_order_actor_v_q_target():
    learner = build()
    calls = []
    for name in ("update_actor", "update_value", "update_critic"):
        method = getattr(learner, name)
        setattr(
            learner,
            name,
            lambda *args, name=name, method=method: calls.append(name) or method(*args),
        )
    before = weights(learner.target_critic)
    advance(learner, 0)
    assert calls == ["update_actor", "update_value", "update_critic"]
    expected = before + 0.005 * (weights(learner.critic) - before)
    torch.testing.assert_close(weights(learner.target_critic), expected, atol=1e-7, rtol=0)
    assert not torch.equal(weights(learner.critic), before)


def test_q_is_regressed_on_the_new_v_and_v_on_the_old_target():
    learner, twin = build(), build()
    batch = rows(draw(learner), 0, 32)
    with torch.no_grad():
        found = advance(learner, 0)
        v, q = twin.value(batch.obs), twin.target_critic(batch.obs, batch.action).amin(dim=1)
        u = q - v
        loss = (torch.where(u < 0, 0.3, 0.7) * u.square()).mean(dim=-1)
        torch.testing.assert_close(found["value_loss"], loss)
        twin.update_value(batch)
        target = batch.reward + 0.99 * (1 - batch.terminated) * twin.value(batch.next_obs)
        error = twin.critic(batch.obs, batch.action) - target.unsqueeze(1)
        torch.testing.assert_close(found["critic_loss"], error.square().mean(dim=(1, 2)))


def test_value_steps_leave_the_target_critics_alone():
    learner = build()
    before = weights(learner.target_critic), weights(learner.critic)
    old = weights(learner.value)
    with torch.no_grad():
        learner.update_value(rows(draw(learner), 0, 32))
    assert torch.equal(weights(learner.target_critic), before[0])
    assert torch.equal(weights(learner.critic), before[1])
    assert not torch.equal(weights(learner.value), old)


def test_the_later_codes_v_sees_normalised_observations():
    value = build(value_input_norm=True).value
    obs = torch.tensor([1.0, 2.0, 6.0]).expand(2, 4, 3)
    torch.testing.assert_close(value(obs), value(10 * obs + 5), atol=1e-5, rtol=1e-4)
    plain = build().value
    assert not torch.allclose(plain(obs), plain(10 * obs + 5), atol=1e-3)


# ---------------------------------------------------------------------------------------- acting


def act(learner, count=4000):
    obs = torch.zeros(len(SEEDS), count, DATASET.spec.obs_dim)
    with torch.no_grad():
        return learner.act(obs, rng(5, Stream.EVALUATION))


def test_samples_come_from_the_ema_actor_and_scores_from_the_target_critics():
    learner = build()
    action = act(learner, 50)
    for module in (learner.actor, learner.critic, learner.value):
        for parameter in module.parameters():
            parameter.mul_(2.0)
    assert torch.equal(act(learner, 50), action)
    learner.target_critic.net.layers[-1].weight.mul_(-1.0)
    other = act(learner, 50)
    assert not torch.equal(other, action)
    learner.ema_actor.net.last.bias.add_(1.0)
    assert not torch.equal(act(learner, 50), other)


def test_greedy_takes_the_candidate_with_the_largest_minimum_of_the_targets():
    learner = build()
    obs = torch.zeros(2, 20, 8, 3)
    candidates = learner.diffusion.sample_clipping_iterates(
        learner.ema_actor, obs, learner.low, learner.high, rng(5, Stream.EVALUATION)
    )
    q = learner.target_critic(obs, candidates)  # [K, E, N, C]
    action = act(learner, 20)
    for k in range(2):
        for n in range(20):
            scores = [min(q[k, 0, n, c], q[k, 1, n, c]).item() for c in range(8)]
            assert torch.equal(action[k, n], candidates[k, n, int(np.argmax(scores))])


E = math.e


@pytest.mark.parametrize(
    ("changes", "advantages", "share"),
    [
        ({"candidate_choice": "softmax"}, (0.0, math.log(3.0)), 0.75),
        (
            {"candidate_choice": "softmax", "choice_inv_temperature": 2.0},
            (0.0, math.log(3.0)),
            0.9,
        ),
        ({"candidate_choice": "implicit"}, (-3.0, 0.1), 0.7),
        ({"critic_objective": "quantile"}, (-1.0, 2.0), 0.3 / 0.7),
        ({"critic_objective": "exponential"}, (-1.0, 1.0), (E - 1) / (E - 1 + 1 - 1 / E)),
        ({"critic_objective": "exponential"}, (-1.0, 9.0), (5 / 9) / (5 / 9 + 1 - 1 / E)),
        ({"candidate_choice": "greedy"}, (0.1, 0.2), 1.0),
    ],
)
def test_candidates_are_chosen_in_proportion_to_their_weight(changes, advantages, share):
    """Two candidates with Q = V + advantage: how often the second is taken."""
    learner = build(num_candidates=2, **{"candidate_choice": "implicit", **changes})
    pair = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
    learner.diffusion.sample_clipping_iterates = lambda actor, obs, *_: pair.expand(
        *obs.shape[:-1], 2
    )
    low, high = advantages
    learner.target_critic.forward = lambda obs, action: (
        torch.where(action[..., 0] > 0, high, low) + learner.value(obs)
    ).unsqueeze(1)
    found = (act(learner)[..., 0] > 0).float().mean().item()
    assert found == pytest.approx(share, abs=0.02)


# ----------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay": "linear"},
        {"critic_objective": "huber"},
        {"actor_objective": "awr"},
        {"candidate_choice": "argmax"},
    ],
)
def test_unknown_option_is_refused_with_the_choices(changes):
    with pytest.raises(ValueError, match="expected one of"):
        Config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"actor_updates": 0},
        {"num_candidates": 0},
        {"expectile": 1.0},
        {"quantile": 0.0},
        {"exponential_scale": 0.0},
        {"actor_objective": "soft_adv", "critic_objective": "exponential"},
    ],
)
def test_a_value_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Config(**changes)


# ------------------------------------------------------------------------------------- it learns


def test_choosing_among_clones_finds_the_best_corner_and_cloning_does_not():
    """The bandit: corners of mean reward 3, 0, 1.5 and 5, equally often in the data."""
    dataset = bandit_dataset()
    config = replace(
        SMALL,
        hidden_dim=32,
        num_blocks=1,
        batch_size=96,
        actor_batch_size=96,
        actor_updates=1,
        lr=3e-3,
        critic_lr=1e-2,
        tau=0.02,
        lr_decay="off",
        denoise_steps=5,
        dropout_rate=0.0,
        ema_decay=0.98,
        num_candidates=32,
    )
    learner, _ = train(IDQL(config, dataset.spec, SEEDS), dataset, SEEDS, 250)

    def best(action):
        return ((action[..., 0] > 0) & (action[..., 1] < 0)).mean(axis=1)

    greedy = best(actions(learner, SEEDS, 200))
    learner.config = replace(config, num_candidates=1)
    clone = best(actions(learner, SEEDS))
    assert greedy.min() > 0.95
    assert 0.1 < clone.min() <= clone.max() < 0.45
