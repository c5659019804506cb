"""The local store: Minari's own folder, read without importing Minari."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.datasets.errors import DatasetError, UnknownDatasetError

_ID = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+-v[0-9]+", re.ASCII)


def root() -> Path:
    """Where datasets are stored: `MINARI_DATASETS_PATH`, else Minari's default."""
    chosen = os.environ.get("MINARI_DATASETS_PATH")
    return Path(chosen) if chosen else Path.home() / ".minari" / "datasets"


def check_id(dataset_id: str) -> str:
    """The id itself, if it has the form of a Minari id (which also keeps it inside the store).

    Raises:
        UnknownDatasetError: if it has not.
    """
    if not isinstance(dataset_id, str) or not _ID.fullmatch(dataset_id):
        raise UnknownDatasetError(
            f"dataset id {dataset_id!r} is malformed; expected (namespace/)name-v<number> of "
            "letters, digits, '-' and '_', for example 'D4RL/door/human-v2'"
        )
    return dataset_id


def folder(dataset_id: str) -> Path:
    """The dataset's folder, whether or not it exists."""
    return root() / check_id(dataset_id)


def is_stored(dataset_id: str) -> bool:
    return (folder(dataset_id) / "data" / "metadata.json").is_file()


def stored_ids() -> list[str]:
    """Ids of the datasets in the local store, sorted. Hidden folders (unfinished) are left out."""

    def walk(path: Path, prefix: str) -> Iterator[str]:
        try:
            children = sorted(p for p in path.iterdir() if p.is_dir())
        except OSError:
            return
        for child in children:
            if child.name.startswith("."):
                continue
            name = f"{prefix}{child.name}"
            if (child / "data" / "metadata.json").is_file() and _ID.fullmatch(name):
                yield name
            elif child.name != "data":
                yield from walk(child, f"{name}/")

    return sorted(walk(root(), ""))


def metadata(dataset_id: str) -> dict[str, Any]:
    """The stored `metadata.json`.

    Raises:
        DatasetError: if the dataset is not stored or its metadata cannot be read.
    """
    path = folder(dataset_id) / "data" / "metadata.json"
    if not path.is_file():
        if dataset_id.startswith("generated/"):
            how = "make it with `harness data make`"
        elif dataset_id.startswith("d4rl-original/"):
            how = f"import D4RL's file with `harness data import FILE --id {dataset_id}`"
        else:
            how = f"get it with `harness data download {dataset_id}`"
        raise DatasetError(
            f"dataset {dataset_id!r} is not in the local store {root()}; {how}, or point "
            "MINARI_DATASETS_PATH at the folder that holds it"
        )
    return read_metadata(path, dataset_id)


def read_metadata(path: Path, dataset_id: str) -> dict[str, Any]:
    """Parses one metadata file and checks that it belongs to `dataset_id`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); expected JSON written by Minari. "
            f"Delete {path.parent.parent} and download or make {dataset_id!r} again."
        ) from error
    if not isinstance(content, dict) or content.get("dataset_id") != dataset_id:
        found = content.get("dataset_id") if isinstance(content, dict) else content
        raise DatasetError(
            f"{path}: dataset_id is {found!r}; expected {dataset_id!r} from its place in the "
            "store. Move the folder to where its id says."
        )
    return content
