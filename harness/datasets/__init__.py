"""Datasets: what is known by name, what is stored, and what a learner receives.

Names resolve through `catalog`; files are read, checked and hashed by `minari`; `buffers` turns
them into tensors. Importing this package loads neither torch nor Minari.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.datasets.catalog import DatasetEntry, match, normalized_score, resolve
from harness.datasets.data_spec import DataSpec
from harness.datasets.errors import DatasetError, UnknownDatasetError

if TYPE_CHECKING:
    from harness.datasets.buffers import TransitionDataset, load
    from harness.datasets.cards import card
    from harness.datasets.fetching import download
    from harness.datasets.minari import RawDataset, digest, load_raw, verify, verify_files

_LAZY = {
    "RawDataset": "minari",
    "digest": "minari",
    "load_raw": "minari",
    "verify": "minari",
    "verify_files": "minari",
    "TransitionDataset": "buffers",
    "load": "buffers",
    "card": "cards",
    "download": "fetching",
}

__all__ = [
    "DataSpec",
    "DatasetEntry",
    "DatasetError",
    "RawDataset",
    "TransitionDataset",
    "UnknownDatasetError",
    "card",
    "digest",
    "download",
    "load",
    "load_raw",
    "match",
    "normalized_score",
    "resolve",
    "verify",
    "verify_files",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
