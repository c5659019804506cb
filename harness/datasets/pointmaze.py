"""PointMaze data from a waypoint controller, by D4RL's and Farama's scheme.

One long rollout of a continuing task: reach the goal, get a new one, cut the episode there. The
controller plans over cells from what it observes; the action is a proportional-derivative law
plus Gaussian noise.
"""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from harness.datasets.catalog import POINTMAZE_ANCHORS, POINTMAZE_SOURCE
from harness.datasets.errors import DatasetError
from harness.datasets.minari import RawDataset
from harness.datasets.writing import refuse_existing, write_dataset

GAIN_POSITION = 10.0
GAIN_VELOCITY = -1.0
ACTION_NOISE = 0.5
WAYPOINT_JITTER = 0.2
WAYPOINT_RADIUS = 0.1


class WaypointController:
    """Follows the shortest cell path to the goal it is shown.

    Args:
        maze: `env.unwrapped.maze`.
        rng: for the waypoints' jitter and the action noise.
        noise: standard deviation added to actions before clipping; 0 for the expert.
    """

    def __init__(self, maze: Any, rng: np.random.Generator, noise: float = ACTION_NOISE) -> None:
        self.maze = maze
        self.rng = rng
        self.noise = noise
        self._goal: np.ndarray | None = None
        self._waypoints: deque[np.ndarray] = deque()

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Float32 action [2] for a PointMaze observation."""
        position, velocity = obs["observation"][:2], obs["observation"][2:]
        goal = obs["desired_goal"]
        if self._goal is None or not np.array_equal(goal, self._goal):
            self._goal = goal.copy()
            self._waypoints = self._plan(position, goal)
        while (
            len(self._waypoints) > 1
            and np.linalg.norm(self._waypoints[0] - position) < WAYPOINT_RADIUS
        ):
            self._waypoints.popleft()
        action = GAIN_POSITION * (self._waypoints[0] - position) + GAIN_VELOCITY * velocity
        if self.noise:
            action = action + self.noise * self.rng.standard_normal(2)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _plan(self, position: np.ndarray, goal: np.ndarray) -> deque[np.ndarray]:
        (row, column), (goal_row, goal_column) = (
            self.maze.cell_xy_to_rowcol(place).tolist() for place in (position, goal)
        )
        cells = shortest_path(self.maze.maze_map, (row, column), (goal_row, goal_column))
        return self.waypoints(cells, goal)

    def waypoints(self, cells: list[tuple[int, int]], goal: np.ndarray) -> deque[np.ndarray]:
        """The middles of the cells between the first and the last, jittered, then the goal."""
        centres = [self.maze.cell_rowcol_to_xy(np.array(cell)) for cell in cells[1:-1]]
        points = [c - self.rng.uniform(0.0, WAYPOINT_JITTER, 2) for c in centres]
        return deque([*points, goal.copy()])


def shortest_path(
    maze_map: list[list[Any]], start: tuple[int, int], target: tuple[int, int]
) -> list[tuple[int, int]]:
    """Cells from start to target, both included; 4 neighbours, breadth first.

    Raises:
        ValueError: if the target cannot be reached.
    """
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        if cell == target:
            path = [cell]
            while (before := came_from[path[-1]]) is not None:
                path.append(before)
            return path[::-1]
        row, column = cell
        for following in (
            (row - 1, column),
            (row + 1, column),
            (row, column - 1),
            (row, column + 1),
        ):
            inside = 0 <= following[0] < len(maze_map) and 0 <= following[1] < len(maze_map[0])
            if inside and maze_map[following[0]][following[1]] != 1 and following not in came_from:
                came_from[following] = cell
                queue.append(following)
    raise ValueError(f"no path from cell {start} to {target}")


def dataset_id_of(level: str) -> str:
    return f"generated/pointmaze/{level}-v0"


def make_pointmaze(
    maze: str = "umaze",
    steps: int = 100_000,
    seed: int = 0,
    dense: bool = False,
    noise: float = ACTION_NOISE,
    dataset_id: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RawDataset:
    """Rolls out the controller for `steps` steps and writes the dataset.

    The same arguments and simulator give the same content. The last episode is cut at `steps`.

    Args:
        maze: open, umaze, medium or large.
        dense: dense reward, exp(-distance).
        noise: of the actions; D4RL's is 0.5.
        dataset_id: default `generated/pointmaze/<maze>[-dense]-v0`.
        progress: called with the number of steps done since its last call.
    Raises:
        ValueError: for an unknown maze or steps < 1.
        DatasetError: if the id is taken or Gymnasium-Robotics is missing.
    """
    level = f"{maze}-dense" if dense else maze
    if level not in POINTMAZE_ANCHORS:
        raise ValueError(f"maze is {maze!r}; expected open, umaze, medium or large")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    dataset_id = dataset_id or dataset_id_of(level)
    refuse_existing(dataset_id, overwrite)  # before minutes of simulation

    from harness.environments import EnvironmentSpec, pointmaze_evaluation, pointmaze_map

    evaluation = pointmaze_evaluation(maze, dense)
    spec = EnvironmentSpec(
        evaluation.env_id,
        {
            "maze_map": pointmaze_map(maze),
            "reward_type": "dense" if dense else "sparse",
            "continuing_task": True,
            "reset_target": True,
        },
        1_000_000,
    )
    env = spec.make()
    try:
        episodes = _rollout(env.unwrapped, steps, seed, noise, progress)
        env_spec = stored_spec(spec)
    finally:
        env.close()
    low, high = POINTMAZE_ANCHORS[level]
    versions = {p: importlib.metadata.version(p) for p in ("gymnasium-robotics", "mujoco")}
    eval_spec = stored_spec(evaluation)
    return write_dataset(
        dataset_id,
        episodes,
        overwrite=overwrite,
        extra_metadata={
            "harness_ref_source": POINTMAZE_SOURCE,
            "harness_seed": seed,
            "harness_defects": ["stale_goal"],
        },
        env=env_spec,
        eval_env=eval_spec,
        observation_space=env.unwrapped.observation_space,
        action_space=env.unwrapped.action_space,
        algorithm_name=f"waypoint controller, action noise {noise}",
        description=(
            f"PointMaze {level}: waypoint controller (gains {GAIN_POSITION}, {GAIN_VELOCITY}, "
            f"noise {noise}), one continuing rollout of {steps} steps from seed {seed}, cut at "
            "every success. Every episode but the first begins with the previous goal in its "
            "first observation."
        ),
        ref_min_score=low,
        ref_max_score=high,
        num_episodes_average_score=40,
        requirements=[f"{package}=={version}" for package, version in versions.items()],
    )


def stored_spec(spec: Any) -> Any:
    """Gymnasium's spec with arguments and wrappers in it, so that Minari can store it."""
    import copy

    import gymnasium as gym
    from gymnasium.envs.registration import WrapperSpec

    registered = copy.deepcopy(gym.spec(spec.env_id))
    registered.kwargs = copy.deepcopy(dict(spec.kwargs))
    registered.max_episode_steps = spec.max_episode_steps
    registered.additional_wrappers = tuple(WrapperSpec(**wrapper) for wrapper in spec.wrappers)
    return registered


