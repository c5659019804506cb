"""Reads, checks and hashes a stored Minari dataset.

Owns: the arrays as they are on disk, the checks that make them usable, the content digest and its
record. Does not own: what a learner sees of them (`buffers`), names (`catalog`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.datasets import local
from harness.datasets.catalog import resolve
from harness.datasets.errors import DatasetError
from harness.datasets.layout import Leaf, leaves_of, select
from harness.datasets.record import Record, file_hashes, is_writable

FLAT_FILE = "harness_flat.npz"
BOUND_TOLERANCE = 1e-4  # of the action range; float32 rounding is 1000 times smaller
_SLOW_READ_S = 0.5  # a dataset that takes longer gets a flat copy beside it
_FLAT_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class RawDataset:
    """Validated arrays in storage order, and where episodes end.

    Episode e of length T has T rows in the step arrays and T + 1 observations: row i of the step
    arrays in episode e goes from `obs[i + e]` to `obs[i + e + 1]`.

        obs      o o o o|o o o|        [S + E, O]
        actions  a a a  |a a  |        [S, A]

    Attributes:
        obs: float32 [S + E, O], flattened as `layout` says.
        action: float32 [S, A].
        reward: float64 [S].
        terminated, truncated: bool [S]; every episode's last step has at least one of them.
        lengths: int64 [E], steps of each episode.
        unflagged_ends: episodes that ended without a flag; they count as truncated.
        last_step_dropped: truncated episodes already lack their last transition (an original D4RL
            file without next observations), so it is not dropped a second time.
    """

    id: str
    digest: str
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray
    action_low: np.ndarray
    action_high: np.ndarray
    leaves: tuple[Leaf, ...]
    metadata: Mapping[str, Any]
    unflagged_ends: int = 0
    last_step_dropped: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.reward)

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Index of each episode's first step, int64 [E]."""
        return np.concatenate(([0], np.cumsum(self.lengths)[:-1]))

    @property
    def episode_of_step(self) -> np.ndarray:
        """Episode of each step, int64 [S]."""
        return np.repeat(np.arange(self.num_episodes), self.lengths)

    def returns(self, discount: float = 1.0) -> np.ndarray:
        """Return of every whole episode, float64 [E]."""
        if discount == 1.0:
            return np.add.reduceat(self.reward, self.starts)
        age = np.arange(self.num_steps) - np.repeat(self.starts, self.lengths)
        return np.add.reduceat(self.reward * np.power(discount, age), self.starts)


@dataclass(frozen=True)
class _Stored:
    """The arrays of a dataset, episodes concatenated, with the types they are stored in."""

    arrays: dict[str, np.ndarray]  # "observations/<leaf>", "actions", "rewards", ...
    lengths: np.ndarray  # int64 [E]


def load_raw(dataset_id: str) -> RawDataset:
    """Reads and checks a stored dataset; its content must be what was first recorded.

    Raises:
        DatasetError: if it is not stored, damaged, malformed, or has changed.
    """
    dataset_id = resolve(dataset_id).id
    metadata = local.metadata(dataset_id)
    return read_folder(local.folder(dataset_id), dataset_id, metadata)


def read_folder(path: Path, dataset_id: str, metadata: Mapping[str, Any]) -> RawDataset:
    """`load_raw` for a folder outside the store (a download that is being checked)."""
    obs_space, action_space = _spaces(metadata, dataset_id)
    leaves = leaves_of(obs_space, f"{dataset_id}: observation space")
    record = Record.of(path)
    stored = _read_flat(path, record)
    if stored is None:
        begin = time.monotonic()
        stored = _read_files(path, dataset_id, metadata, leaves, obs_space)
        slow = time.monotonic() - begin > _SLOW_READ_S
        digest = _content_digest(stored, metadata)
        if record is not None and record.digest != digest:
            raise _changed(dataset_id, path, record.digest, digest)
        raw = _checked(stored, dataset_id, metadata, leaves, action_space, digest)
        if record is None or not record.matches(path):
            Record.write(path, digest)
        if slow:
            _write_flat(path, stored)
        return raw
    digest = _content_digest(stored, metadata)
    assert record is not None
    if digest != record.digest:  # the copy, not the dataset, is at fault
        (path / FLAT_FILE).unlink(missing_ok=True)
        return read_folder(path, dataset_id, metadata)
    return _checked(stored, dataset_id, metadata, leaves, action_space, digest)


