"""The environment a dataset's policies are evaluated in.

Usually it is the one stored with the dataset. Where that is not an evaluation protocol it is
built explicitly: PointMaze sets store an endless task with moving goals, AntMaze sets let the
reward accumulate at the goal, Kitchen sets count a finished subtask at every step.
Observations come out flat, in the order `harness.datasets.layout` gives the dataset's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from harness.datasets import local
from harness.datasets.catalog import ROUTES_ID, DatasetEntry, resolve
from harness.datasets.errors import DatasetError
from harness.datasets.layout import flatten_one, leaves_of
from harness.routes import HORIZON, MAZE_MAP

if TYPE_CHECKING:
    from algorithms.api import DatasetSpec

BANDIT_ID = "offline_rl_harness/Bandit2D-v0"
RING_ID = "offline_rl_harness/Ring2D-v0"
NAVIGATION_ID = "offline_rl_harness/Navigation1D-v0"

# The cell that holds the one fixed goal, as in maze2d.
_GOAL_CELL = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}
_HORIZON = {"open": 300, "umaze": 300, "medium": 600, "large": 800}
_MAZE_NAME = {"open": "Open", "umaze": "UMaze", "medium": "Medium", "large": "Large"}

_POINTMAZE = re.compile(r"(?:D4RL|generated)/pointmaze/(open|umaze|medium|large)(-dense)?-v\d+")
_ANTMAZE = re.compile(
    r"D4RL/antmaze/(umaze|umaze-diverse|medium-play|medium-diverse|large-play|large-diverse)-v\d+"
)
_KITCHEN = re.compile(r"D4RL/kitchen/(complete|partial|mixed)-v\d+")

_KITCHEN_TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
_KITCHEN_HORIZON = 280  # D4RL's, for all three sets


@dataclass(frozen=True)
class EnvironmentSpec:
    """How to build one evaluation environment.

    Attributes:
        env_id: a registered Gymnasium id.
        kwargs: arguments of the environment, JSON-able.
        max_episode_steps: time limit; None leaves the environment its own.
        wrappers: Gymnasium's description of wrappers stored with the dataset, JSON-able.
        protocol: why it is this environment, in a few words.
    """

    env_id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    wrappers: tuple[Mapping[str, Any], ...] = ()
    protocol: str = ""

    def describe(self) -> dict[str, Any]:
        """What decides the returns, JSON-able: part of a trial's identity."""
        return {
            "env_id": self.env_id,
            "kwargs": copy.deepcopy(dict(self.kwargs)),
            "max_episode_steps": self.max_episode_steps,
            "wrappers": [dict(wrapper) for wrapper in self.wrappers],
        }

    @property
    def simulator(self) -> str:
        """For example "mujoco 3.11.0"; "none" if the environment has no physics engine."""
        _register()
        entry = gym.registry.get(self.env_id)
        where = str(entry.entry_point) if entry is not None else self.env_id.lower()
        if any(word in where for word in ("mujoco", "gymnasium_robotics", "metaworld", "dm_con")):
            return f"mujoco {_version('mujoco')}"
        return "none"

    def make(self) -> gym.Env:
        """The environment with flat float32 observations and its time limit.

        Raises:
            DatasetError: if it cannot be built; names the packages and versions involved.
        """
        _register()
        arguments: dict[str, Any] = copy.deepcopy(dict(self.kwargs))
        if self.max_episode_steps is not None:
            arguments["max_episode_steps"] = self.max_episode_steps
        try:
            with warnings.catch_warnings():
                # The version is chosen to match the data; that a newer one exists is known.
                warnings.filterwarnings("ignore", message=".*is out of date.*")
                if self.wrappers:
                    env = gym.make(self._stored_spec(), disable_env_checker=True)
                else:
                    env = gym.make(self.env_id, disable_env_checker=True, **arguments)
        except Exception as error:  # whatever the environment's constructor raises
            raise DatasetError(
                f"environment {self.env_id!r} cannot be built with {arguments} "
                f"({type(error).__name__}: {str(error)[:200]}). Installed: {_installed()}. "
                "Install the package that registers it, or the versions the dataset's "
                "requirements name (`harness data card`)"
            ) from error
        _remove_maze_file(env)
        return FlatObservation(env)

    def _stored_spec(self) -> Any:
        from gymnasium.envs.registration import EnvSpec, WrapperSpec

        registered = gym.spec(self.env_id)
        return EnvSpec(
            id=self.env_id,
            entry_point=registered.entry_point,
            max_episode_steps=self.max_episode_steps,
            kwargs=copy.deepcopy(dict(self.kwargs)),
            additional_wrappers=tuple(WrapperSpec(**wrapper) for wrapper in self.wrappers),
        )


