"""Demonstrations of four routes through one maze, all equally often."""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from harness.datasets.catalog import ROUTES_ID
from harness.datasets.errors import DatasetError
from harness.datasets.minari import RawDataset
from harness.datasets.pointmaze import (
    ACTION_NOISE,
    EpisodeRecord,
    WaypointController,
    shortest_path,
    stored_spec,
)
from harness.datasets.writing import refuse_existing, write_dataset
from harness.routes import HORIZON, MAZE_MAP, NUM_ROUTES

SOURCE = "closed form: never at the goal, and always"
START, CHANGE, GOAL = (2, 1), (2, 4), (2, 7)  # cells
ROW = (3, 1)  # of a block that is passed below, above
BLOCK_COLUMNS = ((2, 3), (5, 6))


def route_cells(mode: int) -> list[tuple[int, int]]:
    """The cells of a route, from start to goal: bit i of `mode` says block i is passed above."""
    rows = [ROW[mode >> index & 1] for index in range(len(BLOCK_COLUMNS))]
    stops = [(row, column) for row, columns in zip(rows, BLOCK_COLUMNS, strict=True)
             for column in columns]  # fmt: skip
    cells = [START]
    for stop in [*stops, GOAL]:
        cells += shortest_path(MAZE_MAP, cells[-1], stop)[1:]
    return cells


class RouteController(WaypointController):
    """Follows the cells of one route."""

    def __init__(self, maze: Any, rng: np.random.Generator, mode: int, noise: float) -> None:
        super().__init__(maze, rng, noise)
        self.mode = mode

    def _plan(self, position: np.ndarray, goal: np.ndarray) -> deque[np.ndarray]:
        return self.waypoints(route_cells(self.mode), goal)


def make_routes(
    seed: int = 0,
    episodes: int = 500,
    noise: float = ACTION_NOISE,
    dataset_id: str = ROUTES_ID,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RawDataset:
    """Rolls out `episodes` demonstrations, a quarter along each route, and writes them.

    The reward is 1 at the goal, where an episode terminates. Score 100 is: always at the goal.

    Args:
        noise: standard deviation of the actions' noise.
        progress: called with the number of episodes done since its last call.
    Raises:
        ValueError: if `episodes` is not a positive multiple of 4.
        DatasetError: if the id is taken, Gymnasium-Robotics is missing, or the controller does not
            reach the goal in time.
    """
    if episodes < NUM_ROUTES or episodes % NUM_ROUTES:
        raise ValueError(
            f"episodes is {episodes}; expected a positive multiple of {NUM_ROUTES} (the routes)"
        )
    refuse_existing(dataset_id, overwrite)
    from minari.data_collector.episode_buffer import EpisodeBuffer

    from harness.environments import routes_evaluation

    evaluation = routes_evaluation()
    rng = np.random.default_rng(seed)
    flat: Any = evaluation.make()
    env = flat.env  # whose observations are as they are stored
    maze = env.unwrapped
    buffers = []
    try:
        for index in range(episodes):
            mode = index % NUM_ROUTES
            controller = RouteController(maze.maze, rng, mode, noise)
            obs, info = env.reset(seed=int(rng.integers(2**31)))
            record = EpisodeRecord(obs, maze, bool(info["success"]))
            for _ in range(HORIZON):
                action = controller.act(obs)
                obs, reward, terminated, _, info = env.step(action)
                record.add(obs, action, float(reward), maze, bool(info["success"]))
                if terminated:
                    break
            if info.get("mode") != mode:
                raise DatasetError(
                    f"episode {index} was to take route {mode} and took {info.get('mode')} (None: "
                    f"not at the goal after {HORIZON} steps); choose less noise or another seed"
                )
            buffers.append(record.buffer(EpisodeBuffer, terminated=True))
            if progress is not None:
                progress(1)
        spaces = env.observation_space, env.action_space
        env_spec = stored_spec(evaluation)
    finally:
        env.close()
    versions = {p: importlib.metadata.version(p) for p in ("gymnasium-robotics", "mujoco")}
    return write_dataset(
        dataset_id,
        buffers,
        overwrite=overwrite,
        extra_metadata={"harness_ref_source": SOURCE, "harness_seed": seed},
        env=env_spec,
        eval_env=env_spec,
        observation_space=spaces[0],
        action_space=spaces[1],
        algorithm_name=f"waypoint controller along four routes, action noise {noise}",
        description=(
            "PointMaze with one start, one goal and four routes around two blocks; "
            f"{episodes} episodes, a quarter along each route, by the waypoint controller of the "
            f"other mazes (noise {noise}), seed {seed}."
        ),
        ref_min_score=0.0,
        ref_max_score=1.0,
        requirements=[f"{package}=={version}" for package, version in versions.items()],
    )
