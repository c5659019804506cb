"""Single steps of the simulator from a given observation: what generated transitions are held to.

Works where an observation is the whole state: MuJoCo locomotion whose observation is positions
(without the root's place) and velocities, and PointMaze. Adroit's observations lack the velocities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.datasets.errors import DatasetError
from harness.environments import EnvironmentSpec

PROBES = 5  # steps of the environment that must come back the same from their observations
TOLERANCE = 1e-2  # of them, relative to 1 + |x|; observations are rounded to float32


class Simulator:
    """Next observation, reward and termination of the real environment, one step at a time.

    Raises:
        DatasetError: if the environment's state cannot be set from its observation.
    """

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.env: Any = spec.make()
        self.inner: Any = self.env.unwrapped
        self.name = spec.env_id
        self._check()

    def step(
        self, obs: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row on its own: [N, O], [N, A] -> next_obs [N, O], reward [N], terminated [N].

        A row whose simulation is not finite has nan in next_obs and reward.
        """
        next_obs = np.full(obs.shape, np.nan, np.float32)
        reward, terminated = np.full(len(obs), np.nan), np.zeros(len(obs), bool)
        for i in range(len(obs)):
            if not (np.isfinite(obs[i]).all() and np.isfinite(action[i]).all()):
                continue
            self._restore(obs[i].astype(np.float64))
            found, gain, end, _, _ = self.inner.step(action[i].astype(np.float64))
            flat = self.env.observation(found)
            if np.isfinite(flat).all():
                next_obs[i], reward[i], terminated[i] = flat, gain, end
        return next_obs, reward, terminated

    def close(self) -> None:
        self.env.close()

    def _restore(self, obs: np.ndarray) -> None:
        body = getattr(self.inner, "point_env", self.inner)
        body.data.qacc_warmstart[:] = 0.0  # left by the row before
        if body is not self.inner:
            # achieved goal (the position), desired goal, position, velocity
            body.set_state(obs[4:6], obs[6:8])
            self.inner.goal = obs[2:4]
            return
        positions, velocities = body.model.nq, body.model.nv
        hidden = positions + velocities - len(obs)  # the root's place, which is set to 0
        if not 0 <= hidden <= 2:
            raise ValueError(
                f"{len(obs)} values for {positions} positions, {velocities} velocities"
            )
        placed = np.concatenate((np.zeros(hidden), obs))
        body.set_state(placed[:positions], placed[positions:])

    def _check(self) -> None:
        """Steps of an episode must come back the same from their observations alone."""
        rng = np.random.default_rng(0)
        space = self.env.action_space
        obs, _ = self.env.reset(seed=0)
        played = []
        for _ in range(PROBES):
            # Gentle: beyond 10 velocities are clipped in some observations.
            action = 0.1 * rng.uniform(space.low, space.high)
            after, reward, _, _, _ = self.env.step(action)
            played.append((obs, action, after, reward))
            obs = after
        before, actions, expected, rewards = (
            np.stack(column) for column in zip(*played, strict=True)
        )
        try:
            found, gained, _ = self.step(before, actions)
            gap = np.abs(found - expected) / (1.0 + np.abs(expected))
            if not (gap.max() < TOLERANCE and np.abs(gained - rewards).max() < TOLERANCE):
                raise ValueError(f"a step is off by {gap.max():.3g}")
        except (AttributeError, ValueError) as error:
            self.close()
            raise DatasetError(
                f"the state of {self.name} cannot be set from its observation ({error}); dynamics "
                "errors are measured for MuJoCo locomotion and PointMaze"
            ) from error