class FlatObservation(gym.ObservationWrapper):
    """Observations as one float32 vector, in the order datasets are flattened in."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.leaves = leaves_of(env.observation_space, f"environment {env.spec and env.spec.id}")
        size = sum(leaf.size for leaf in self.leaves)
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        return flatten_one(observation, self.leaves)


def evaluation_environment(dataset_id: str) -> EnvironmentSpec:
    """What policies trained on a dataset are evaluated in.

    Args:
        dataset_id: a Minari id or a D4RL name; the data need not be stored if the catalog knows
            the environment.
    Raises:
        DatasetError: if the environment is not known or would not reproduce the dataset's.
    """
    entry = resolve(dataset_id)
    explicit = _explicit(entry)
    if explicit is not None:
        return explicit
    stored = local.metadata(entry.id) if entry.is_stored else {}
    for key in ("eval_env_spec", "env_spec"):
        if stored.get(key):
            return _from_stored(stored[key], entry.id, key)
    if entry.env_id and not stored:
        limit = entry.published.get("max_episode_steps") or entry.max_episode_steps
        return EnvironmentSpec(
            entry.env_id,
            max_episode_steps=int(limit) if limit else None,
            protocol="the environment the catalog names; the dataset is not stored",
        )
    raise DatasetError(
        f"dataset {entry.id!r} has no evaluation environment: its metadata name none"
        + (
            ", and the D4RL simulator it was recorded in is not maintained (observations or "
            f"coordinates of today's {entry.legacy_id.partition('-')[0]} differ)"
            if entry.relation == "original"
            else ""
        )
        + ". Import or write it with an environment (`harness data import --env ID`), or choose a "
        "dataset that has one"
    )


def check_fit(env: gym.Env, dataset: DatasetSpec) -> None:
    """Checks that a policy trained on the dataset can act in the environment.

    Raises:
        DatasetError: naming what differs.
    """
    obs_dim = env.observation_space.shape
    if obs_dim != (dataset.obs_dim,):
        raise DatasetError(
            f"dataset {dataset.id!r} has {dataset.obs_dim} observation values, environment "
            f"{env.spec and env.spec.id} {obs_dim}; expected as many. Import or write the dataset "
            "with the environment it comes from"
        )
    space = env.action_space
    if not isinstance(space, spaces.Box) or int(np.prod(space.shape)) != dataset.action_dim:
        raise DatasetError(
            f"dataset {dataset.id!r} has {dataset.action_dim} action values, environment "
            f"{env.spec and env.spec.id} {space}; expected as many"
        )


def registered_spec(env_id: str) -> Any:
    """Gymnasium's own spec of an environment.

    Raises:
        DatasetError: if no installed package registers it.
    """
    _register()
    try:
        return gym.spec(env_id)
    except gym.error.Error as error:
        raise DatasetError(
            f"environment {env_id!r} is not registered ({error}). Installed: {_installed()}. "
            "Check the name or install the package that registers it"
        ) from error


def pointmaze_evaluation(maze: str, dense: bool = False) -> EnvironmentSpec:
    """Fixed goal, random start, no end at the goal: maze2d's protocol in PointMaze.

    Args:
        maze: open, umaze, medium or large.
    """
    row, column = _GOAL_CELL[maze]
    maze_map = pointmaze_map(maze)
    maze_map[row][column] = "g"
    return EnvironmentSpec(
        f"PointMaze_{_MAZE_NAME[maze]}{'Dense' if dense else ''}-v3",
        {
            "maze_map": maze_map,
            "reward_type": "dense" if dense else "sparse",
            "continuing_task": True,
            "reset_target": False,
        },
        _HORIZON[maze],
        protocol="fixed goal, random start, reward while at the goal, never terminates",
    )


def routes_evaluation() -> EnvironmentSpec:
    """One start, one goal, four routes, an end at the goal; `info` says which route it was."""
    return EnvironmentSpec(
        "PointMaze_UMaze-v3",
        {
            "maze_map": copy.deepcopy(MAZE_MAP),
            "reward_type": "sparse",
            "continuing_task": False,
            "reset_target": False,
        },
        HORIZON,
        ({"name": "RouteMode", "entry_point": "harness.routes:RouteMode", "kwargs": {}},),
        protocol="fixed start and goal, an episode ends at the goal, so its return is 0 or 1",
    )


def pointmaze_map(maze: str) -> list[list[int | str]]:
    """Gymnasium-Robotics' maze: 1 wall, 0 free."""
    _register()
    from gymnasium_robotics.envs.maze import maps

    table = {
        "open": maps.OPEN,
        "umaze": maps.U_MAZE,
        "medium": maps.MEDIUM_MAZE,
        "large": maps.LARGE_MAZE,
    }
    return copy.deepcopy(table[maze])


