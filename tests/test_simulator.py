"""The simulator set from observations: against its own steps, and where it cannot be set."""

from __future__ import annotations

import numpy as np
import pytest

from harness.datasets.errors import DatasetError
from harness.environments import EnvironmentSpec, pointmaze_evaluation
from harness.simulator import Simulator

pytest.importorskip("mujoco")
SPECS = {
    "Hopper": EnvironmentSpec("Hopper-v5"),
    "HalfCheetah": EnvironmentSpec("HalfCheetah-v5"),
    "Walker2d": EnvironmentSpec("Walker2d-v5"),
    "PointMaze": pointmaze_evaluation("umaze"),
}


@pytest.mark.parametrize("name", SPECS)
def test_steps_of_an_episode_come_back_from_its_observations_in_any_order(name):
    simulator = Simulator(SPECS[name])
    env = SPECS[name].make()
    rng = np.random.default_rng(1)
    obs, _ = env.reset(seed=3)
    rows = []
    for _ in range(8):
        action = 0.1 * rng.uniform(env.action_space.low, env.action_space.high)
        after, reward, terminated, _, _ = env.step(action)
        rows.append((obs, action, after, reward, terminated))
        obs = after
    before, action, after, reward, terminated = (np.stack(c)[::-1] for c in zip(*rows, strict=True))
    found = simulator.step(before, action)
    np.testing.assert_allclose(found[0], after, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(found[1], reward, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(found[2], terminated)
    env.close()
    simulator.close()


def test_rows_that_are_not_finite_stay_nan_and_disturb_no_other():
    simulator = Simulator(SPECS["Hopper"])
    obs = np.zeros((3, 11), np.float32)
    obs[:, 0] = 1.25
    obs[1, 3] = np.inf
    next_obs, reward, _ = simulator.step(obs, np.zeros((3, 3), np.float32))
    assert np.isnan(next_obs[1]).all()
    assert np.isnan(reward[1])
    np.testing.assert_array_equal(next_obs[0], next_obs[2])
    simulator.close()


@pytest.mark.parametrize("env_id", ["Ant-v5", "Pendulum-v1"])
def test_an_environment_whose_state_is_hidden_is_refused(env_id):
    with pytest.raises(DatasetError, match="cannot be set from its observation"):
        Simulator(EnvironmentSpec(env_id))
