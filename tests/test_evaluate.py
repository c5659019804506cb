"""The rollout loop against one environment played at a time."""

from __future__ import annotations

import re

import gymnasium
import numpy as np
import pytest
import torch

from algorithms.blocks.rng import RowRng, Stream
from harness.evaluate import EvaluationError, Evaluator


class Walk(gymnasium.Env):
    """A seeded random walk that ends early for some seeds and by time limit for others."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    limit = 12

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.t = float(self.np_random.normal()), 0
        return self._obs(), {}

    def step(self, action):
        assert action.shape == (1,)
        assert abs(float(action[0])) <= 1.0
        self.position += float(action[0]) + 0.3 * float(self.np_random.normal())
        self.t += 1
        terminated = self.position > 2.0
        info = {"mode": self.t % 3} if terminated else {}
        return self._obs(), self.position, terminated, self.t >= self.limit, info

    def _obs(self):
        return np.array([self.position, self.t], np.float32)


class LinearPolicy:
    """A different gain for each seed; may exceed the bounds."""

    def __init__(self, gains):
        self.gains = torch.tensor(gains)

    def act(self, obs, rng):
        return self.gains[:, None, None] * obs[..., :1]


class NoisyPolicy:
    """Depends on the numbers it is given."""

    def act(self, obs, rng):
        return 0.1 * obs[..., :1] + rng.normal(obs.shape[1], 1)


def play_one(gain, env_seed):
    env = Walk()
    obs, _ = env.reset(seed=env_seed)
    total, length, over = 0.0, 0, False
    while not over:
        action = np.clip(np.float32(gain) * obs[:1], -1, 1)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, length, over = total + reward, length + 1, terminated or truncated
    return total, length


def evaluate(policy, seeds, episodes, num_envs, alive=None, make=Walk, compiled=False):
    evaluator = Evaluator(make, len(seeds), episodes, num_envs, 50, compiled)
    step = torch.full((len(seeds),), 7)
    result = evaluator.run(policy, torch.tensor(seeds), step, alive or [True] * len(seeds))
    evaluator.close()
    return result


@pytest.mark.parametrize("num_envs", [1, 3, 7, 20])
def test_returns_and_lengths_equal_one_environment_at_a_time(num_envs):
    gains = [0.9, -0.4, 2.0]
    episodes, failed = evaluate(LinearPolicy(gains), [0, 1, 2], 7, num_envs)
    assert failed == {}
    lengths = set()
    for gain, played in zip(gains, episodes, strict=True):
        assert [item.episode for item in played] == list(range(7))
        for item in played:
            total, length = play_one(gain, 50 + item.episode)
            assert item.env_seed == 50 + item.episode
            assert item.length == length
            assert item.episode_return == pytest.approx(total, abs=1e-9)
            lengths.add(length)
            assert item.mode == (None if length == Walk.limit else length % 3)
    assert Walk.limit in lengths  # both ways of ending were met
    assert min(lengths) < Walk.limit


def test_a_seed_plays_the_same_episodes_alone_or_in_a_stack():
    stacked, _ = evaluate(NoisyPolicy(), [4, 9, 2], 5, 2)
    for index, seed in enumerate([4, 9, 2]):
        alone, _ = evaluate(NoisyPolicy(), [seed], 5, 2)
        assert stacked[index] == alone[0]


def test_the_number_of_environments_does_not_change_the_returns():
    everything, _ = evaluate(NoisyPolicy(), [4, 9], 9, 9)
    for num_envs in (1, 2, 4, 5):
        assert evaluate(NoisyPolicy(), [4, 9], 9, num_envs)[0] == everything


@pytest.mark.slow
def test_a_compiled_policy_plays_the_same_episodes_however_many_are_stepped():
    """As eager ones to rounding, and bit by bit whatever the number of rows."""
    eager, _ = evaluate(NoisyPolicy(), [4, 9], 9, 9)
    compiled, _ = evaluate(NoisyPolicy(), [4, 9], 9, 9, compiled=True)
    for mine, theirs in zip(compiled, eager, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.length == other.length
            assert one.episode_return == pytest.approx(other.episode_return, abs=1e-4)
    for num_envs in (3, 5):
        assert evaluate(NoisyPolicy(), [4, 9], 9, num_envs, compiled=True)[0] == compiled


def test_a_draw_that_mixes_episodes_is_refused():
    class Mixing:
        def act(self, obs, rng):
            return obs[..., :1] + rng.normal(1)

    with pytest.raises(ValueError, match="must be led by the N = 4 rows"):
        evaluate(Mixing(), [0], 4, 4)


def test_dead_seeds_are_not_played_and_do_not_change_the_others():
    every, _ = evaluate(NoisyPolicy(), [4, 9], 5, 2)
    some, _ = evaluate(NoisyPolicy(), [4, 9], 5, 2, alive=[False, True])
    assert some[0] == []
    assert some[1] == every[1]


def test_an_action_that_is_not_finite_ends_only_its_seed():
    episodes, failed = evaluate(LinearPolicy([0.5, float("nan")]), [0, 1], 4, 4)
    good, _ = evaluate(LinearPolicy([0.5]), [0], 4, 4)
    assert failed == {1: "action (environment step 0)"}
    assert episodes == [good[0], []]


class Failing(Walk):
    """Raises, or returns what is not a number, at one step; `left` times over all instances."""

    left, made = 0, 0

    def __init__(self, how="raise"):
        super().__init__()
        self.how = how
        type(self).made += 1

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.t != 3 or type(self).left == 0:
            return obs, reward, *rest
        type(self).left -= 1
        if self.how == "raise":
            raise OSError("the simulator is unwell")
        return obs, float("nan"), *rest

    def reset(self, **options):
        if self.how == "reset" and type(self).left:
            type(self).left -= 1
            raise OSError("the simulator is unwell")
        return super().reset(**options)


@pytest.mark.parametrize("how", ["raise", "nan", "reset"])
def test_an_episode_whose_environment_fails_once_is_played_anew_and_counted(how, monkeypatch):
    seeds, step = torch.tensor([4, 9]), torch.tensor([7, 7])
    whole, _ = evaluate(NoisyPolicy(), [4, 9], 5, 2)
    monkeypatch.setattr(Failing, "left", 1)
    monkeypatch.setattr(Failing, "made", 0)
    evaluator = Evaluator(lambda: Failing(how), 2, 5, 2, 50)
    for retried in (1, 0):
        episodes, failed = evaluator.run(NoisyPolicy(), seeds, step, [True, True])
        assert episodes == whole
        assert failed == {}
        assert sum(evaluator.retried) == retried
    assert Failing.made == 5, "four environments, and a new one for the one that failed"


@pytest.mark.parametrize(
    ("how", "cause"),
    [("raise", "OSError: the simulator is unwell"), ("nan", "ValueError: a reward or an obs")],
)
def test_an_environment_that_fails_twice_is_named_with_its_seed_and_step(how, cause, monkeypatch):
    monkeypatch.setattr(Failing, "left", 100)
    episodes, failed = evaluate(LinearPolicy([0.0]), [7], 2, 2, make=lambda: Failing(how))
    assert episodes == [[]]
    assert isinstance(failed[0], EvaluationError)
    assert re.fullmatch(
        rf"seed 7: .*Failing.* failed twice in episode \d \(env seed 5\d\) at step 3: {cause}.*",
        str(failed[0]),
    )


@pytest.mark.parametrize("how", ["raise", "reset"])
def test_an_environment_that_fails_twice_ends_only_its_seed(how, monkeypatch):
    monkeypatch.setattr(Failing, "left", 100)
    whole, _ = evaluate(NoisyPolicy(), [4, 9, 2], 5, 1)
    made = []

    def make():  # the second environment is the second seed's, and so are those in its place
        made.append(Failing(how) if made else Walk())
        return Walk() if len(made) == 3 else made[-1]

    episodes, failed = evaluate(NoisyPolicy(), [4, 9, 2], 5, 1, make=make)
    assert list(failed) == [1]
    assert str(failed[1]).startswith("seed 9: ")
    assert episodes == [whole[0], [], whole[2]]


@pytest.mark.parametrize("told", [None, 30])
def test_an_episode_without_end_or_time_limit_is_an_error_after_many_steps(told, monkeypatch):
    """An environment that has a limit is held to it, however long that is."""
    monkeypatch.setattr("harness.evaluate.ENDLESS", 20)
    monkeypatch.setattr(Walk, "limit", 25)
    monkeypatch.setattr(
        Walk, "spec", gymnasium.envs.registration.EnvSpec("Walk-v0", max_episode_steps=told)
    )
    episodes, failed = evaluate(LinearPolicy([-0.5]), [7], 1, 1)
    if told is None:
        assert episodes == [[]]
        assert str(failed[0]).startswith("seed 7: episode 0 of Walk-v0 did not end in 20 steps")
    else:
        assert failed == {}
        assert [episode.length for episode in episodes[0]] == [25]


def test_evaluation_noise_is_a_function_of_seed_step_episode_and_environment_step():
    seeds, step = torch.tensor([3, 5]), torch.tensor([10, 10])
    episode, env_step = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([[7, 7, 8], [8, 7, 7]])
    rng = RowRng(seeds, step, Stream.EVALUATION, episode, env_step)
    first, second = rng.normal(3, 2), rng.normal(3, 2)
    for k in range(2):
        for row in range(3):
            own = RowRng(
                seeds[k : k + 1],
                step[:1],
                Stream.EVALUATION,
                episode[k : k + 1, row : row + 1],
                env_step[k : k + 1, row : row + 1],
            )
            assert torch.equal(own.normal(1, 2)[0, 0], first[k, row])
            assert torch.equal(own.normal(1, 2)[0, 0], second[k, row])
    assert len(torch.cat([first, second]).flatten().unique()) == 24
