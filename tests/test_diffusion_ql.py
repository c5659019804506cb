"""Diffusion-QL's update against its specification: which parts move, when, and by how much."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.rng import Rng, Stream
from algorithms.diffusion_ql import Config, DiffusionQL
from algorithms.testing import TinyDataset

SMALL = Config(hidden_dim=16, batch_size=32, denoise_steps=3, num_candidates=8)
DATASET = TinyDataset()
SEEDS = (0, 1)


def build(**changes) -> DiffusionQL:
    return DiffusionQL(replace(SMALL, **changes), DATASET.spec, SEEDS)


def rng(step=0, stream=Stream.TRAIN) -> Rng:
    return Rng.at_step(SEEDS, step, stream)


def advance(learner, step):
    numbers = rng(step)
    with torch.no_grad():
        return learner.update(learner.sample(DATASET, numbers), numbers)


def weights(module):
    return torch.cat([p.flatten(1) for p in module.parameters()], dim=1).clone()


def test_target_critics_move_by_tau_towards_the_updated_critics():
    learner = build()
    before = weights(learner.target_critic)
    advance(learner, 0)
    expected = before + 0.005 * (weights(learner.critic) - before)
    torch.testing.assert_close(weights(learner.target_critic), expected, atol=1e-7, rtol=0)
    assert not torch.equal(weights(learner.critic), before)


@pytest.mark.parametrize(
    ("step", "moves"), [(0, False), (995, False), (999, False), (1000, True), (1001, False)]
)
def test_ema_actor_moves_every_fifth_step_from_step_1000(step, moves):
    learner = build()
    before = weights(learner.ema_actor)
    advance(learner, step)
    expected = before + moves * 0.005 * (weights(learner.actor) - before)
    torch.testing.assert_close(weights(learner.ema_actor), expected, atol=1e-7, rtol=0)
    assert torch.equal(weights(learner.ema_actor), before) == (not moves)


def test_seeds_at_different_steps_keep_their_own_ema_schedule():
    learner = build()
    before = weights(learner.ema_actor)
    numbers = Rng(torch.tensor(SEEDS), torch.tensor([999, 1000]), Stream.TRAIN)
    with torch.no_grad():
        learner.update(learner.sample(DATASET, numbers), numbers)
    after = weights(learner.ema_actor)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_next_actions_come_from_the_ema_actor_and_values_from_the_target_critics():
    learner = build()
    batch = learner.sample(DATASET, rng())
    target = learner.q_target(batch, rng(1))
    for module in (learner.actor, learner.critic):
        for parameter in module.parameters():
            parameter.mul_(2.0)
    assert torch.equal(learner.q_target(batch, rng(1)), target)
    next(learner.ema_actor.parameters()).add_(1.0)
    assert not torch.equal(learner.q_target(batch, rng(1)), target)


def test_target_of_a_terminated_step_is_its_reward():
    learner = build()
    batch = learner.sample(DATASET, rng())
    target = learner.q_target(batch, rng(1))
    ended = batch.terminated == 1
    assert ended.any()
    assert torch.equal(target[ended], batch.reward[ended])
    assert not torch.equal(target[~ended], batch.reward[~ended])


def test_max_q_backup_is_at_least_the_target_of_each_of_its_actions():
    """With one backup action it is the plain target of a first critic-wise max of one."""
    plain = build().q_target(build().sample(DATASET, rng()), rng(1))
    single = build(max_q_backup=True, backup_actions=1)
    torch.testing.assert_close(single.q_target(single.sample(DATASET, rng()), rng(1)), plain)
    many = build(max_q_backup=True, backup_actions=10)
    assert many.q_target(many.sample(DATASET, rng()), rng(1)).mean() > plain.mean()


def coin_of(step: int) -> list[bool]:
    """The coin is the second draw of `q_loss`."""
    numbers = rng(step)
    numbers.normal(1)
    return (numbers.uniform() < 0.5).tolist()


@pytest.mark.parametrize("normalizer", ["other_critic", "dataset"])
def test_q_loss_is_the_chosen_critics_mean_over_the_stated_scale(normalizer):
    learner = build(q_normalizer=normalizer)
    batch = learner.sample(DATASET, rng())
    seen = set()
    for step in range(8):
        action = learner.diffusion.sample(
            learner.actor, batch.obs, learner.low, learner.high, rng(step)
        )
        q, data_q = learner.critic(batch.obs, action), learner.critic(batch.obs, batch.action)
        loss = learner.q_loss(learner.actor, batch, rng(step))
        for k, heads in enumerate(coin_of(step)):
            chosen, other = (0, 1) if heads else (1, 0)
            scale = q[k, other] if normalizer == "other_critic" else data_q[k, chosen]
            expected = -q[k, chosen].mean() / scale.abs().mean()
            torch.testing.assert_close(loss[k], expected)
        seen.add(tuple(coin_of(step)))
    assert {(True, False), (False, True)} & seen, "seeds share a coin"


def test_normaliser_carries_no_gradient():
    """With equal critics q_loss is -1 or 1: a gradient through the scale would cancel it."""
    learner = build()
    for parameter in learner.critic.parameters():
        parameter[:, 1] = parameter[:, 0]
    batch = learner.sample(DATASET, rng())
    for parameter in learner.actor.parameters():
        parameter.requires_grad_(True)
    learner.q_loss(learner.actor, batch, rng(1)).sum().backward()
    assert sum(p.grad.abs().sum() for p in learner.actor.parameters()) > 1e-3


def test_actor_loss_is_bc_loss_plus_q_coef_times_q_loss():
    learner = build(q_coef=2.5)
    metrics = advance(learner, 0)
    torch.testing.assert_close(
        metrics["actor_loss"], metrics["bc_loss"] + 2.5 * metrics["q_loss"], atol=1e-6, rtol=1e-5
    )


def test_actor_step_uses_the_critic_updated_in_the_same_step():
    learner, twin = build(), build()
    batch, numbers = learner.sample(DATASET, rng(3)), rng(3)
    learner.sample(DATASET, numbers)
    with torch.no_grad():
        metrics = learner.update(batch, numbers)
        order = rng(3)
        twin.sample(DATASET, order)
        twin.update_critic(batch, order)
        _, expected = twin.actor_loss(twin.actor, batch, order)
    torch.testing.assert_close(metrics["q_loss"], expected["q_loss"])


def test_critic_learning_rate_is_not_the_actors():
    learner = build(lr=1e-5)
    assert (learner.actor_optim.lr, learner.critic_optim.lr) == (1e-5, 3e-4)


def test_bc_only_is_the_diffusion_loss_alone():
    learner = build(bc_only=True, clip_norm=1e-6)
    assert not any("critic" in name or "ema" in name for name in learner.state_dict())
    assert learner.actor_optim.clip_norm is None
    assert set(advance(learner, 0)) == {"bc_loss", "actor_grad_norm"}


def test_learning_rate_as_run_stays_within_a_thousandth_of_constant():
    learner = build(steps=2_000_000)
    scale = learner.lr_scale(torch.tensor([0, 49_999, 50_000, 1_999_999]))
    expected = [1.0, 1.0] + [0.5 * (1 + math.cos(math.pi * n / 2000)) for n in (1, 39)]
    torch.testing.assert_close(scale, torch.tensor(expected))
    assert scale.min() > 0.999
    assert build(lr_decay="off").lr_scale(torch.tensor([7])) is None
    assert build(lr_decay="cosine", steps=10).lr_scale(torch.tensor([5])).item() == pytest.approx(
        0.5
    )


def act(learner, count=4000):
    obs = torch.zeros(len(SEEDS), count, DATASET.spec.obs_dim)
    with torch.no_grad():
        return learner.act(obs, rng(5, Stream.EVALUATION))


def test_argmax_scores_at_least_softmax_and_softmax_at_least_a_plain_sample():
    learner = build()
    for parameter in learner.target_critic.parameters():
        parameter.mul_(3.0)
    scores = []
    for choice in ("none", "softmax", "argmax"):
        learner.config = replace(SMALL, candidate_choice=choice)
        action = act(learner)
        obs = torch.zeros(*action.shape[:2], DATASET.spec.obs_dim)
        scores.append(learner.target_critic(obs, action).amin(dim=1).mean().item())
    assert scores[0] < scores[1] < scores[2]


def test_candidates_are_drawn_in_proportion_to_exp_of_q():
    """Two candidates with Q of 0 and log 3: the second is taken three times in four."""
    learner = build(num_candidates=2)
    pair = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
    learner.diffusion.sample = lambda actor, obs, *_: pair.expand(*obs.shape[:-1], 2)
    learner.target_critic.forward = lambda obs, action: torch.where(
        action[..., 0] > 0, math.log(3.0), 0.0
    ).unsqueeze(1)
    share = (act(learner)[..., 0] > 0).float().mean().item()
    assert share == pytest.approx(0.75, abs=0.02)


def test_published_critics_have_the_published_size():
    spec = replace(DATASET.spec, obs_dim=17, action_dim=6, action_low=(-1.0,) * 6)
    learner = DiffusionQL(Config(), replace(spec, action_high=(1.0,) * 6), (0,))
    size = sum(p.numel() for p in learner.critic.parameters())
    assert size == pytest.approx(2.76e5, rel=0.01)


def test_frozen_targets_start_as_copies():
    learner = build()
    assert torch.equal(weights(learner.ema_actor), weights(learner.actor))
    assert torch.equal(weights(learner.target_critic), weights(frozen_copy(learner.critic)))


@pytest.mark.parametrize(
    "changes", [{"lr_decay": "linear"}, {"q_normalizer": "mean"}, {"candidate_choice": "best"}]
)
def test_unknown_option_is_refused_with_the_choices(changes):
    with pytest.raises(ValueError, match="expected one of"):
        Config(**changes)
