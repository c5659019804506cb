"""Detectors of out-of-distribution actions compared on a dataset: fits them, scores actions.

Owns which rows are held out, which actions are compared with the data's, and the random numbers.
Whole episodes are held out, the same for all seeds. Judges nothing: scores go to `analysis`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from algorithms.api import Batch, DatasetSpec
from algorithms.blocks.rng import Rng, Stream
from algorithms.detectors import DetectorConfig, detectors
from harness import provenance
from harness.datasets.data_spec import DataSpec, held_out_episodes
from harness.ingest import dataset_record
from harness.trainer import Trainer, resolve_compile, resolve_device
from harness.typed import config_to_dict, suggest
from results.records import DetectionRecord, Record

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = 0.1  # share of the episodes
PERTURBATION = 0.3  # std of the noise on perturbed actions, in half widths of the bounds
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Scores:
    """One detector, all seeds: scores of the held-out data's actions and of others."""

    detector: str
    config: DetectorConfig
    data: np.ndarray  # [K, N]
    against: Mapping[str, np.ndarray]  # uniform, perturbed, ... -> [K, N]
    grid: np.ndarray | None = None  # [K, G, G] over (observation, action), where both have 1 dim


@dataclass(frozen=True)
class PolicyActions:
    """What trained policies of one label did."""

    obs: np.ndarray  # [N, O]
    action: np.ndarray  # [N, A]

    @property
    def digest(self) -> str:
        """Tells one set of actions from another under the same label."""
        pairs = np.concatenate((self.obs, self.action), axis=1, dtype=np.float32)
        return hashlib.sha256(pairs.tobytes()).hexdigest()


class Rows:
    """Some rows of a dataset as a dataset; only what detectors ask for."""

    def __init__(self, whole: Any, index: np.ndarray) -> None:
        self.whole = whole
        self.index = torch.from_numpy(index).to(whole.device)
        self.spec: DatasetSpec = replace(whole.spec, num_steps=len(index))

    def rows(self, index: Tensor, next_action: bool = False) -> Batch:
        return self.whole.rows(self.index[index], next_action)

    def transitions(self, rng: Any, batch_size: int, next_action: bool = False) -> Batch:
        return self.rows(rng.integers(len(self.index), batch_size), next_action)


