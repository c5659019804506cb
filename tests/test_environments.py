"""Evaluation environments: the protocol a score is defined by, and the dataset's flat order."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from harness.datasets import DatasetError
from harness.datasets.writing import write_dataset
from harness.environments import (
    BANDIT_ID,
    RING_ID,
    Bandit2D,
    EnvironmentSpec,
    check_fit,
    evaluation_environment,
    pointmaze_evaluation,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "minari"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.mark.parametrize(
    ("name", "env_id", "horizon", "obs_dim", "simulator"),
    [
        ("D4RL/pointmaze/umaze-v2", "PointMaze_UMaze-v3", 300, 8, True),
        ("maze2d-large-v1", "PointMaze_Large-v3", 800, 8, True),
        ("generated/pointmaze/medium-dense-v0", "PointMaze_MediumDense-v3", 600, 8, True),
        ("antmaze-umaze-v0", "AntMaze_UMaze-v4", 700, 31, True),
        ("antmaze-medium-diverse-v2", "AntMaze_Medium_Diverse_GR-v4", 1000, 31, True),
        ("kitchen-mixed-v0", "FrankaKitchen-v1", 280, 83, True),
        ("pen-human-v1", "AdroitHandPen-v1", 100, 45, True),
        ("D4RL/door/cloned-v2", "AdroitHandDoor-v1", 200, 39, True),
        ("mujoco/hopper/medium-v0", "Hopper-v5", 1000, 11, True),
        ("generated/bandit2d-v0", BANDIT_ID, None, 2, False),
        ("generated/ring2d-v0", RING_ID, None, 2, False),
    ],
)
def test_every_family_builds_with_flat_float32_observations(
    name: str, env_id: str, horizon: int | None, obs_dim: int, simulator: bool
) -> None:
    import importlib.metadata

    spec = evaluation_environment(name)
    assert (spec.env_id, spec.max_episode_steps) == (env_id, horizon)
    expected = f"mujoco {importlib.metadata.version('mujoco')}" if simulator else "none"
    assert spec.simulator == expected
    assert json.loads(json.dumps(spec.describe())) == spec.describe()
    env = spec.make()
    first, _ = env.reset(seed=7)
    again, _ = env.reset(seed=7)
    assert env.observation_space.contains(first)
    assert (first.shape, first.dtype) == ((obs_dim,), np.float32)
    np.testing.assert_array_equal(first, again)
    env.close()


def test_pointmaze_is_scored_at_one_fixed_goal_without_an_end() -> None:
    env = pointmaze_evaluation("umaze").make()
    goals, starts = set(), set()
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        cell = env.unwrapped.maze.cell_xy_to_rowcol(obs[2:4])
        goals.add(tuple(int(i) for i in cell))
        starts.add(tuple(int(i) for i in env.unwrapped.maze.cell_xy_to_rowcol(obs[:2])))
    assert goals == {(1, 1)}
    assert len(starts) > 1
    for step in range(300):
        _, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        assert not terminated
        assert truncated == (step == 299)
    env.close()


@pytest.mark.parametrize("maze", ["open", "umaze", "medium", "large"])
def test_the_noise_free_controller_scores_near_the_local_anchor(maze: str) -> None:
    from harness.datasets.catalog import POINTMAZE_ANCHORS
    from harness.datasets.pointmaze import WaypointController

    env = pointmaze_evaluation(maze).make()
    controller = WaypointController(env.unwrapped.maze, np.random.default_rng(0), noise=0.0)
    returns = []
    for seed in range(8):
        obs, _ = env.reset(seed=seed)
        total, truncated = 0.0, False
        while not truncated:
            observation = {"desired_goal": obs[2:4], "observation": obs[4:]}
            obs, reward, _, truncated, _ = env.step(controller.act(observation))
            total += reward
        returns.append(total)
    low, high = POINTMAZE_ANCHORS[maze]
    assert 0.75 < (np.mean(returns) - low) / (high - low) < 1.25
    env.close()


def test_an_antmaze_episode_ends_at_the_goal_with_return_one() -> None:
    env = evaluation_environment("antmaze-umaze-v0").make()
    obs, _ = env.reset(seed=0)
    goal = obs[2:4]
    inner = env.unwrapped.ant_env
    qpos, qvel = inner.data.qpos.copy(), inner.data.qvel.copy()
    qpos[:2] = goal
    inner.set_state(qpos, qvel)
    _, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
    assert (reward, terminated) == (1.0, True)
    env.close()


def test_the_environment_flattens_as_the_dataset_does() -> None:
    from harness.datasets.pointmaze import make_pointmaze

    raw = make_pointmaze("open", steps=60, seed=0)
    env = evaluation_environment(raw.id).make()
    assert env.leaves == raw.leaves
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs[:2], obs[4:6])  # achieved goal is the position
    np.testing.assert_array_equal(raw.obs[:, :2], raw.obs[:, 4:6])
    env.close()


def test_a_stored_evaluation_environment_wins_over_the_collecting_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not REAL.is_dir():
        pytest.skip("the reference datasets are not on this machine")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(REAL))
    assert evaluation_environment("local/door/human-v0").max_episode_steps == 200
    assert evaluation_environment("surrogate/hopper/medium-v0").describe() == {
        "env_id": "Hopper-v5",
        "kwargs": {},
        "max_episode_steps": 1000,
        "wrappers": [],
    }


def test_a_time_limit_stored_with_the_dataset_is_applied() -> None:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    spec = gym.spec("Pendulum-v1")
    import copy

    short = copy.deepcopy(spec)
    short.max_episode_steps = 3
    buffer = EpisodeBuffer(
        observations=np.zeros((2, 3), np.float32),
        actions=np.zeros((1, 1), np.float32),
        rewards=np.zeros(1),
        terminations=np.zeros(1, bool),
        truncations=np.ones(1, bool),
    )
    write_dataset("mine/pendulum-v0", [buffer], env=spec, eval_env=short)
    environment = evaluation_environment("mine/pendulum-v0")
    env = environment.make()
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[3] for _ in range(3)]
    assert ends == [False, False, True]
    assert environment.simulator == "none"


def test_an_environment_that_cannot_be_built_is_explained() -> None:
    with pytest.raises(DatasetError, match=r"NoSuchEnv-v0.*Installed: gymnasium .*mujoco"):
        EnvironmentSpec("NoSuchEnv-v0").make()
    with pytest.raises(DatasetError, match="no evaluation environment"):
        evaluation_environment("bullet-hopper-medium-v0")


def test_a_policy_that_does_not_fit_is_refused() -> None:
    from harness.datasets import load
    from harness.datasets.bandit2d import make_bandit2d

    make_bandit2d(steps=40)
    spec = load("generated/bandit2d-v0").spec
    check_fit(evaluation_environment("generated/bandit2d-v0").make(), spec)
    with pytest.raises(DatasetError, match="2 observation values"):
        check_fit(gym.make("Pendulum-v1"), spec)


def test_maze_environments_leave_no_files_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    env = pointmaze_evaluation("umaze").make()
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    env.close()
    assert not list((tmp_path / "tmp").iterdir())


def test_the_bandit_rewards_the_nearest_corner_without_noise() -> None:
    env = Bandit2D()
    check_env(env, skip_render_check=True)
    for corner, (centre, mean) in enumerate(zip(Bandit2D.CORNERS, Bandit2D.MEANS, strict=True)):
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step(centre.astype(np.float32))
        assert (reward, terminated, truncated) == (mean, True, False)
        assert info == {"corner": corner, "on_support": True}
    _, reward, _, _, info = env.step(np.array([0.1, -0.1], np.float32))
    assert (reward, info) == (5.0, {"corner": 3, "on_support": False})


def test_the_bandits_references_are_its_closed_form() -> None:
    env = Bandit2D()
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    rewards = [env.step(rng.uniform(-1, 1, 2))[1] for _ in range(20_000)]
    assert np.mean(rewards) == pytest.approx(2.375, abs=0.06)
    assert Bandit2D.MEANS.max() == 5.0