def digest(dataset_id: str) -> str:
    """sha256 over a stored dataset's content, the same for HDF5, Arrow and Parquet.

    Covers every observation, action, reward and flag with type, shape and episode borders, the
    spaces, the environment spec and (if present) what an import left out; not infos, and not the
    description. Recorded beside the data when first computed and reused while sizes and times of
    the files stay as they were.

    Raises:
        DatasetError: if the content is not what was recorded.
    """
    dataset_id = resolve(dataset_id).id
    metadata = local.metadata(dataset_id)
    path = local.folder(dataset_id)
    record = Record.of(path)
    if record is not None and record.matches(path):
        return record.digest
    return read_folder(path, dataset_id, metadata).digest


def verify_files(dataset_id: str) -> None:
    """The quick part of `verify`: compares the sha256 of each file, if it was ever recorded.

    Files that nobody wrote to since their last reading are not read again (`file_hashes`).

    Raises:
        DatasetError: naming the file that is missing, new or changed.
    """
    dataset_id = resolve(dataset_id).id
    path = local.folder(dataset_id)
    record = Record.of(path)
    if record is not None:
        _check_files(dataset_id, path, record)


def _check_files(dataset_id: str, path: Path, record: Record, read_all: bool = False) -> None:
    found = file_hashes(path, read_all)
    for name in sorted(found.keys() | record.files.keys()):
        if name not in found:
            raise _damaged(dataset_id, path / name, "is missing")
        if name not in record.files:
            raise _damaged(dataset_id, path / name, "was not there when it was recorded")
        if found[name] != record.files[name]["sha256"]:
            raise _damaged(dataset_id, path / name, "has changed since it was recorded")


def verify(dataset_id: str, accept: bool = False) -> None:
    """Reads everything again and compares it with what was recorded.

    Compares the sha256 of each file (so also infos and metadata) and the content digest. A dataset
    without a record gets one.

    Args:
        accept: forget the record and take the present content as right.
    Raises:
        DatasetError: naming the file or the digests, if anything differs.
    """
    local.check_id(dataset_id)
    path = local.folder(dataset_id)
    if not local.is_stored(dataset_id):
        dataset_id = resolve(dataset_id).id
        path = local.folder(dataset_id)
    if not local.is_stored(dataset_id):
        local.metadata(dataset_id)  # raises, saying how to get it
    record = Record.of(path)
    if accept:
        (path / FLAT_FILE).unlink(missing_ok=True)
        Record.forget(path)
    elif record is not None:
        _check_files(dataset_id, path, record, read_all=True)
    metadata = local.metadata(dataset_id)
    obs_space, action_space = _spaces(metadata, dataset_id)
    leaves = leaves_of(obs_space, f"{dataset_id}: observation space")
    stored = _read_files(path, dataset_id, metadata, leaves, obs_space)
    found_digest = _content_digest(stored, metadata)
    if record is not None and not accept and found_digest != record.digest:
        raise _changed(dataset_id, path, record.digest, found_digest)
    _checked(stored, dataset_id, metadata, leaves, action_space, found_digest)
    Record.write(path, found_digest)


def _damaged(dataset_id: str, path: Path, what: str) -> DatasetError:
    return DatasetError(
        f"dataset {dataset_id!r}: {path} {what}. Download, import or make it again; if the change "
        f"is yours, run `harness data verify {dataset_id} --accept`"
    )


def _changed(dataset_id: str, path: Path, recorded: str, found: str) -> DatasetError:
    return DatasetError(
        f"dataset {dataset_id!r}: content digest is {found[:16]}..., but {recorded[:16]}... was "
        f"recorded when it was first seen ({path}). Results of the two must not be mixed. "
        "Download, import or make it again; if the change is yours, run "
        f"`harness data verify {dataset_id} --accept`"
    )


