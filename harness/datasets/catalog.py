"""Names: what was asked for, what is loaded for it, and how the two are related.

Relations, never mixed silently:
    original     the file D4RL published, imported into `d4rl-original/...`
    regenerated  the same behaviour data rebuilt by Farama in a maintained environment
    different    another environment or other behaviour policies; the nearest thing there is
    generated    made here by `harness data make`
    local        anything else, known by its own Minari id

D4RL's constants normalise a score only for `original` and `regenerated`.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from harness.datasets import local
from harness.datasets.errors import DatasetError, UnknownDatasetError
from results.published import reference_scores

Relation = Literal["original", "regenerated", "different", "generated", "local"]

ORIGINAL_NAMESPACE = "d4rl-original"
D4RL_SOURCE = "D4RL constants"
METADATA_SOURCE = "dataset metadata"

# Random play and the noise-free waypoint controller in the evaluation environments of
# `harness.environments`; 40 episodes each, mujoco 3.3.7. maze2d's constants belong to another
# reward count, start distribution and horizon and must not be used here.
POINTMAZE_ANCHORS: Mapping[str, tuple[float, float]] = {
    "open": (10.90, 251.18),
    "umaze": (8.65, 219.30),
    "medium": (5.22, 430.30),
    "large": (1.00, 553.25),
    "open-dense": (68.74, 263.18),
    "umaze-dense": (48.43, 232.90),
    "medium-dense": (25.71, 447.34),
    "large-dense": (18.72, 576.48),
}
POINTMAZE_SOURCE = (
    "local anchors: random actions and noise-free waypoint controller, 40 episodes, mujoco 3.3.7"
)
ROUTES_ID = "generated/pointmaze/routes-v0"
BANDIT_ANCHORS = (2.375, 5.0)
BANDIT_SOURCE = "closed form: uniform random actions and the best corner's mean"

_POINTMAZE = re.compile(
    r"(?:D4RL|generated)/pointmaze/((?:open|umaze|medium|large)(?:-dense)?)-v\d+"
)


@dataclass(frozen=True)
class DatasetEntry:
    """What a name stands for. Knowing it does not need the data on disk.

    Attributes:
        id: the Minari id that is loaded.
        requested: the name that was asked for.
        relation: how `id` is related to `requested`.
        env_id: the environment the data come from ("" if unknown).
        legacy_id: D4RL's name of the nearest original ("" if there is none).
        ref_min, ref_max: returns with normalised score 0 and 1; None without references.
        ref_source: names the reference set; "" without references.
        max_episode_steps: D4RL's horizon, where its constants are used and it is known.
        note: what a reader must know before comparing scores.
    """

    id: str
    requested: str
    relation: Relation
    env_id: str = ""
    legacy_id: str = ""
    ref_min: float | None = None
    ref_max: float | None = None
    ref_source: str = ""
    max_episode_steps: int | None = None
    note: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)  # steps, episodes, remote

    @property
    def is_stored(self) -> bool:
        return local.is_stored(self.id)

    def normalized_score(self, episode_return: Any) -> Any:
        """(return - ref_min) / (ref_max - ref_min), a fraction; see `normalized_score`."""
        return normalized_score(self, episode_return)


@dataclass(frozen=True)
class _LegacyName:
    legacy_id: str
    minari_id: str  # "" if nothing but the original exists
    relation: str
    env_id: str
    max_episode_steps: int | None


@cache
def _legacy_names() -> dict[str, _LegacyName]:
    text = resources.files("harness.datasets").joinpath("d4rl_names.csv").read_text()
    return {
        row["legacy_id"]: _LegacyName(
            row["legacy_id"],
            row["minari_id"],
            row["relation"],
            row["env_id"],
            int(row["max_episode_steps"]) if row["max_episode_steps"] else None,
        )
        for row in csv.DictReader(text.splitlines())
    }


@cache
def _published() -> dict[str, dict[str, str]]:
    text = resources.files("harness.datasets").joinpath("published.csv").read_text()
    return {row["dataset_id"]: row for row in csv.DictReader(text.splitlines())}


@cache
def _legacy_of() -> dict[str, _LegacyName]:
    """Minari id (D4RL/ ids without their version) to the newest D4RL name it stands for."""
    found: dict[str, _LegacyName] = {}
    for name in sorted(_legacy_names().values(), key=lambda n: _version(n.legacy_id)):
        if name.minari_id:
            found[_stem(name.minari_id)] = name
    return found


def _stem(dataset_id: str) -> str:
    """Farama's versions of a D4RL/ set are conversions of the same data; others are not."""
    return dataset_id.rpartition("-v")[0] if dataset_id.startswith("D4RL/") else dataset_id