def _explicit(entry: DatasetEntry) -> EnvironmentSpec | None:
    maze = _POINTMAZE.fullmatch(entry.id)
    if maze:
        return pointmaze_evaluation(maze[1], dense=bool(maze[2]))
    ant = _ANTMAZE.fullmatch(entry.id)
    if ant:
        return _antmaze_evaluation(ant[1])
    kitchen = _KITCHEN.fullmatch(entry.id)
    if kitchen:
        return EnvironmentSpec(
            "FrankaKitchen-v1",
            {
                "tasks_to_complete": list(_KITCHEN_TASKS[kitchen[1]]),
                "remove_task_when_completed": True,
                "terminate_on_tasks_completed": True,
            },
            _KITCHEN_HORIZON,
            protocol="each subtask counts once (return 0 to 4), D4RL's horizon",
        )
    if entry.id == ROUTES_ID:
        return routes_evaluation()
    if entry.id == "generated/bandit2d-v0":
        return EnvironmentSpec(BANDIT_ID, protocol="one step, noise-free reward")
    if entry.id == "generated/ring2d-v0":
        return EnvironmentSpec(RING_ID, protocol="one step, 1 near a mode and 0 elsewhere")
    if entry.relation in ("original", "regenerated") and entry.max_episode_steps:
        # D4RL's constants are returns over D4RL's horizon: 100 steps for pen, not today's 200.
        kwargs = {"reward_type": "dense"} if entry.env_id.startswith("Adroit") else {}
        return EnvironmentSpec(
            entry.env_id, kwargs, entry.max_episode_steps, protocol="D4RL's horizon"
        )
    return None


def _antmaze_evaluation(name: str) -> EnvironmentSpec:
    _register()
    from gymnasium_robotics.envs.maze import maps

    size, _, kind = name.partition("-")
    maze_map = copy.deepcopy(
        {
            "umaze": maps.U_MAZE,
            "medium": maps.MEDIUM_MAZE_DIVERSE_GR if kind == "diverse" else maps.MEDIUM_MAZE,
            "large": maps.LARGE_MAZE_DIVERSE_GR if kind == "diverse" else maps.LARGE_MAZE,
        }[size]
    )
    if name == "umaze":  # one start, one goal, as in Farama's set
        maze_map[1][1], maze_map[3][1] = "g", "r"
    suffix = "_Diverse_GR" if kind == "diverse" and size != "umaze" else ""
    return EnvironmentSpec(
        f"AntMaze_{_MAZE_NAME[size]}{suffix}-v4",
        {
            "maze_map": maze_map,
            "reward_type": "sparse",
            "continuing_task": False,
            "reset_target": False,
        },
        700 if size == "umaze" else 1000,
        protocol="an episode ends at the goal (radius 0.45), so its return is 0 or 1",
    )


