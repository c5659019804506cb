"""A catalog of datasets by name alone, so that planning is tested without data on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.datasets import DatasetEntry, UnknownDatasetError
from harness.registry import Registry
from harness.spec import Experiment, load_experiment

PLUGIN = Path(__file__).parent / "plugin"

ENTRIES = (
    DatasetEntry("generated/line-v0", "generated/line-v0", "generated", "Line-v0"),
    DatasetEntry("generated/loop-v0", "generated/loop-v0", "generated", "Loop-v0"),
    DatasetEntry("mujoco/hopper/medium-v0", "hopper-medium-v2", "different", "Hopper-v5",
                 "hopper-medium-v2", note="other behaviour policies"),
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    env_id: str
    simulator: str = "mujoco 3.11.0"

    def describe(self) -> dict[str, Any]:
        return {"env_id": self.env_id, "max_episode_steps": 300}


@dataclass
class SmallCatalog:
    """`harness.datasets` as far as resolving an experiment needs it."""

    digests: dict[str, str] = field(default_factory=dict)
    simulator: str = "mujoco 3.11.0"

    def resolve(self, name: str) -> DatasetEntry:
        for entry in ENTRIES:
            if name in (entry.id, entry.requested):
                return DatasetEntry(
                    entry.id, name, entry.relation, entry.env_id, entry.legacy_id, note=entry.note
                )
        raise UnknownDatasetError(f"unknown dataset {name!r}")

    def match(self, pattern: str) -> list[str]:
        found = [entry.id for entry in ENTRIES if fnmatchcase(entry.id, pattern)]
        if not found:
            raise UnknownDatasetError(f"no stored dataset matches {pattern!r}")
        return found

    def digest(self, dataset_id: str) -> str:
        return self.digests.get(dataset_id) or hashlib.sha256(dataset_id.encode()).hexdigest()

    def evaluation_environment(self, dataset_id: str) -> Environment:
        return Environment(self.resolve(dataset_id).env_id, self.simulator)


def experiment(
    folder: Path,
    text: str,
    *overrides: str,
    registry: Registry,
    catalog: SmallCatalog | None = None,
) -> Experiment:
    """The experiment that `text` describes."""
    path = folder / "spec.yaml"
    path.write_text(text)
    return load_experiment(path, overrides, registry, catalog or SmallCatalog())