# ------------------------------------------------------------------------------ spaces and digest


def _spaces(metadata: Mapping[str, Any], dataset_id: str) -> tuple[Any, Any]:
    from minari.serialization import deserialize_space

    found = []
    for key in ("observation_space", "action_space"):
        text = metadata.get(key)
        try:
            found.append(deserialize_space(text))
        except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            raise DatasetError(
                f"dataset {dataset_id!r}: {key} in metadata.json is {text!r:.80}, which Minari "
                f"cannot read ({error!r:.80}); download or make the dataset again"
            ) from error
    return found[0], found[1]


def _content_digest(stored: _Stored, metadata: Mapping[str, Any]) -> str:
    header = {
        "digest_format": 1,
        "env_spec": _parsed(metadata.get("env_spec")),
        "eval_env_spec": _parsed(metadata.get("eval_env_spec")),
        "observation_space": _parsed(metadata.get("observation_space")),
        "action_space": _parsed(metadata.get("action_space")),
        "last_step_dropped": bool(metadata.get("harness_last_step_dropped", False)),
    }
    sha = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    sha.update(np.ascontiguousarray(stored.lengths, dtype="<i8").tobytes())
    for name in sorted(stored.arrays):
        array = np.ascontiguousarray(stored.arrays[name])
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        sha.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


# --------------------------------------------------------------------------------------- reading


def _read_files(
    path: Path, dataset_id: str, metadata: Mapping[str, Any], leaves: Sequence[Leaf], space: Any
) -> _Stored:
    """All episodes of any format Minari reads."""
    total = metadata.get("total_episodes")
    if not isinstance(total, int) or total < 1:
        raise DatasetError(
            f"dataset {dataset_id!r}: total_episodes is {total!r}; expected at least one episode. "
            "The dataset is empty; download or make it again"
        )
    data = path / "data"
    names = [f"observations/{leaf.name}".rstrip("/") for leaf in leaves]
    keys = [*names, "actions", "rewards", "terminations", "truncations"]
    data_format = metadata.get("data_format", "hdf5")
    try:
        if data_format == "hdf5":
            episodes = _hdf5_episodes(data / "main_data.hdf5", keys, total)
        else:
            episodes = _minari_episodes(data, leaves, total)
        return _concatenated(episodes, keys, dataset_id, metadata)
    except DatasetError:
        raise
    except Exception as error:  # h5py, pyarrow and Minari raise whatever their parsers raise
        raise DatasetError(
            f"dataset {dataset_id!r}: {data} cannot be read as {data_format} "
            f"({type(error).__name__}: {str(error)[:200]}). The files are damaged or incomplete; "
            "download, import or make the dataset again"
        ) from error


def _hdf5_episodes(file: Path, keys: Sequence[str], total: int) -> Iterator[list[np.ndarray]]:
    """Minari's HDF5 layout without infos, through h5py's low level: 10,000 episodes in seconds."""
    import h5py

    with h5py.File(file, "r") as handle:
        found = len(handle)
        if found != total:
            raise DatasetError(
                f"{file}: holds {found} episodes, metadata.json says {total}; the file is "
                "incomplete. Download, import or make the dataset again"
            )
        for index in range(total):
            episode = []
            for key in keys:
                dataset = h5py.h5d.open(handle.id, f"episode_{index}/{key}".encode())
                array = np.empty(dataset.shape, dataset.dtype)
                dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
                episode.append(array)
            yield episode


def _minari_episodes(data: Path, leaves: Sequence[Leaf], total: int) -> Iterator[list[np.ndarray]]:
    from minari.dataset.minari_storage import MinariStorage

    for episode in MinariStorage.read(data).get_episodes(range(total)):
        yield [
            *(np.asarray(select(episode["observations"], leaf.path)) for leaf in leaves),
            *(np.asarray(episode[k]) for k in ("actions", "rewards")),
            *(np.asarray(episode[k], dtype=bool) for k in ("terminations", "truncations")),
        ]