def _version(name: str) -> int:
    return int(name.rpartition("-v")[2])


def published_ids() -> list[str]:
    """Every published Minari id the catalog knows."""
    return sorted(_published())


def legacy_ids() -> list[str]:
    """Every D4RL name the catalog knows."""
    return sorted(_legacy_names())


def resolve(name: str) -> DatasetEntry:
    """What a Minari id or a D4RL name stands for.

    A D4RL name prefers the original file if it has been imported, then what Farama regenerated,
    then the nearest different dataset; `relation` and `note` say which.

    Raises:
        UnknownDatasetError: if the name is neither known nor stored; names near matches.
    """
    if name in _legacy_names():
        return _resolve_legacy(name)
    if isinstance(name, str) and "-v" not in name and _newest(name):
        raise UnknownDatasetError(
            f"dataset {name!r} has no version; did you mean {_newest(name)!r}?"
        )
    local.check_id(name)
    if not (local.is_stored(name) or name in _published() or name in _made_ids()):
        legacy = name.removeprefix(f"{ORIGINAL_NAMESPACE}/")
        if legacy == name or legacy not in _legacy_names():
            raise _unknown(name)
    return _resolve_id(name)


def _newest(stem: str) -> str:
    known = [n for n in (*_legacy_names(), *_published()) if n.rpartition("-v")[0] == stem]
    return max(known, key=_version, default="")


def _unknown(name: str) -> UnknownDatasetError:
    stored = local.stored_ids()
    known = sorted({*stored, *_legacy_names(), *_published(), *_made_ids()})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnknownDatasetError(
        f"unknown dataset {name!r}.{hint} Stored in {local.root()}: "
        f"{', '.join(stored) or 'nothing'}. `harness data list --published` shows what can be "
        "downloaded."
    )


def _made_ids() -> list[str]:
    from harness.datasets.obtaining import makers  # which needs this module

    return list(makers())


def _resolve_legacy(name: str) -> DatasetEntry:
    legacy = _legacy_names()[name]
    original = f"{ORIGINAL_NAMESPACE}/{name}"
    if local.is_stored(original):
        return replace(_resolve_id(original), requested=name)
    if not legacy.minari_id:
        note = (
            "no maintained dataset corresponds to this D4RL name; get the original HDF5 file and "
            f"run `harness data import FILE --id {original}`"
        )
        return replace(_resolve_id(original), requested=name, note=note)
    entry = replace(_resolve_id(legacy.minari_id), requested=name, legacy_id=name)
    if entry.relation == "regenerated":
        ref_min, ref_max = reference_scores()[name]
        entry = replace(
            entry, ref_min=ref_min, ref_max=ref_max, ref_source=f"{D4RL_SOURCE} ({name})"
        )
    return entry


def _resolve_id(dataset_id: str) -> DatasetEntry:
    """The entry of a well-formed Minari id."""
    stored = local.metadata(dataset_id) if local.is_stored(dataset_id) else {}
    published = _published().get(dataset_id, {})
    entry = DatasetEntry(
        id=dataset_id,
        requested=dataset_id,
        relation="local",
        env_id=_stored_env_id(stored) or published.get("env_id", ""),
        published=published,
    )
    if dataset_id.startswith(f"{ORIGINAL_NAMESPACE}/"):
        return _original(entry)
    if dataset_id.startswith("generated/"):
        entry = replace(entry, relation="generated")
    legacy = _legacy_of().get(_stem(dataset_id))
    if legacy is not None:
        relation: Relation = "regenerated" if legacy.relation == "regenerated" else "different"
        entry = replace(
            entry, relation=relation, legacy_id=legacy.legacy_id, note=_note(dataset_id, relation)
        )
        if relation == "regenerated":
            ref_min, ref_max = reference_scores()[legacy.legacy_id]
            source = f"{D4RL_SOURCE} ({legacy.legacy_id})"
            return replace(
                entry,
                ref_min=ref_min,
                ref_max=ref_max,
                ref_source=source,
                max_episode_steps=legacy.max_episode_steps,
            )
    maze = _POINTMAZE.fullmatch(dataset_id)
    if maze:
        low, high = POINTMAZE_ANCHORS[maze[1]]
        return replace(entry, ref_min=low, ref_max=high, ref_source=POINTMAZE_SOURCE)
    if dataset_id == "generated/bandit2d-v0":
        low, high = BANDIT_ANCHORS
        return replace(entry, ref_min=low, ref_max=high, ref_source=BANDIT_SOURCE)
    if entry.relation == "different":
        return entry  # whatever the file says, D4RL's constants do not apply to other data
    return _references_from_metadata(entry, stored)


