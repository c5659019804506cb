"""K policies x N environments stepped together, with one policy call per environment step.

Owns the rollout loop and which environment seed an episode gets. Raw returns only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from algorithms.api import Policy
from algorithms.blocks import products
from algorithms.blocks.rng import RowRng, Stream

MIN_ROWS = 4
"""Rows of a policy call, at least: below four, matrix kernels on CPU sum in another order, and a
seed's last episodes would depend on how many others are still in play."""

ENDLESS = 100_000
"""Steps after which an episode counts as one that does not end, where its environment has no time
limit: a hundred times those of locomotion."""


@dataclass(frozen=True)
class Episode:
    """One finished evaluation episode."""

    episode: int
    env_seed: int
    episode_return: float  # undiscounted, raw environment rewards
    length: int  # environment steps
    mode: int | None = None  # which of the task's solutions, if the environment says so


class EvaluationError(RuntimeError):
    """An environment misbehaved in an episode, and again when it was played anew in a fresh one.

    Or it has no time limit, and an episode did not end. Names the training seed, the environment,
    the episode, its seed and the step.
    """


@dataclass
class _Slot:
    """One environment and the episode it is playing."""

    env: Any
    episode: int = -1  # -1: idle
    total: float = 0.0
    length: int = 0
    mode: int | None = None
    again: bool = False  # the episode in play is a second try
    obs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class Evaluator:
    """Plays the same episodes for every seed and every algorithm.

    Episode `e` always starts from `env.reset(seed=first_env_seed + e)`, and the policy's numbers
    are a function of seed, step, episode and environment step. So returns depend neither on
    `num_envs` nor on the other seeds of the stack. An environment that is done takes the next
    episode; one with none left is not computed any more.

    Args:
        make_env: builds one environment with flat observations and its time limit.
        num_seeds: K.
        episodes: episodes per seed and evaluation.
        num_envs: environments stepped at once per seed (N is the smaller of the two).
        compiled: compile the policy's call, for any number of rows.
    """

    def __init__(
        self,
        make_env: Callable[[], Any],
        num_seeds: int,
        episodes: int,
        num_envs: int,
        first_env_seed: int,
        compiled: bool = False,
    ) -> None:
        if episodes < 1 or num_envs < 1:
            raise ValueError(f"episodes is {episodes}, num_envs {num_envs}; both must be >= 1")
        self.episodes = episodes
        self.first_env_seed = first_env_seed
        self.retried = [0] * num_seeds  # episodes of the last run that had to be played anew
        self._seeds = [0] * num_seeds  # of the last run
        self._make_env = make_env
        self.slots = [
            [_Slot(make_env()) for _ in range(min(episodes, num_envs))] for _ in range(num_seeds)
        ]
        env = self.slots[0][0].env
        self.obs_dim = int(np.prod(env.observation_space.shape))
        self.action_low, self.action_high = env.action_space.low, env.action_space.high
        # Rows leave as episodes end: one graph for all numbers of them, which costs nothing where
        # padded rows would cost what they cost in play.
        self._call = products.compiled(_call, dynamic=True) if compiled else _call

    def run(
        self,
        policy: Policy,
        seeds: torch.Tensor,
        step: torch.Tensor,
        alive: Sequence[bool],
        on_step: Callable[[], None] = lambda: None,
    ) -> tuple[list[list[Episode]], dict[int, str | EvaluationError]]:
        """Episodes of each seed, and why a seed that was to be played has none.

        Args:
            seeds: training seeds, int64 [K], on the policy's device.
            step: gradient steps done, int64 [K]; the policy's noise depends on it.
            alive: which seeds to play; the others get an empty list.
            on_step: called before every environment step; what it raises ends the evaluation.

        Returns:
            K lists in the order of episodes, and by place in the stack: which action was not
            finite (the fault of the policy), or an error if an environment failed twice in one
            episode. The first time the episode is played anew in a new environment, and counted
            in `retried`. The other seeds go on.
        """
        self.retried = [0] * len(self.slots)
        self._seeds = seeds.tolist()
        done: list[list[Episode]] = [[] for _ in self.slots]
        failed: dict[int, str | EvaluationError] = {}
        waiting = [list(range(self.episodes))[::-1] if is_alive else [] for is_alive in alive]
        active: list[list[_Slot]] = [[] for _ in self.slots]
        for k, row in enumerate(self.slots):
            active[k] = row[: len(waiting[k])]
            try:
                for slot in active[k]:
                    self._begin(k, slot, waiting[k].pop())
            except EvaluationError as error:
                failed[k], active[k] = error, []
        while any(active):
            on_step()
            actions = self._act(policy, seeds, step, active)
            for k, slots in enumerate(active):
                if not np.isfinite(actions[k, : len(slots)]).all():
                    failed[k] = f"action (environment step {slots[0].length})"
                    done[k], active[k] = [], []
                    continue
                try:
                    done[k] += self._round(k, slots, actions[k], waiting[k])
                    active[k] = [slot for slot in slots if slot.episode >= 0]
                except EvaluationError as error:
                    failed[k], done[k], active[k] = error, [], []
        for episodes in done:
            episodes.sort(key=lambda item: item.episode)
        return done, failed

    def _act(
        self,
        policy: Policy,
        seeds: torch.Tensor,
        step: torch.Tensor,
        active: list[list[_Slot]],
    ) -> np.ndarray:
        """Actions [K, rows, A] for the episodes in play, packed to the front of each seed."""
        num_rows = max(MIN_ROWS, *(len(slots) for slots in active))
        obs = np.zeros((len(active), num_rows, self.obs_dim), dtype=np.float32)
        place = np.zeros((2, len(active), num_rows), dtype=np.int64)  # episode, environment step
        for k, slots in enumerate(active):
            for row, slot in enumerate(slots):
                obs[k, row] = slot.obs
                place[:, k, row] = slot.episode, slot.length
        episode, env_step = torch.from_numpy(place).to(seeds.device)
        with torch.no_grad():
            values = self._call(
                policy, torch.from_numpy(obs).to(seeds.device), seeds, step, episode, env_step
            )
        actions = values.cpu().numpy()
        if actions.shape[:2] != obs.shape[:2]:
            raise ValueError(
                f"act() returned shape {actions.shape} for observations {obs.shape}; expected "
                "[K, N, A]"
            )
        return actions

    def _round(
        self, k: int, slots: list[_Slot], actions: np.ndarray, waiting: list[int]
    ) -> list[Episode]:
        """Steps the environments of seed k once; the episodes that ended, whose slots go on."""
        ended = []
        for slot, action in zip(slots, actions, strict=False):
            if self._play(k, slot, action):
                ended.append(self._finished(slot))
                if waiting:
                    self._begin(k, slot, waiting.pop())
                else:
                    slot.episode = -1
        return ended

    def _begin(self, k: int, slot: _Slot, episode: int) -> None:
        slot.episode, slot.again = episode, False
        try:
            self._reset(slot)
        except Exception as error:
            self._play_anew(k, slot, error)

    def _reset(self, slot: _Slot) -> None:
        slot.total, slot.length, slot.mode = 0.0, 0, None
        first, _ = slot.env.reset(seed=self.first_env_seed + slot.episode)
        slot.obs = np.asarray(first, dtype=np.float32).reshape(-1)

    def _play(self, k: int, slot: _Slot, action: np.ndarray) -> bool:
        """Steps one environment of seed k; whether its episode is over."""
        try:
            over = self._step(slot, action)
        except Exception as error:
            self._play_anew(k, slot, error)
            return False
        if not over and slot.length >= ENDLESS and _limit(slot.env) is None:
            raise EvaluationError(
                f"seed {self._seeds[k]}: episode {slot.episode} of {_name(slot.env)} did not end "
                f"in {ENDLESS} steps (env seed {self.first_env_seed + slot.episode}), and the "
                "environment has no time limit. Register it with max_episode_steps, or write the "
                "dataset with an environment that has one"
            )
        return over

    def _step(self, slot: _Slot, action: np.ndarray) -> bool:
        slot.length += 1
        next_obs, reward, terminated, truncated, info = slot.env.step(
            np.clip(action, self.action_low, self.action_high)
        )
        slot.obs = np.asarray(next_obs, dtype=np.float32).reshape(-1)
        slot.total += float(reward)
        slot.mode = info.get("mode")
        if not np.isfinite(slot.total) or not np.isfinite(slot.obs).all():
            raise ValueError("a reward or an observation is not finite")
        return bool(terminated or truncated)

    def _play_anew(self, k: int, slot: _Slot, error: Exception) -> None:
        """The episode from its start in a new environment; a second failure is the end."""
        if not slot.again:
            slot.again = True
            self.retried[k] += 1
            try:
                slot.env.close()
                slot.env = self._make_env()
                self._reset(slot)
                return
            except Exception as second:
                error = second
        raise EvaluationError(
            f"seed {self._seeds[k]}: {_name(slot.env)} failed twice in episode {slot.episode} "
            f"(env seed {self.first_env_seed + slot.episode}) at step {slot.length}: "
            f"{type(error).__name__}: {error}"
        ) from error

    def _finished(self, slot: _Slot) -> Episode:
        env_seed = self.first_env_seed + slot.episode
        return Episode(slot.episode, env_seed, slot.total, slot.length, slot.mode)

    def close(self) -> None:
        """Closes every environment."""
        for row in self.slots:
            for slot in row:
                slot.env.close()


def _name(env: Any) -> str:
    return env.spec.id if env.spec else str(env)


def _limit(env: Any) -> int | None:
    """The time limit Gymnasium holds an environment to, in steps."""
    return env.spec.max_episode_steps if env.spec else None


def _call(
    policy: Policy,
    obs: torch.Tensor,
    seeds: torch.Tensor,
    step: torch.Tensor,
    episode: torch.Tensor,
    env_step: torch.Tensor,
) -> torch.Tensor:
    """Actions [K, rows, A]; the random numbers belong to the call, so that both are one graph."""
    return policy.act(obs, RowRng(seeds, step, Stream.EVALUATION, episode, env_step))