def _concatenated(
    episodes: Iterable[list[np.ndarray]],
    keys: Sequence[str],
    dataset_id: str,
    metadata: Mapping[str, Any],
) -> _Stored:
    columns: list[list[np.ndarray]] = [[] for _ in keys]
    lengths = []
    for index, episode in enumerate(episodes):
        steps = len(episode[-3])  # rewards
        if steps < 1:
            raise DatasetError(
                f"dataset {dataset_id!r}: episode {index} has no steps; expected at least one. "
                "Remove the episode or make the dataset again"
            )
        for key, array, column in zip(keys, episode, columns, strict=True):
            expected = steps + key.startswith("observations")
            if array.shape[:1] != (expected,) or array.dtype != (column or [array])[0].dtype:
                raise DatasetError(
                    f"dataset {dataset_id!r}: episode {index}, {key} has shape {array.shape} and "
                    f"type {array.dtype}; expected {expected} rows of the type of episode 0 "
                    f"({steps} rewards). The dataset does not follow Minari's layout; make it "
                    "again"
                )
            column.append(array)
        lengths.append(steps)
    if len(lengths) != metadata["total_episodes"] or sum(lengths) != metadata.get("total_steps"):
        raise DatasetError(
            f"dataset {dataset_id!r}: read {len(lengths)} episodes and {sum(lengths)} steps, "
            f"metadata.json says {metadata['total_episodes']} and {metadata.get('total_steps')}; "
            "the data are incomplete. Download, import or make the dataset again"
        )
    arrays = {}
    for key, column in zip(keys, columns, strict=True):
        tails = {array.shape[1:] for array in column}
        if len(tails) > 1:
            raise DatasetError(
                f"dataset {dataset_id!r}: {key} has rows of shapes {sorted(tails)}; expected one "
                "shape for all episodes. Make the dataset again"
            )
        arrays[key] = np.concatenate(column)
    return _Stored(arrays, np.asarray(lengths, dtype=np.int64))


# -------------------------------------------------------------------------------------- checking


def _checked(
    stored: _Stored,
    dataset_id: str,
    metadata: Mapping[str, Any],
    leaves: tuple[Leaf, ...],
    action_space: Any,
    content_digest: str,
) -> RawDataset:
    lengths = stored.lengths
    where = _Where(dataset_id, lengths)
    parts = []
    for leaf in leaves:
        key = f"observations/{leaf.name}".rstrip("/")
        array = stored.arrays[key]
        where.check_shape(key, array, leaf.shape)
        where.check_finite(key, array, extra_row=True)
        parts.append(array.reshape(len(array), -1).astype(np.float32, copy=False))
    obs = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    low, high = _action_bounds(action_space, dataset_id)
    action = stored.arrays["actions"]
    where.check_shape("actions", action, tuple(action_space.shape))
    where.check_finite("actions", action)
    action = action.reshape(len(action), -1)
    where.check_bounds(action, low, high)

    reward = stored.arrays["rewards"]
    where.check_shape("rewards", reward, ())
    where.check_finite("rewards", reward)
    flags = {}
    for key in ("terminations", "truncations"):
        where.check_shape(key, stored.arrays[key], ())
        flags[key] = stored.arrays[key].astype(bool)
    terminated, truncated = flags["terminations"], flags["truncations"]
    ends = np.cumsum(lengths) - 1
    inside = terminated | truncated
    inside[ends] = False
    if inside.any():
        episode, step = where.find(int(np.flatnonzero(inside)[0]))
        raise DatasetError(
            f"dataset {dataset_id!r}: episode {episode} goes on after step {step}, which is marked "
            "as its end; expected an end only at the last step. Split the episode there and write "
            "the dataset again"
        )
    unflagged = ends[~(terminated[ends] | truncated[ends])]
    if len(unflagged):
        truncated = truncated.copy()
        truncated[unflagged] = True
    return RawDataset(
        id=dataset_id,
        digest=content_digest,
        obs=obs,
        action=action.astype(np.float32, copy=False),
        reward=reward.astype(np.float64),
        terminated=terminated,
        truncated=truncated,
        lengths=lengths,
        action_low=low,
        action_high=high,
        leaves=leaves,
        metadata=metadata,
        unflagged_ends=len(unflagged),
        last_step_dropped=bool(metadata.get("harness_last_step_dropped", False)),
    )