def _rollout(
    env: Any, steps: int, seed: int, noise: float, progress: Callable[[int], None] | None
) -> list[Any]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    controller = WaypointController(env.maze, np.random.default_rng(seed), noise)
    obs, info = env.reset(seed=seed)
    episodes: list[Any] = []
    record = EpisodeRecord(obs, env, bool(info["success"]))
    reported = 0
    for step in range(1, steps + 1):
        action = controller.act(obs)
        obs, reward, _, _, info = env.step(action)
        success = bool(info["success"])
        record.add(obs, action, float(reward), env, success)
        if success or step == steps:
            episodes.append(record.buffer(EpisodeBuffer))
            # No reset: as in D4RL the next episode starts where this one ended, and its first
            # observation still shows the old goal (the environment moves it after observing).
            record = EpisodeRecord(obs, env, False)
        if progress is not None and (step % 1000 == 0 or step == steps):
            progress(step - reported)
            reported = step
    if not all(np.isfinite(e.rewards).all() for e in episodes):
        raise DatasetError("the simulation diverged: a reward is not finite; try another seed")
    return episodes


class EpisodeRecord:
    """One episode while it is recorded; observations and infos have a row more than steps."""

    def __init__(self, obs: dict[str, np.ndarray], env: Any, success: bool) -> None:
        self.observations: dict[str, list[np.ndarray]] = {key: [] for key in obs}
        self.infos: dict[str, list[Any]] = {k: [] for k in ("qpos", "qvel", "goal", "success")}
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self._observe(obs, env, success)

    def _observe(self, obs: dict[str, np.ndarray], env: Any, success: bool) -> None:
        for key, value in obs.items():
            self.observations[key].append(np.array(value))
        self.infos["qpos"].append(np.array(env.data.qpos))
        self.infos["qvel"].append(np.array(env.data.qvel))
        self.infos["goal"].append(np.array(env.goal))  # the true one, also where obs is stale
        self.infos["success"].append(success)

    def add(
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: float,
        env: Any,
        success: bool,
    ) -> None:
        self.actions.append(action)
        self.rewards.append(reward)
        self._observe(obs, env, success)

    def buffer(self, kind: Any, terminated: bool = False) -> Any:
        """Minari's `kind` of buffer; the last step is truncated, or terminated."""
        last = np.arange(len(self.rewards)) == len(self.rewards) - 1
        return kind(
            observations={key: np.stack(rows) for key, rows in self.observations.items()},
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards),
            terminations=last & terminated,
            truncations=last & (not terminated),
            infos={key: np.array(rows) for key, rows in self.infos.items()},
        )