def _original(entry: DatasetEntry) -> DatasetEntry:
    legacy_id = entry.id.removeprefix(f"{ORIGINAL_NAMESPACE}/")
    legacy = _legacy_names().get(legacy_id)
    if legacy is None:
        return replace(entry, relation="original")
    ref_min, ref_max = reference_scores()[legacy_id]
    return replace(
        entry,
        relation="original",
        env_id=entry.env_id or legacy.env_id,
        legacy_id=legacy_id,
        ref_min=ref_min,
        ref_max=ref_max,
        ref_source=f"{D4RL_SOURCE} ({legacy_id})",
        max_episode_steps=legacy.max_episode_steps,
    )


def _references_from_metadata(entry: DatasetEntry, stored: Mapping[str, Any]) -> DatasetEntry:
    low, high = stored.get("ref_min_score"), stored.get("ref_max_score")
    if low is None or high is None or not _is_number(low) or not _is_number(high) or low >= high:
        return entry
    source = str(stored.get("harness_ref_source") or METADATA_SOURCE)
    if source == METADATA_SOURCE:
        same = sorted(
            {
                name.partition("-")[0]
                for name, pair in reference_scores().items()
                if math.isclose(pair[0], low, rel_tol=1e-6, abs_tol=1e-6)
                and math.isclose(pair[1], high, rel_tol=1e-6)
            }
        )
        if same and (low, high) != (0, 1):
            source += f" (D4RL's values for {', '.join(same)})"
    return replace(entry, ref_min=float(low), ref_max=float(high), ref_source=source)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stored_env_id(stored: Mapping[str, Any]) -> str:
    text = stored.get("env_spec")
    try:
        return str(json.loads(text)["id"]) if isinstance(text, str) else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _note(dataset_id: str, relation: Relation) -> str:
    if dataset_id.startswith("mujoco/"):
        return (
            "new data by other policies in a Gymnasium v5 environment; not comparable with D4RL's "
            "set, so D4RL's constants are not used"
        )
    if dataset_id.startswith("D4RL/pointmaze/"):
        return (
            "PointMaze differs from maze2d in observation, start distribution and horizon; scored "
            "with local anchors"
        )
    if dataset_id.startswith("D4RL/antmaze/"):
        return "evaluated with episodes that end at the goal, so the score is the success rate"
    return "rebuilt by Farama from the same demonstrations or policies" if relation else ""


def match(pattern: str) -> list[str]:
    """Names a glob stands for: stored ids, else D4RL names whose data are stored.

    A pattern without wildcards is returned if it resolves, stored or not.

    Raises:
        UnknownDatasetError: if nothing matches; lists what is stored.
    """
    if not any(char in pattern for char in "*?["):
        return [resolve(pattern).requested]
    stored = local.stored_ids()
    ids = [name for name in stored if fnmatch.fnmatchcase(name, pattern)]
    if ids:
        return ids
    have = set(stored)
    aliases = [
        name
        for name in legacy_ids()
        if fnmatch.fnmatchcase(name, pattern) and resolve(name).id in have
    ]
    if aliases:
        return aliases
    raise UnknownDatasetError(
        f"no stored dataset matches {pattern!r}. Stored in {local.root()}: "
        f"{', '.join(stored) or 'nothing'}. Get data with `harness data download` or make some "
        "with `harness data make`."
    )


def normalized_score(entry: DatasetEntry, episode_return: Any) -> Any:
    """(return - ref_min) / (ref_max - ref_min), a fraction (1.0 is the reference expert).

    Args:
        episode_return: a number or an array of undiscounted raw returns.
    Raises:
        DatasetError: if the dataset has no references, or they are equal.
    """
    if entry.ref_min is None or entry.ref_max is None:
        raise DatasetError(
            f"dataset {entry.id!r} (relation {entry.relation!r}) has no reference scores, so a "
            "normalised score is not defined; report raw returns, or store ref_min_score and "
            "ref_max_score in its metadata"
        )
    if not entry.ref_max > entry.ref_min:
        raise DatasetError(
            f"dataset {entry.id!r} has ref_min {entry.ref_min} and ref_max {entry.ref_max}; "
            "expected ref_max > ref_min"
        )
    return (episode_return - entry.ref_min) / (entry.ref_max - entry.ref_min)
