"""K policies x N environments stepped together, with one policy call per environment step.

Owns the rollout loop and which environment seed an episode gets. Raw returns only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from algorithms.api import Policy
from algorithms.blocks.rng import Rng, Stream


@dataclass(frozen=True)
class Episode:
    """One finished evaluation episode."""

    episode: int
    env_seed: int
    episode_return: float  # undiscounted, raw environment rewards
    length: int  # environment steps


class EvaluationError(RuntimeError):
    """An environment misbehaved; names the environment, the seed and the step."""


@dataclass
class _Slot:
    """One environment and the episode it is playing."""

    env: Any
    episode: int = -1  # -1: idle
    total: float = 0.0
    length: int = 0


class Evaluator:
    """Plays the same episodes for every seed and every algorithm.

    Episode `e` always starts from `env.reset(seed=first_env_seed + e)`. Slot `n` of a seed plays
    the episodes n, n + N, n + 2N, ... in this order, so what a seed sees does not depend on the
    other seeds of its stack.

    Args:
        make_env: builds one environment with flat observations and its time limit.
        num_seeds: K.
        episodes: episodes per seed and evaluation.
        num_envs: environments stepped at once per seed (N is the smaller of the two).
    """

    def __init__(
        self,
        make_env: Callable[[], Any],
        num_seeds: int,
        episodes: int,
        num_envs: int,
        first_env_seed: int,
    ) -> None:
        if episodes < 1 or num_envs < 1:
            raise ValueError(f"episodes is {episodes}, num_envs {num_envs}; both must be >= 1")
        self.episodes = episodes
        self.first_env_seed = first_env_seed
        self.slots = [
            [_Slot(make_env()) for _ in range(min(episodes, num_envs))] for _ in range(num_seeds)
        ]
        env = self.slots[0][0].env
        self.obs_dim = int(np.prod(env.observation_space.shape))
        self.action_low, self.action_high = env.action_space.low, env.action_space.high

    def run(
        self,
        policy: Policy,
        seeds: torch.Tensor,
        step: torch.Tensor,
        alive: Sequence[bool],
    ) -> tuple[list[list[Episode]], dict[int, str]]:
        """Episodes of each seed, and why a seed has none.

        Args:
            seeds: training seeds, int64 [K], on the policy's device.
            step: gradient steps done, int64 [K]; the policy's noise depends on it.
            alive: which seeds to play; the others get an empty list.

        Returns:
            K lists in the order of episodes, and for seeds whose policy produced an action that
            is not finite the reason.
        """
        num_seeds, num_slots = len(self.slots), len(self.slots[0])
        obs = np.zeros((num_seeds, num_slots, self.obs_dim), dtype=np.float32)
        done: list[list[Episode]] = [[] for _ in range(num_seeds)]
        failed: dict[int, str] = {}
        for k in range(num_seeds):
            for n, slot in enumerate(self.slots[k]):
                slot.episode = -1
                if alive[k]:
                    self._begin(slot, n, obs[k, n])
        env_step = 0
        while any(slot.episode >= 0 for row in self.slots for slot in row):
            rng = Rng(seeds, step, Stream.EVALUATION, env_step)
            with torch.no_grad():
                action = policy.act(torch.from_numpy(obs).to(seeds.device), rng)
            actions = action.cpu().numpy()
            if actions.shape[:2] != (num_seeds, num_slots):
                raise ValueError(
                    f"act() returned shape {actions.shape} for observations {obs.shape}; "
                    "expected [K, N, A]"
                )
            for k in range(num_seeds):
                if (
                    any(slot.episode >= 0 for slot in self.slots[k])
                    and not np.isfinite(actions[k]).all()
                ):
                    failed[k] = f"action is not finite at environment step {env_step}"
                    done[k] = []
                    for slot in self.slots[k]:
                        slot.episode = -1
                for n, slot in enumerate(self.slots[k]):
                    if slot.episode >= 0:
                        self._play(slot, actions[k, n], obs[k, n], done[k], num_slots)
            env_step += 1
        for episodes in done:
            episodes.sort(key=lambda item: item.episode)
        return done, failed

    def _begin(self, slot: _Slot, episode: int, obs: np.ndarray) -> None:
        slot.episode, slot.total, slot.length = episode, 0.0, 0
        first, _ = slot.env.reset(seed=self.first_env_seed + episode)
        obs[:] = np.asarray(first, dtype=np.float32).reshape(-1)

    def _play(
        self, slot: _Slot, action: np.ndarray, obs: np.ndarray, done: list[Episode], stride: int
    ) -> None:
        next_obs, reward, terminated, truncated, _ = slot.env.step(
            np.clip(action, self.action_low, self.action_high)
        )
        obs[:] = np.asarray(next_obs, dtype=np.float32).reshape(-1)
        slot.total += float(reward)
        slot.length += 1
        if not np.isfinite(slot.total) or not np.isfinite(obs).all():
            raise EvaluationError(
                f"{slot.env.spec.id if slot.env.spec else slot.env} returned a reward or an "
                f"observation that is not finite in episode {slot.episode} (env seed "
                f"{self.first_env_seed + slot.episode}) at step {slot.length}"
            )
        if terminated or truncated:
            env_seed = self.first_env_seed + slot.episode
            done.append(Episode(slot.episode, env_seed, slot.total, slot.length))
            following = slot.episode + stride
            slot.episode = -1
            if following < self.episodes:
                self._begin(slot, following, obs)

    def close(self) -> None:
        """Closes every environment."""
        for row in self.slots:
            for slot in row:
                slot.env.close()
