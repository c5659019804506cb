"""A dataset's card: what a reader must know before believing a score on it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.datasets import local
from harness.datasets.catalog import DatasetEntry, resolve
from harness.datasets.data_spec import DataSpec
from harness.datasets.errors import DatasetError
from harness.datasets.measures import coverage
from harness.datasets.minari import RawDataset, load_raw

DEFECTS: Mapping[str, str] = {
    "adroit_reward_sign": (
        "gymnasium-robotics 1.4.2 adds 0.1 times the palm-to-object distance to the reward where "
        "D4RL subtracts it (AdroitHandDoor, Hammer, Relocate -v1): at most 0.4 points of "
        "normalised score, data and evaluation agree with each other"
    ),
    "pen_never_terminates": (
        "AdroitHandPen-v1 never terminates, D4RL ended an episode when the pen was dropped: "
        "random play scores below D4RL's reference (about -186 against 96)"
    ),
    "contact_chaos": (
        "trajectories depend on the MuJoCo version; compare only results of one version"
    ),
    "stale_goal": (
        "every episode but the first begins with the previous goal in its first observation "
        "(desired_goal at t = 0): the environment moves the goal after observing"
    ),
    "accumulating_success": (
        "in the data the reward accumulates while the ant stays at the goal; evaluation ends an "
        "episode there, so only evaluation returns are success rates"
    ),
    "accumulating_subtasks": (
        "in the data a finished subtask counts at every later step; in evaluation it counts once "
        "(return 0 to 4)"
    ),
    "dropped_last_transitions": (
        "the original file has no next_observations: truncated episodes lack their last transition"
    ),
    "repeated_last_observations": (
        "the original file has no next_observations: a terminated episode's last next_obs repeats "
        "its last obs; nothing bootstraps from it, but a model of the dynamics would learn it"
    ),
}


def card(dataset_id: str, reference: str | None = None) -> dict[str, Any]:
    """Counts, returns, ranges, digest, references and known defects; JSON-able.

    `normalized_mean_return` is the trajectory quality (TQ), `coverage` has the state-action
    coverage (SACo); see `harness.datasets.measures`.

    Args:
        reference: the dataset that coverage is relative to, of the same environment.
    Raises:
        DatasetError: if the dataset is not stored or damaged.
    """
    entry = resolve(dataset_id)
    raw = load_raw(entry.id)
    returns = raw.returns()
    quantiles = np.quantile(returns, [0.0, 0.25, 0.5, 0.75, 1.0])
    metadata = raw.metadata
    dropped = int(raw.truncated.sum()) if not raw.last_step_dropped else 0
    imported = metadata.get("harness_import") or {}
    return {
        "id": entry.id,
        "requested": entry.requested,
        "relation": entry.relation,
        "note": entry.note,
        "digest": raw.digest,
        "folder": str(local.folder(entry.id)),
        "format": metadata.get("data_format", "hdf5"),
        "minari_version": metadata.get("minari_version", ""),
        "env_id": entry.env_id,
        "evaluation": _evaluation(entry),
        "description": metadata.get("description", ""),
        "algorithm": metadata.get("algorithm_name", ""),
        "requirements": list(metadata.get("requirements") or ()),
        "episodes": raw.num_episodes,
        "steps": raw.num_steps,
        "terminations": int(raw.terminated.sum()),
        "truncations": int(raw.truncated.sum()),
        "unflagged_ends": raw.unflagged_ends,
        "dropped_by_default": dropped,
        "dropped_at_import": int(imported.get("dropped_last_transitions", 0)),
        "transitions_by_default": raw.num_steps - dropped,
        "episode_length": {
            "min": int(raw.lengths.min()),
            "mean": float(raw.lengths.mean()),
            "max": int(raw.lengths.max()),
        },
        "returns": {
            "mean": float(returns.mean()),
            **dict(zip(("min", "q25", "median", "q75", "max"), quantiles.tolist(), strict=True)),
        },
        "normalized_mean_return": _normalized(entry, float(returns.mean())),
        "coverage": coverage(raw, None if reference is None else load_raw(resolve(reference).id)),
        "reward": {"min": float(raw.reward.min()), "max": float(raw.reward.max())},
        "obs_dim": raw.obs.shape[1],
        "obs_layout": [str(leaf) for leaf in raw.leaves],
        "action_dim": raw.action.shape[1],
        "action_bounds": [float(raw.action_low.min()), float(raw.action_high.max())],
        "action_range": [float(raw.action.min()), float(raw.action.max())],
        "ref_min": entry.ref_min,
        "ref_max": entry.ref_max,
        "ref_source": entry.ref_source,
        "default_data": vars(DataSpec()).copy(),
        "synthetic": _synthetic(metadata),
        "defects": [DEFECTS.get(name, name) for name in defects(entry, raw)],
        "warnings": _version_warnings(metadata),
    }


def defects(entry: DatasetEntry, raw: RawDataset) -> list[str]:
    """Names of the known defects that concern this dataset, keys of `DEFECTS`."""
    found = [str(name) for name in raw.metadata.get("harness_defects") or ()]
    env = entry.env_id
    if env.endswith("-v1") and re.match(r"AdroitHand(Door|Hammer|Relocate)", env):
        found.append("adroit_reward_sign")
    if env == "AdroitHandPen-v1":
        found.append("pen_never_terminates")
    if re.match(r"AdroitHand|Hopper|Walker2d|Ant|Humanoid|FrankaKitchen", env):
        found.append("contact_chaos")
    if entry.id.startswith("D4RL/pointmaze/"):
        found.append("stale_goal")
    if entry.id.startswith("D4RL/antmaze/"):
        found.append("accumulating_success")
    if entry.id.startswith("D4RL/kitchen/"):
        found.append("accumulating_subtasks")
    return list(dict.fromkeys(found))


def _synthetic(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What generated data were made by and how good they are; None for data that were recorded."""
    found = metadata.get("harness_synthetic")
    if not found:
        return None
    shown = ("trial", "algorithm", "seed", "source", "coef", "quality")
    return {name: found[name] for name in shown}


def _evaluation(entry: DatasetEntry) -> dict[str, Any] | None:
    from harness.environments import evaluation_environment

    try:
        environment = evaluation_environment(entry.requested)
    except DatasetError:
        return None
    return {**environment.describe(), "protocol": environment.protocol}


def _normalized(entry: DatasetEntry, value: float) -> float | None:
    """None where the data's episodes are not those of the evaluation, or without references."""
    if re.search(r"/(pointmaze|antmaze|kitchen)/", entry.id):
        return None
    try:
        return float(entry.normalized_score(value))
    except DatasetError:
        return None


def _version_warnings(metadata: Mapping[str, Any]) -> list[str]:
    """Installed versions that differ from those the dataset was made with."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in metadata.get("requirements") or ():
        try:
            requirement = Requirement(text)
            installed = importlib.metadata.version(requirement.name)
        except InvalidRequirement:
            continue
        except importlib.metadata.PackageNotFoundError:
            found.append(f"made with {text}; {text.partition('=')[0]} is not installed")
            continue
        if not requirement.specifier.contains(installed):
            found.append(f"made with {text}; {installed} is installed")
    return found
