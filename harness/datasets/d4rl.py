"""Converts D4RL's original HDF5 files; needs neither d4rl nor its simulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.datasets import local
from harness.datasets.catalog import ORIGINAL_NAMESPACE, legacy_ids, resolve
from harness.datasets.errors import DatasetError
from harness.datasets.minari import RawDataset
from harness.datasets.writing import refuse_existing, write_dataset

_REQUIRED = ("observations", "actions", "rewards", "terminals")


def import_d4rl(
    file: str | Path,
    dataset_id: str,
    env_id: str | None = None,
    max_episode_steps: int | None = None,
    clip_actions: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RawDataset:
    """Writes one D4RL file as a Minari dataset.

    Episodes are split at `terminals | timeouts`. The observation after an episode's last step
    comes from `next_observations` if the file has them. If not: a terminated episode repeats its
    last observation (nothing bootstraps from it), a truncated one loses its last transition, as
    in D4RL's `qlearning_dataset`; the dataset then says so, and `data.truncated_last_step: drop`
    does not drop a second one. Rows after the last end are a truncated episode. Actions are
    bounded by [-1, 1], as in every D4RL continuous-control set.

    Args:
        file: the HDF5 file.
        dataset_id: a Minari id, or a D4RL name (stored as `d4rl-original/<name>`).
        env_id: environment to note in the metadata; default the catalog's.
        max_episode_steps: time limit, for files without `timeouts`; default the catalog's.
        clip_actions: clip actions beyond the bounds instead of refusing them.
        overwrite: replace an existing dataset.
        progress: called with the number of rows converted since its last call.
    Raises:
        DatasetError: if the file is missing, damaged, or not in D4RL's layout.
    """
    if dataset_id in legacy_ids():
        dataset_id = f"{ORIGINAL_NAMESPACE}/{dataset_id}"
    local.check_id(dataset_id)
    refuse_existing(dataset_id, overwrite)
    path = Path(file)
    columns, infos, notes = _read(path)
    known = dataset_id.removeprefix(f"{ORIGINAL_NAMESPACE}/") in legacy_ids()
    entry = resolve(dataset_id) if known else None
    if entry is not None:
        env_id = env_id or entry.env_id or None
        max_episode_steps = max_episode_steps or entry.max_episode_steps
    if clip_actions:
        clipped = int((np.abs(columns["actions"]) > 1.0).sum())
        columns["actions"] = np.clip(columns["actions"], -1.0, 1.0)
        notes["clipped_actions"] = clipped
    episodes, counts = _split(columns, infos, max_episode_steps, path, progress)
    if not episodes:
        raise DatasetError(
            f"{path}: no transition is left: without next_observations the last one of a truncated "
            "episode is dropped, and every episode has one step. Get a file with next_observations"
        )
    return _write(dataset_id, episodes, columns, counts | notes, env_id, path, overwrite)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    import h5py

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DatasetError(f"{path} {what}; expected a D4RL HDF5 file. Check the path")
    try:
        with h5py.File(path, "r") as handle:
            missing = [key for key in _REQUIRED if key not in handle]
            if missing:
                raise DatasetError(
                    f"{path} lacks {', '.join(missing)} (it has {', '.join(sorted(handle))}); "
                    "expected D4RL's flat arrays observations, actions, rewards, terminals. "
                    "Minari files need no import: put them below MINARI_DATASETS_PATH"
                )
            columns = {key: handle[key][()] for key in _REQUIRED}
            for key in ("timeouts", "next_observations"):
                if key in handle:
                    columns[key] = handle[key][()]
            rows = len(columns["rewards"])
            infos, left_out = {}, []
            for key, item in handle["infos"].items() if "infos" in handle else ():
                is_array = isinstance(item, h5py.Dataset) and item.shape[:1] == (rows,)
                if is_array and item.dtype.kind in "fiub":
                    infos[key] = item[()]
                else:
                    left_out.append(key)
            algorithm = handle.get("metadata/algorithm")
            notes: dict[str, Any] = {"infos_left_out": left_out}
            if isinstance(algorithm, h5py.Dataset) and algorithm.shape == ():
                value = algorithm[()]
                notes["algorithm"] = value.decode() if isinstance(value, bytes) else str(value)
    except DatasetError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError and RuntimeError for damage
        raise DatasetError(
            f"{path} cannot be read as HDF5 ({type(error).__name__}: {str(error)[:200]}); the file "
            "is damaged or incomplete. Get it again"
        ) from error
    return _shaped(columns, path), infos, notes


def _shaped(columns: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    rows = len(columns["rewards"])
    if rows == 0:
        raise DatasetError(f"{path}: rewards has no rows; the file is empty. Get it again")
    for key in ("rewards", "terminals", "timeouts"):
        if key in columns:
            columns[key] = columns[key].reshape(len(columns[key]), -1)
            if columns[key].shape[1] != 1:
                raise DatasetError(
                    f"{path}: {key} has {columns[key].shape[1]} columns; expected one"
                )
            columns[key] = columns[key][:, 0]
    for key, array in columns.items():
        if len(array) != rows:
            raise DatasetError(
                f"{path}: {key} has {len(array)} rows, rewards {rows}; expected as many. The file "
                "is damaged; get it again"
            )
    for key in ("observations", "actions", "next_observations"):
        if key in columns and (columns[key].ndim != 2 or columns[key].dtype.kind != "f"):
            raise DatasetError(
                f"{path}: {key} has shape {columns[key].shape} and type {columns[key].dtype}; "
                "expected floats [N, dim]"
            )
    obs, next_obs = columns["observations"], columns.get("next_observations")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise DatasetError(
            f"{path}: next_observations has {next_obs.shape[1]} columns, observations "
            f"{obs.shape[1]}; expected as many. The file is damaged; get it again"
        )
    columns["terminals"] = columns["terminals"].astype(bool)
    if "timeouts" in columns:
        columns["timeouts"] = columns["timeouts"].astype(bool)
    return columns


def _split(
    columns: dict[str, np.ndarray],
    infos: dict[str, np.ndarray],
    max_episode_steps: int | None,
    path: Path,
    progress: Callable[[int], None] | None,
) -> tuple[list[Any], dict[str, Any]]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    terminals = columns["terminals"]
    timeouts = columns.get("timeouts")
    rows = len(terminals)
    if timeouts is None:
        timeouts = _timeouts(terminals, max_episode_steps)
    next_obs = columns.get("next_observations")
    if next_obs is not None:
        _check_continuous(columns["observations"], next_obs, terminals | timeouts, path)
    ends = np.flatnonzero(terminals | timeouts)
    if not len(ends) or ends[-1] != rows - 1:
        ends = np.append(ends, rows - 1)  # rows after the last end
    episodes, dropped, repeated, begin = [], 0, 0, 0
    for end in ends:
        stop = int(end) + 1  # steps begin .. stop - 1
        terminated = bool(terminals[end])
        truncated = bool(timeouts[end]) or not terminated
        if next_obs is not None:
            obs = np.concatenate((columns["observations"][begin:stop], next_obs[end : end + 1]))
        elif terminated and not truncated:
            obs = columns["observations"][np.append(np.arange(begin, stop), end)]
            repeated += 1
        else:
            stop -= 1  # D4RL's rule: without its successor the last transition is of no use
            terminated, truncated = False, True
            obs = columns["observations"][begin : stop + 1]
            dropped += 1
        steps = stop - begin
        if steps:
            flags = np.zeros((2, steps), bool)
            flags[:, -1] = terminated, truncated
            info_rows = np.minimum(np.arange(begin, stop + 1), end)
            episodes.append(
                EpisodeBuffer(
                    observations=obs,
                    actions=columns["actions"][begin:stop],
                    rewards=columns["rewards"][begin:stop],
                    terminations=flags[0],
                    truncations=flags[1],
                    infos={key: value[info_rows] for key, value in infos.items()} or None,
                )
            )
        if progress is not None:
            progress(int(end) + 1 - begin)
        begin = int(end) + 1
    counts = {
        "rows": rows,
        "dropped_last_transitions": dropped,
        "repeated_last_observations": repeated,
        "has_next_observations": next_obs is not None,
    }
    return episodes, counts


def _timeouts(terminals: np.ndarray, max_episode_steps: int | None) -> np.ndarray:
    """Ends by step count, for files that do not mark them."""
    timeouts = np.zeros(len(terminals), bool)
    if not max_episode_steps:
        return timeouts
    age = 0
    for row, terminal in enumerate(terminals.tolist()):
        age += 1
        timeouts[row] = age == max_episode_steps
        if terminal or age == max_episode_steps:
            age = 0
    return timeouts


def _check_continuous(obs: np.ndarray, next_obs: np.ndarray, ends: np.ndarray, path: Path) -> None:
    """Minari stores one observation per moment, so successors must agree inside episodes."""
    if len(obs) < 2:
        return
    gap = np.abs(next_obs[:-1] - obs[1:]).max(axis=1)
    gap[ends[:-1]] = 0.0
    row = int(np.argmax(gap))
    if gap[row] > 1e-3:
        raise DatasetError(
            f"{path}: next_observations at row {row} differs from observations at row {row + 1} "
            f"by {gap[row]:.3g} inside an episode; expected them to agree. Rows are missing or "
            "shuffled, or an episode's end is not marked; get the file again"
        )


def _write(
    dataset_id: str,
    episodes: list[Any],
    columns: dict[str, np.ndarray],
    counts: dict[str, Any],
    env_id: str | None,
    path: Path,
    overwrite: bool,
) -> RawDataset:
    import gymnasium as gym

    obs, action = columns["observations"], columns["actions"]
    arguments: dict[str, Any] = {}
    if env_id:
        from harness.environments import registered_spec

        arguments["env"] = registered_spec(env_id)
    dropped = counts["dropped_last_transitions"]
    description = f"D4RL's {path.name}, converted ({counts['rows']} rows)."
    if dropped:
        description += (
            f" The file has no next_observations: the last transition of {dropped} truncated "
            "episodes is left out."
        )
    defects = [
        name
        for name, present in (
            ("dropped_last_transitions", dropped),
            ("repeated_last_observations", counts["repeated_last_observations"]),
        )
        if present
    ]
    return write_dataset(
        dataset_id,
        episodes,
        overwrite=overwrite,
        extra_metadata={
            "harness_last_step_dropped": bool(dropped),
            "harness_import": counts,
            "harness_defects": defects,
        },
        observation_space=gym.spaces.Box(-np.inf, np.inf, obs.shape[1:], obs.dtype.type),
        action_space=gym.spaces.Box(-1.0, 1.0, action.shape[1:], action.dtype.type),
        algorithm_name=str(counts.get("algorithm", "as D4RL says")),
        description=description,
        **arguments,
    )
