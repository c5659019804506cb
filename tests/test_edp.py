"""EDP against hand computations of what it changes in Diffusion-QL."""

from __future__ import annotations

import pytest
import torch

from algorithms.api import Batch
from algorithms.blocks.rng import Rng, Stream
from algorithms.edp import Config, EfficientDiffusionPolicy
from algorithms.testing import TinyDataset

SEEDS = (0, 1)
SMALL = Config(
    hidden_dim=32, batch_size=16, schedule="vp", denoise_steps=20, evaluations=5, num_candidates=6
)


def make(**changes):
    dataset = TinyDataset()
    config = Config(**{**vars(SMALL), **changes})
    learner = EfficientDiffusionPolicy(config, dataset.spec, SEEDS)
    batch = learner.sample(dataset, rng(100))
    return learner, dataset, batch


def rng(step=0):
    return Rng.at_step(SEEDS, step, Stream.TEST)


def test_an_oracle_of_the_noise_stands_for_the_clean_action():
    learner, _, batch = make()
    t = rng().integers(20, 16)
    noise = rng(1).normal(16, 2)
    clean = 0.9 * batch.action
    noisy = learner.diffusion.add_noise(clean, t, noise)
    # The last levels keep little of the action, so that rounding grows there.
    torch.testing.assert_close(learner.one_step_action(noisy, t, noise), clean, atol=2e-3, rtol=0)
    outside = learner.one_step_action(noisy, t, noise - 100.0)
    assert torch.equal(outside, learner.high.expand_as(outside))


def test_the_actors_loss_evaluates_the_noise_network_once():
    learner, _, batch = make()
    calls = []

    def counting(noisy, t, obs):
        calls.append(noisy.shape)
        return learner.actor(noisy, t, obs)

    learner.actor_loss(counting, batch, rng())
    assert len(calls) == 1


def test_q_loss_divides_by_the_same_critics_mean_size():
    learner, _, batch = make()
    q = learner.critic(batch.obs, batch.action)
    first = rng().uniform() > 0.5
    actual = learner.q_loss(batch.action, batch, rng())
    for k in range(2):
        chosen = q[k, 0 if first[k] else 1]
        assert actual[k].item() == pytest.approx(
            (-chosen.mean() / chosen.abs().mean()).item(), rel=1e-5
        )
    assert {
        bool((Rng.at_step((s,), 0, Stream.TEST).uniform() > 0.5).item()) for s in range(20)
    } == {
        True,
        False,
    }


def test_the_actor_moves_along_the_critic_that_is_from_before_the_step():
    """Both gradients are taken before either step, as in the code."""
    learner, _, batch = make()
    twin, _, _ = make()
    metrics = learner.update(batch, rng(5))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, make()[0].state_dict()[name])
    # The draws of an update, in order: the next action's start, then the actor's loss.
    draws = rng(5)
    twin.critic_gradients(batch, draws)
    _, expected = twin.actor_loss(twin.actor, batch, draws)
    torch.testing.assert_close(metrics["q_loss"], expected["q_loss"])


def test_the_moving_average_starts_after_a_thousand_steps_and_moves_every_fifth():
    learner, _, batch = make()
    before = {name: value.clone() for name, value in learner.ema_actor.named_parameters()}

    def moved(step):
        learner.update(batch, Rng.at_step(SEEDS, step, Stream.TEST))
        now = dict(learner.ema_actor.named_parameters())
        changed = any(not torch.equal(now[name], before[name]) for name in before)
        before.update({name: value.clone() for name, value in now.items()})
        return changed

    # A step is numbered from 0 by us and from 1 by the authors.
    assert [moved(step) for step in (0, 4, 999, 1003, 1004, 1005, 1009)] == [
        False, False, False, False, True, False, True,
    ]  # fmt: skip


def test_actions_of_the_data_are_moved_off_the_bounds():
    learner, _, _ = make(action_clip=0.5)
    clipped = learner.clip(torch.full((2, 3, 2), 7.0))
    assert torch.equal(clipped, (0.5 * learner.high).expand(2, 3, 2))


def test_each_critic_is_clipped_by_its_own_norm():
    learner, _, batch = make(clip_norm=1e-3)
    big = Batch(**{**vars(batch), "reward": batch.reward * 1e3})
    _, grads = learner.critic_gradients(big, rng())
    for k in range(2):
        for e in range(2):
            norm = sum(g[k, e].square().sum() for g in grads.values()).sqrt()
            assert norm > 1.0
    learner.critic_optim.step(learner.critic, grads)
    for k in range(2):
        for e in range(2):
            moments = [
                learner.critic_optim.get_buffer(f"mean/{name.replace('.', '/')}")[k, e]
                for name, _ in learner.critic.named_parameters()
            ]
            size = sum(m.square().sum() for m in moments).sqrt() / 0.1  # 1 - beta_1
            assert size.item() == pytest.approx(1e-3, rel=1e-3)


def test_unknown_samplers_are_refused():
    with pytest.raises(ValueError, match="sampler is 'ddim'; expected dpm_solver or ancestral"):
        Config(sampler="ddim")