def _action_bounds(space: Any, dataset_id: str) -> tuple[np.ndarray, np.ndarray]:
    from gymnasium import spaces

    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"dataset {dataset_id!r}: action space is {type(space).__name__}; expected Box. Only "
            "continuous control is supported"
        )
    low = space.low.reshape(-1).astype(np.float32)
    high = space.high.reshape(-1).astype(np.float32)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DatasetError(
            f"dataset {dataset_id!r}: action bounds are {low.tolist()} to {high.tolist()}; "
            "expected finite bounds with low < high. Rescale the actions and write the dataset "
            "again"
        )
    return low, high


class _Where:
    """Says in which episode and at which step something is wrong."""

    def __init__(self, dataset_id: str, lengths: np.ndarray) -> None:
        self.dataset_id = dataset_id
        self.lengths = lengths

    def find(self, row: int, extra_row: bool = False) -> tuple[int, int]:
        ends = np.cumsum(self.lengths + extra_row)
        episode = int(np.searchsorted(ends, row, side="right"))
        first = 0 if episode == 0 else int(ends[episode - 1])
        return episode, row - first

    def check_shape(self, key: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
        if array.shape[1:] != expected or array.dtype.kind not in "fiub":
            raise DatasetError(
                f"dataset {self.dataset_id!r}: {key} has rows of shape {array.shape[1:]} and type "
                f"{array.dtype}; expected numbers of shape {expected}, as its space says. Make "
                "the dataset again with matching spaces"
            )

    def check_finite(self, key: str, array: np.ndarray, extra_row: bool = False) -> None:
        if array.dtype.kind != "f":
            return
        bad = ~np.isfinite(array.reshape(len(array), -1))
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            episode, step = self.find(row, extra_row)
            value = array.reshape(len(array), -1)[row, column]
            raise DatasetError(
                f"dataset {self.dataset_id!r}: {key} of episode {episode} at step {step}, "
                f"component {column}, is {value} ({int(bad.sum())} such values); expected finite "
                "numbers. Remove the episode or get the dataset again"
            )

    def check_bounds(self, action: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        slack = BOUND_TOLERANCE * (high - low)
        bad = (action < low - slack) | (action > high + slack)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            episode, step = self.find(row)
            raise DatasetError(
                f"dataset {self.dataset_id!r}: actions of episode {episode} at step {step}, "
                f"component {column}, is {action[row, column]} ({int(bad.sum())} such values); "
                f"expected between {low[column]} and {high[column]}. Clip the actions when "
                "writing the dataset (`harness data import --clip-actions` for D4RL files)"
            )


# ------------------------------------------------------------------------------------- flat copy


def _read_flat(path: Path, record: Record | None) -> _Stored | None:
    """The flat copy, if it belongs to files that have not changed since."""
    flat = path / FLAT_FILE
    if record is None or not flat.is_file() or not record.matches(path):
        return None
    try:
        with np.load(flat, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return _Stored(arrays, arrays.pop("lengths"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        flat.unlink(missing_ok=True)
        return None


def _write_flat(path: Path, stored: _Stored) -> None:
    size = sum(array.nbytes for array in stored.arrays.values())
    if size > _FLAT_LIMIT_BYTES or not is_writable(path):
        return
    handle, temporary = tempfile.mkstemp(dir=path, prefix=f".{FLAT_FILE}.")
    try:
        with os.fdopen(handle, "wb") as file:
            columns: dict[str, Any] = {"lengths": stored.lengths, **stored.arrays}
            np.savez(file, **columns)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path / FLAT_FILE)
    except OSError:
        Path(temporary).unlink(missing_ok=True)  # a full disk: read slowly next time
