"""Writes a dataset into the store through Minari: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.datasets import local
from harness.datasets.errors import DatasetError
from harness.datasets.minari import RawDataset, read_folder


@contextmanager
def locked(dataset_id: str) -> Iterator[None]:
    """One process at a time makes or fetches a dataset."""
    from filelock import FileLock

    folder = local.root() / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"the dataset store {local.root()} cannot be written ({error}); point "
            "MINARI_DATASETS_PATH at a folder that can"
        ) from error
    with FileLock(folder / f"{dataset_id.replace('/', '__')}.lock"):
        yield


def refuse_existing(dataset_id: str, overwrite: bool) -> None:
    """Raises DatasetError if the id is taken and may not be replaced."""
    if local.folder(dataset_id).exists() and not overwrite:
        raise DatasetError(
            f"dataset {dataset_id!r} already exists in {local.root()}; choose another id with "
            "--id, or replace it with --overwrite"
        )


def write_dataset(
    dataset_id: str,
    episodes: Sequence[Any],
    *,
    overwrite: bool = False,
    extra_metadata: Mapping[str, Any] | None = None,
    **minari_arguments: Any,
) -> RawDataset:
    """Writes episodes under `dataset_id`, checked and recorded before anyone can see them.

    Args:
        episodes: `minari.data_collector.EpisodeBuffer`s.
        extra_metadata: further keys of metadata.json.
        minari_arguments: of `minari.create_dataset_from_buffers`.
    Returns:
        The dataset as it is read back.
    Raises:
        DatasetError: if the id is taken or malformed, or the episodes are invalid.
    """
    local.check_id(dataset_id)
    with locked(dataset_id):
        refuse_existing(dataset_id, overwrite)
        workshop = local.root() / f".partial-{uuid.uuid4().hex[:12]}"
        try:
            made = _create(workshop, dataset_id, episodes, extra_metadata or {}, minari_arguments)
            metadata = local.read_metadata(made / "data" / "metadata.json", dataset_id)
            raw = read_folder(made, dataset_id, metadata)
            install(made, dataset_id)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return raw


def install(made: Path, dataset_id: str) -> None:
    """Moves a complete dataset folder to its place with one rename."""
    target = local.folder(dataset_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    namespace = target.parent
    while namespace != local.root():
        marker = namespace / "namespace_metadata.json"  # Minari lists only marked namespaces
        if not marker.exists():
            marker.write_text("{}")
        namespace = namespace.parent
    replaced = None
    if target.exists():
        replaced = local.root() / f".replaced-{uuid.uuid4().hex[:12]}"
        os.rename(target, replaced)
    os.rename(made, target)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _create(
    workshop: Path,
    dataset_id: str,
    episodes: Sequence[Any],
    extra_metadata: Mapping[str, Any],
    minari_arguments: Mapping[str, Any],
) -> Path:
    import minari

    if not episodes:
        raise DatasetError(f"dataset {dataset_id!r} would be empty; expected at least one episode")
    in_bulk = minari_arguments.get("data_format") in (None, "hdf5")
    with _minari_root(workshop), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari warns about every optional field left out
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            list(episodes[:1] if in_bulk else episodes),
            **{"author": "offline-rl-harness", **minari_arguments},
        )
        dataset.storage.update_metadata(dict(extra_metadata))
        if in_bulk:
            _write_hdf5(dataset.storage.data_path / "main_data.hdf5", episodes)
            dataset.storage.update_metadata(
                {
                    "total_episodes": len(episodes),
                    "total_steps": sum(len(e.rewards) for e in episodes),
                    "dataset_size": dataset.storage.get_size(),
                }
            )
    return workshop / dataset_id


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    """Minari writes only below its root, which it takes from the environment."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    folder.mkdir(parents=True)
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _write_hdf5(path: Path, episodes: Sequence[Any]) -> None:
    """Minari's HDF5 layout, but in contiguous arrays.

    Minari makes every array chunked and resizable, which costs kilobytes of index for each: for
    one-step episodes eight times the space and three times the time.
    """
    import h5py

    with h5py.File(path, "w", libver="latest", track_order=True) as file:
        for index, episode in enumerate(episodes):
            group = file.create_group(f"episode_{index}")
            group.attrs["id"] = index
            group.attrs["total_steps"] = len(episode.rewards)
            if episode.seed is not None:
                group.attrs["seed"] = episode.seed
            for name in ("observations", "actions", "rewards", "terminations", "truncations"):
                _write_nested(group, name, getattr(episode, name))
            if episode.infos:
                _write_nested(group, "infos", episode.infos)


def _write_nested(group: Any, name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        child = group.create_group(name)
        for key, part in value.items():
            _write_nested(child, key, part)
    else:
        _write_array(group, name, np.asarray(value, order="C"))


def _write_array(group: Any, name: str, array: np.ndarray) -> None:
    """Through h5py's low level where it can: ten thousand episodes have fifty thousand arrays."""
    from h5py import h5d, h5p, h5s, h5t

    if array.ndim == 0 or array.dtype.kind not in "bfiu":
        group.create_dataset(name, data=array)
        return
    plain = h5p.create(h5p.DATASET_CREATE)
    plain.set_obj_track_times(False)  # as h5py: equal data make equal files
    kind, space = h5t.py_create(array.dtype, logical=True), h5s.create_simple(array.shape)
    h5d.create(group.id, name.encode(), kind, space, plain).write(h5s.ALL, h5s.ALL, array)