def _from_stored(text: str, dataset_id: str, key: str) -> EnvironmentSpec:
    try:
        stored = json.loads(text)
        wrappers = tuple(stored.get("additional_wrappers") or ())
        limit = stored.get("max_episode_steps")
        return EnvironmentSpec(
            str(stored["id"]),
            dict(stored.get("kwargs") or {}),
            int(limit) if limit and int(limit) > 0 else None,
            wrappers,
            protocol=f"{key} stored with the dataset",
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"dataset {dataset_id!r}: {key} in metadata.json is {text!r:.120}, which is not an "
            f"environment spec ({error!r:.80}); download or make the dataset again"
        ) from error


def _register() -> None:
    """Makes Gymnasium-Robotics' environments known; importing it twice is harmless."""
    try:
        # It prints a notice about the reward of three Adroit environments at every import; the
        # cards of the datasets concerned say it where it matters.
        with contextlib.redirect_stderr(io.StringIO()):
            import gymnasium_robotics
    except ImportError:
        return  # `make` names what is missing, if it is needed
    gym.register_envs(gymnasium_robotics)


def _remove_maze_file(env: gym.Env) -> None:
    """Maze environments leave their model in the temporary folder, one file per environment."""
    from pathlib import Path

    path = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if path:
        Path(path).unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _installed() -> str:
    return ", ".join(f"{p} {_version(p)}" for p in ("gymnasium", "gymnasium-robotics", "mujoco"))


class Bandit2D(gym.Env):
    """The 2-D bandit of Diffusion-QL (Fig. 1): one step, four corners, one state.

    The reward is the mean of the corner nearest to the action, without the noise of the data;
    `info` has the corner's index and whether the action lies within 0.15 (3 standard deviations
    of the data) of it, since the reward alone says nothing about staying on the data.
    """

    CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
    MEANS = np.array([3.0, 0.0, 1.5, 5.0])
    SUPPORT_RADIUS = 0.15

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's interface)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        distance = np.linalg.norm(self.CORNERS - clipped, axis=1)
        corner = int(distance.argmin())
        info = {"corner": corner, "on_support": bool(distance[corner] <= self.SUPPORT_RADIUS)}
        return np.zeros(2, np.float32), float(self.MEANS[corner]), True, False, info


class Ring2D(gym.Env):
    """VDD's 2-D toy: one step, eight modes at radius 2, one state.

    The reward is 1 within two standard deviations of the nearest mode and 0 elsewhere.
    """

    STD = 0.5
    BOUND = 4.0
    SUPPORT_RADIUS = 2 * STD
    ANGLES = np.arange(8) * np.pi / 4
    CENTRES = 2.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's interface)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Box(-self.BOUND, self.BOUND, (2,), np.float32)

    @classmethod
    def distance(cls, action: np.ndarray) -> np.ndarray:
        """Of actions [..., 2] from the nearest mode."""
        return np.linalg.norm(np.asarray(action)[..., None, :] - cls.CENTRES, axis=-1).min(axis=-1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        near = self.distance(np.clip(action, -self.BOUND, self.BOUND)) <= self.SUPPORT_RADIUS
        return np.zeros(2, np.float32), float(near), True, False, {}


if RING_ID not in gym.registry:
    gym.register(id=RING_ID, entry_point="harness.environments:Ring2D", max_episode_steps=1)


class Navigation1D(gym.Env):
    """DOSER's 1-D navigation (Sec. 4.1): steps of at most 1 on [-10, 10]; reward -|position|."""

    REACH = 10.0
    # Sum of rewards over 20 steps from a uniform start: standing still, and going straight to 0.
    ANCHORS = (-100.0, -14.25)

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's interface)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-self.REACH, self.REACH, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    @classmethod
    def moved(cls, position: Any, action: Any) -> Any:
        """Where an action leads."""
        return np.clip(position + np.clip(action, -1.0, 1.0), -cls.REACH, cls.REACH)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-self.REACH, self.REACH)
        return np.array([self.position], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = float(self.moved(self.position, np.asarray(action, np.float64).item()))
        return np.array([self.position], np.float32), -abs(self.position), False, False, {}


if NAVIGATION_ID not in gym.registry:
    gym.register(
        id=NAVIGATION_ID,
        entry_point="harness.environments:Navigation1D",
        max_episode_steps=20,
    )
if BANDIT_ID not in gym.registry:
    gym.register(id=BANDIT_ID, entry_point="harness.environments:Bandit2D", max_episode_steps=1)
