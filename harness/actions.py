"""Actions of trained policies as a table: what a policy does at observations of its data.

Owns which random numbers and the table. An action is a function of the trial, the row and the
number of draws asked for: each trial is loaded alone, so that the others in the table do not
matter, and the draws have a stream of their own. Judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from algorithms.blocks.rng import RowRng, Stream
from harness import policies
from harness.home import Home
from harness.registry import Registry
from harness.spec import Experiment, TrialSpec
from harness.trainer import Trainer, resolve_device
from results.archive import save_table

if TYPE_CHECKING:
    from results.store import Store

MOST_ROWS = 2**24 - 2  # rows have a random number stream each; see `RowRng`
CHUNK_ROWS = 4096  # of one policy call


@dataclass(frozen=True)
class Drawn:
    """A table of actions, and the trials that are not in it.

    Columns: `trial_id`, `label`, `algorithm`, `dataset_id`, `seed`, `draw` (0, 1, ...), `row` (the
    transition whose observation it was), `obs_*`, `action_*`, and `unclamped_*`: the same draws
    before they are moved into the bounds, where the policy has `act_unclamped`. Of a policy with
    `log_density` also `log_density`, at the unclamped draw, and `data_log_density`, at the
    transition's own action.
    """

    table: pd.DataFrame
    left_out: dict[str, str]  # trial id -> why

    @property
    def trials(self) -> int:
        """How many trials are in the table."""
        return int(self.table.trial_id.nunique())


def draw_actions(
    experiment: Experiment,
    store: Store,
    home: Home,
    count: int = 1000,
    partial: bool = False,
    registry: Registry | None = None,
    held_out: bool = False,
) -> Drawn:
    """`count` actions of every finished trial, at evenly spaced rows of its dataset.

    Args:
        partial: leave out trials without a trained policy instead of refusing.
        held_out: rows that `data.held_out` kept from the learner, instead of those it saw.
    Raises:
        ValueError: if trials have no trained policy, naming them, or `count` is out of range.
        DatasetError: if a dataset is missing or changed, or nothing is held out.
        ArtifactError: if an artifact is damaged.
    """
    if not 1 <= count <= MOST_ROWS:
        raise ValueError(f"count is {count}; expected 1 to {MOST_ROWS} actions per trial")
    registry = registry or Registry()
    home = home.shared(experiment.run.storage)
    trained, left_out = policies.split(experiment.trials, store, home, registry)
    if not trained or (left_out and not partial):
        raise ValueError(policies.refusal(experiment.trials, left_out))
    loader = policies.Loader(registry, resolve_device(experiment.run.device))
    tables = []
    for each in trained:
        trainer, dataset = loader.load(each)
        if held_out:
            dataset = loader.data(each.stage, held_out=True)
        tables.append(_table(each.trial, trainer, dataset, count))
    return Drawn(pd.concat(tables, ignore_index=True), left_out)


def _table(trial: TrialSpec, trainer: Trainer, dataset: Any, count: int) -> pd.DataFrame:
    rows, obs = policies.observations(dataset, count)
    free, action = _act(trainer, obs)
    if not np.isfinite(action).all():
        raise ValueError(
            f"the policy of {trial.label} seed {trial.seed} gives actions that are not finite, "
            "although its run is done"
        )
    columns: dict[str, Any] = {
        "trial_id": trial.id,
        "label": trial.label,
        "algorithm": trial.algorithm,
        "dataset_id": trial.dataset_id,
        "seed": trial.seed,
        "draw": np.arange(count),
        "row": rows.cpu().numpy(),
    }
    for name, values in (("obs", obs.cpu().numpy()), ("action", action), ("unclamped", free)):
        columns |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
    if hasattr(trainer.learner, "log_density"):
        data = dataset.action[rows]
        columns["log_density"] = _log_density(trainer, obs, torch.from_numpy(free))
        columns["data_log_density"] = _log_density(trainer, obs, data)
    return pd.DataFrame(columns)


def _act(trainer: Trainer, obs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Draws [N, A] of a trainer's one seed, before and after they are moved into the bounds."""
    policy: Any = trainer.learner
    calls = {"action": policy.act}
    if hasattr(policy, "act_unclamped"):
        calls["unclamped"] = policy.act_unclamped
    found: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    for start in range(0, len(obs), CHUNK_ROWS):
        part = obs[start : start + CHUNK_ROWS].unsqueeze(0)
        row = torch.arange(start, start + part.shape[1], device=obs.device).unsqueeze(0)
        for name, call in calls.items():
            # Made anew for each call, so that both get the same numbers.
            rng = RowRng(trainer.seeds, trainer.step, Stream.ACTIONS, row, torch.zeros_like(row))
            with torch.no_grad():
                found[name].append(call(part, rng)[0].cpu().numpy())
    drawn = {name: np.concatenate(parts) for name, parts in found.items()}
    return drawn.get("unclamped", drawn["action"]), drawn["action"]


def _log_density(trainer: Trainer, obs: torch.Tensor, action: torch.Tensor) -> np.ndarray:
    """log density of the policy of a trainer's one seed at actions [N, A]: [N]."""
    policy: Any = trainer.learner
    parts = []
    for start in range(0, len(obs), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        with torch.no_grad():
            found = policy.log_density(obs[None, rows], action[None, rows].to(obs.device))
        parts.append(found[0].cpu().numpy())
    return np.concatenate(parts)


def write_parquet(table: pd.DataFrame, path: Path, about: Mapping[str, Any]) -> None:
    """Writes a table under its final name complete or not at all, `about` in its metadata."""
    import pyarrow as pa

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {"harness": json.dumps(dict(about), sort_keys=True)}
    save_table(arrow.replace_schema_metadata(metadata), path)