def split(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training episodes and of the held-out ones, at least one of each.

    Args:
        lengths: steps of each episode.
    Raises:
        ValueError: for fewer than two episodes.
    """
    of_row = np.repeat(held_out_episodes(len(lengths), HELD_OUT), lengths)
    return np.flatnonzero(~of_row), np.flatnonzero(of_row)


def compare(
    dataset: Any,
    seeds: Sequence[int],
    names: Iterable[str] = (),
    config: DetectorConfig | None = None,
    count: int = 2000,
    actions: Mapping[str, PolicyActions] | None = None,
    device: str = "auto",
    compile_mode: str = "auto",
    grid: int = 0,
    report: Callable[[str, int, int], None] = lambda name, done, steps: None,
) -> list[Scores]:
    """Fits each detector for all seeds in one stack and scores held-out, uniform and other actions.

    Of a policy's actions only those at held-out observations are drawn from: detectors know the
    others, so that the data's own actions there would look more usual than held-out ones.

    Args:
        names: of detectors, all if empty.
        count: actions of each kind and seed, drawn with replacement.
        actions: label -> actions of trained policies.
        grid: points of a side of the map over (observation, action), for one dimension of each.
        report: told of the detector, its steps done and all of them.
    Raises:
        ValueError: for an unknown detector, too few episodes, a name of `actions` that is taken, or
            a label with no action at a held-out observation.
    """
    known = detectors(config)
    chosen = list(names) or list(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"unknown detector {name!r}. {suggest(name, known)}")
    on = resolve_device(device)
    dataset = dataset.to(on)
    training, held_out = split(dataset.lengths)
    rng = Rng(_seeds(seeds, on), torch.zeros(len(seeds), dtype=torch.int64, device=on), Stream.TEST)
    batch = Rows(dataset, held_out).transitions(rng, count)
    compared = _others(dataset.spec, batch, rng)
    taken = sorted(compared.keys() & (actions or {}).keys())
    if taken:
        raise ValueError(
            f"actions of a policy called {taken[0]!r}: that is the name of a built-in comparison "
            f"({', '.join(compared)}). Give the algorithm another label, and draw its actions again"
        )
    for name, given in _at_observations(actions or {}, dataset.obs[held_out]).items():
        which = rng.integers(len(given.obs), count)
        obs, action = (
            torch.tensor(x, dtype=torch.float32, device=on)[which]
            for x in (given.obs, given.action)
        )
        compared[name] = obs, action
    found: list[Scores] = []
    trained: dict[tuple[type, int], dict[str, Tensor]] = {}
    for name in chosen:
        kind, settings = known[name]
        key = (kind, settings.members)  # the three denoising scores share one model
        learner = kind(settings, dataset.spec, list(seeds), {}).to(on)
        fitted = Rows(dataset, training)
        if key in trained:
            learner.load_state_dict(trained[key])
        elif settings.steps:
            compiled, _ = resolve_compile(compile_mode, on, settings.steps)
            trainer = Trainer(learner, fitted, list(seeds), on, compiled)  # type: ignore[arg-type]
            while trainer.steps_done < settings.steps:
                chunk = trainer.advance(min(500, settings.steps - trainer.steps_done))
                if chunk.diverged:
                    index, where = next(iter(chunk.diverged.items()))
                    raise ValueError(f"detector {name}, seed {seeds[index]}: {where}")
                report(name, trainer.steps_done, settings.steps)
            trained[key] = learner.state_dict()
        with torch.no_grad():
            learner.finish(fitted, rng)
            data = _scores(learner, batch.obs, batch.action, rng)
            against = {
                other: _scores(learner, obs, action, rng)
                for other, (obs, action) in compared.items()
            }
            drawn = _map(learner, dataset, rng, grid) if grid else None
        found.append(Scores(name, settings, data, against, drawn))
    return found


def _seeds(seeds: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(seeds), dtype=torch.int64, device=device)


def _at_observations(
    actions: Mapping[str, PolicyActions], observations: Tensor
) -> dict[str, PolicyActions]:
    """Those of the actions that were taken at one of the observations [N, O].

    Row numbers would not do: they count the rows that the policy's trial kept of the dataset.
    """
    if not actions:
        return {}
    known = {row.tobytes() for row in observations.cpu().numpy()}
    found = {}
    for name, given in actions.items():
        there = np.array([row.tobytes() in known for row in given.obs.astype(np.float32)])
        if not there.any():
            raise ValueError(
                f"none of the {len(there)} actions of {name!r} is at an observation that was held "
                f"out from the detectors ({HELD_OUT:.0%} of the episodes). Draw more of "
                "them: harness actions --count"
            )
        found[name] = PolicyActions(given.obs[there], given.action[there])
    return found


def _others(spec: DatasetSpec, batch: Batch, rng: Rng) -> dict[str, tuple[Tensor, Tensor]]:
    """Uniform actions and the data's with noise, within the bounds, beside their observations."""
    low, high = (
        torch.tensor(bound, device=batch.obs.device)
        for bound in (spec.action_low, spec.action_high)
    )
    shape = batch.action.shape[1:]
    noise = PERTURBATION * (high - low) / 2.0 * rng.normal(*shape)
    return {
        "uniform": (batch.obs, low + (high - low) * rng.uniform(*shape)),
        "perturbed": (batch.obs, (batch.action + noise).clamp(low, high)),
    }


def _scores(learner: Any, obs: Tensor, action: Tensor, rng: Rng) -> np.ndarray:
    parts = [
        learner.score(obs[:, i : i + CHUNK_ROWS], action[:, i : i + CHUNK_ROWS], rng)
        for i in range(0, obs.shape[1], CHUNK_ROWS)
    ]
    return torch.cat(parts, dim=1).cpu().numpy()


def _map(learner: Any, dataset: Any, rng: Rng, size: int) -> np.ndarray:
    """Scores over the whole plane, [K, actions, observations]."""
    obs, action = grid_axes(dataset, size)
    plane = torch.stack(torch.meshgrid(action, obs, indexing="ij"), dim=-1).view(1, -1, 2)
    plane = plane.expand(rng.num_seeds, -1, -1)
    found = _scores(learner, plane[..., 1:], plane[..., :1], rng)
    return found.reshape(-1, size, size)


def grid_axes(dataset: Any, size: int) -> tuple[Tensor, Tensor]:
    """Observations from the data's smallest to its largest, and actions within the bounds.

    Raises:
        ValueError: unless observation and action have one dimension.
    """
    spec = dataset.spec
    if (spec.obs_dim, spec.action_dim) != (1, 1):
        raise ValueError(
            f"a map needs one dimension of observation and action; {spec.id!r} has "
            f"{spec.obs_dim} and {spec.action_dim}"
        )
    low, high = float(dataset.obs.min()), float(dataset.obs.max())
    obs = torch.linspace(low, high, size, device=dataset.device)
    return obs, torch.linspace(spec.action_low[0], spec.action_high[0], size, device=dataset.device)


def policy_actions(table: pd.DataFrame, dataset_id: str) -> dict[str, PolicyActions]:
    """What trained policies did, from the table of `harness actions`, by label.

    Raises:
        ValueError: if the table has no row of the dataset.
    """
    rows = table[table["dataset_id"] == dataset_id]
    if rows.empty:
        raise ValueError(
            f"the table has no actions on {dataset_id!r}, only on "
            f"{', '.join(sorted(set(table['dataset_id'])))}"
        )
    rows = rows.dropna(axis=1, how="all")  # dimensions that only other datasets have
    columns = {
        name: [f"{name}_{i}" for i in range(sum(str(c).startswith(f"{name}_") for c in rows))]
        for name in ("obs", "action")
    }
    return {
        str(label): PolicyActions(*(own[columns[name]].to_numpy() for name in ("obs", "action")))
        for label, own in rows.groupby("label")
    }


def records(
    spec: DatasetSpec,
    seeds: Sequence[int],
    scores: Iterable[Scores],
    measured: Iterable[Any],
    actions: Mapping[str, PolicyActions] | None = None,
    data: DataSpec | None = None,
) -> list[Record]:
    """Rows for the database: the dataset, and one for each detector, kind of action and seed.

    What else a number depends on joins the detector's settings: the digest of a policy's actions,
    and a choice of transitions other than the default.

    Args:
        measured: `detector`, `against` and `auroc`, `aupr`, `fpr95` [K] of each comparison.
        actions: those that were compared.
        data: with which the dataset was read.
    """
    actions, data = actions or {}, data or DataSpec()
    chosen = dict(config_to_dict(data).items() - config_to_dict(DataSpec()).items())
    (commit, dirty), now = provenance.git_state(), provenance.utc_now()
    by_name = {each.detector: each for each in scores}
    found: list[Record] = [dataset_record(spec.id, spec.digest)]
    for row in measured:
        of = by_name[row.detector]
        config = config_to_dict(of.config) | chosen
        if row.against in actions:
            config["actions"] = actions[row.against].digest
        found += [
            DetectionRecord(
                dataset_id=spec.id,
                dataset_digest=spec.digest,
                detector=row.detector,
                config=config,
                seed=seed,
                against=row.against,
                count=len(of.against[row.against][k]),
                auroc=float(row.auroc[k]),
                aupr=float(row.aupr[k]),
                fpr95=float(row.fpr95[k]),
                created_at=now,
                git_commit=commit,
                git_dirty=dirty,
            )
            for k, seed in enumerate(seeds)
        ]
    return found
