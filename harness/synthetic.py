"""Data that trained learners generate: measured against the simulator and the data, and written.

Owns which windows are drawn, what is measured of them and how they become a dataset. A learner can
be asked if it has `generate(dataset, rng, guidance_coef)`, which returns transitions in windows
[K, M, H, ...], and `guidable`: whether the coefficient matters. Every trial is loaded alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from algorithms.api import Batch
from algorithms.blocks.rng import Rng, Stream
from harness import storage
from harness.datasets.catalog import resolve
from harness.datasets.errors import DatasetError
from harness.datasets.writing import refuse_existing, write_dataset
from harness.environments import evaluation_environment
from harness.home import Home
from harness.plan import Stage, make_plan
from harness.registry import Registry
from harness.simulator import Simulator
from harness.spec import Experiment, TrialSpec
from harness.stages import load_dataset, load_trained
from harness.trainer import Trainer, resolve_device

if TYPE_CHECKING:
    from harness.datasets.minari import RawDataset
    from results.store import Store

SIMULATED = 256  # windows whose steps are repeated in the simulator
COMPARED = 2048  # rows of each side when distances to the data are measured
NEIGHBOUR = 5  # the neighbour whose distance is a row's neighbourhood, for coverage


@dataclass(frozen=True)
class Generated:
    """The windows of one trial at one coefficient, on the CPU: tensors [M, H, ...]."""

    trial: TrialSpec
    coef: float | None
    windows: Batch
    log_density: torch.Tensor | None  # [M, H], of the trial's policy


def generated(
    experiment: Experiment,
    store: Store,
    home: Home,
    coefs: Sequence[float | None],
    visit: Callable[[Generated, Any], None],
    registry: Registry | None = None,
) -> dict[str, str]:
    """Calls `visit(windows, dataset)` for every finished trial that generates and coefficient.

    Returns:
        Trials that are left out, and why.
    Raises:
        ValueError: if none is left.
        DatasetError, ArtifactError: if data or artifacts are missing or damaged.
    """
    registry = registry or Registry()
    home = home.shared(experiment.run.storage)
    plan = make_plan(experiment, store, storage.artifacts(home), home.work, registry)
    stages = {trial.id: stage for stage in plan.stages.values() for trial in stage.trials}
    device = resolve_device(experiment.run.device)
    left_out: dict[str, str] = {}
    for trial in experiment.trials:
        name = f"{trial.label} on {trial.dataset_id}, seed {trial.seed}"
        status = plan.statuses.get(trial.id, "never run")
        stage = stages[trial.id]
        if status != "done" or stage.id not in plan.cached:
            left_out[name] = status if status != "done" else "its artifact is not in this folder"
            continue
        dataset = load_dataset(stage, device)
        trainer = load_trained(stage, dataset, home, registry, device)
        if not getattr(trainer.learner, "refresh_every", 0):
            left_out[name] = "generates nothing"
            continue
        guidable = getattr(trainer.learner, "guidable", False)
        for coef in coefs if guidable else (None,):
            visit(_generate(trial, stage, trainer, dataset, coef), dataset)
    if len(left_out) == len(experiment.trials):
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:4])
        raise ValueError(f"no trained learner of {experiment.name!r} generates data ({reasons})")
    return left_out


def _generate(
    trial: TrialSpec, stage: Stage, trainer: Trainer, dataset: Any, coef: float | None
) -> Generated:
    learner: Any = trainer.learner
    with torch.no_grad():
        # The same numbers for every coefficient: what differs is the guidance.
        rng = Rng(trainer.seeds, trainer.step, Stream.MAKE)
        batch = learner.generate(dataset, rng, coef)
        density = None
        if hasattr(learner, "log_density"):
            flat = learner.log_density(batch.obs.flatten(1, 2), batch.action.flatten(1, 2))
            density = flat.unflatten(1, batch.reward.shape[1:])[0].cpu()
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    windows = Batch(**{name: getattr(batch, name)[0].cpu() for name in names})
    return Generated(trial, coef, windows, density)


# ----------------------------------------------------------------------------------------- measured


def measure(made: Generated, dataset: Any, simulator: Simulator | None) -> pd.DataFrame:
    """One row for each horizon index of the windows.

    Columns: `trial_id`, `label`, `algorithm`, `dataset_id`, `seed`, `coef` (nan: none), `index`,
    `steps` (simulated), `dynamics_error` and `dynamics_error_median` (squared error of next_obs in
    units of the data's standard deviations, mean over entries), `reward_error` (absolute, mean),
    `log_density` of the policy; and, the same in all rows, `behaviour_distance` (from a generated
    (s, a) to the nearest of the data, standardised) and `coverage` (share of the data's rows that
    have a generated one among their neighbours: nearer than the data's own 5th neighbour).

    Steps after the first termination of a window are not counted.
    """
    windows = made.windows
    live = torch.cumsum(windows.terminated, dim=1) - windows.terminated < 1.0  # [M, H]
    distance, coverage = _distances(windows, live, dataset)
    scale = np.array(dataset.spec.statistics.obs_std)
    scale[scale == 0.0] = 1.0
    rows = []
    for index in range(live.shape[1]):
        at = live[:, index]
        row = {
            "trial_id": made.trial.id,
            "label": made.trial.label,
            "algorithm": made.trial.algorithm,
            "dataset_id": made.trial.dataset_id,
            "seed": made.trial.seed,
            "coef": np.nan if made.coef is None else made.coef,
            "index": index,
            "log_density": np.nan,
            "behaviour_distance": distance,
            "coverage": coverage,
            **dict.fromkeys(("dynamics_error", "dynamics_error_median", "reward_error"), np.nan),
            "steps": 0,
        }
        if made.log_density is not None and at.any():
            row["log_density"] = made.log_density[at, index].mean().item()
        if simulator is not None:
            row |= _simulated(windows, at.nonzero().flatten()[:SIMULATED], index, scale, simulator)
        rows.append(row)
    return pd.DataFrame(rows)


def _simulated(
    windows: Batch, which: torch.Tensor, index: int, scale: np.ndarray, simulator: Simulator
) -> dict[str, float]:
    obs, action, next_obs = (
        getattr(windows, name)[which, index].numpy() for name in ("obs", "action", "next_obs")
    )
    found, reward, _ = simulator.step(obs, action)
    ran = np.isfinite(reward)
    if not ran.any():
        return {}
    error = np.square((next_obs - found)[ran] / scale).mean(axis=1)
    gap = np.abs(windows.reward[which, index].numpy() - reward)[ran]
    return {
        "steps": int(ran.sum()),
        "dynamics_error": float(error.mean()),
        "dynamics_error_median": float(np.median(error)),
        "reward_error": float(gap.mean()),
    }


def _distances(windows: Batch, live: torch.Tensor, dataset: Any) -> tuple[float, float]:
    spec = dataset.spec
    reach = (np.array(spec.action_high) - np.array(spec.action_low)) / 2.0
    scale = torch.tensor(np.concatenate((spec.statistics.obs_std, reach))).float()
    scale[scale == 0.0] = 1.0

    def table(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        rows = torch.cat((obs, action), dim=-1) / scale
        return rows[torch.arange(min(COMPARED, len(rows))) * len(rows) // min(COMPARED, len(rows))]

    real = table(dataset.obs.cpu(), dataset.action.cpu())
    drawn = table(windows.obs[live], windows.action[live])
    exact = "donot_use_mm_for_euclid_dist"  # the fast way is off by 1e-2 near 0
    between = torch.cdist(real, drawn, compute_mode=exact)  # [real, drawn]
    neighbour = min(NEIGHBOUR, len(real) - 1)
    own = (
        torch.cdist(real, real, compute_mode=exact).kthvalue(neighbour + 1, dim=1).values
    )  # the first is itself
    covered = (between.amin(dim=1) < own).float().mean().item()
    return between.amin(dim=0).mean().item(), covered


def quality(
    experiment: Experiment,
    store: Store,
    home: Home,
    coefs: Sequence[float | None],
    registry: Registry | None = None,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`measure` of every trial and coefficient, and the trials left out.

    Where the simulator's state cannot be set from an observation, its columns are nan.
    """
    tables: list[pd.DataFrame] = []
    simulators: dict[str, Simulator | None] = {}

    def visit(made: Generated, dataset: Any) -> None:
        dataset_id = made.trial.dataset_id
        if dataset_id not in simulators:
            simulators[dataset_id] = simulator_of(dataset_id)
        tables.append(measure(made, dataset, simulators[dataset_id]))

    try:
        left_out = generated(experiment, store, home, coefs, visit, registry)
    finally:
        for simulator in simulators.values():
            if simulator is not None:
                simulator.close()
    return pd.concat(tables, ignore_index=True), left_out


def simulator_of(dataset_id: str) -> Simulator | None:
    """None where there is no environment, or its state is not in the observation."""
    try:
        return Simulator(evaluation_environment(dataset_id))
    except DatasetError:
        return None


# ------------------------------------------------------------------------------------------ written


def write(
    experiment: Experiment,
    store: Store,
    home: Home,
    dataset_id: str,
    coef: float | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
) -> tuple[RawDataset, pd.DataFrame]:
    """Writes what the experiment's one trial generates as a dataset; each window is an episode.

    A window ends where it first terminates, else at a time limit. The dataset is evaluated in the
    environment of the data it comes from, with their reference scores; its metadata have what it
    was made by, and its quality as `harness data card` shows it.

    Returns:
        The dataset, and `measure` of it.
    Raises:
        ValueError: unless there is exactly one finished trial that generates, or its rewards are
            transformed ones.
        DatasetError: if the id is taken.
    """
    refuse_existing(dataset_id, overwrite)  # before minutes of sampling
    if len(experiment.trials) != 1:
        raise ValueError(
            f"the experiment has {len(experiment.trials)} trials; a dataset is written from one. "
            "Choose it with overrides: seeds=0 'datasets=[ID]' and one algorithm"
        )
    (trial,) = experiment.trials
    transform = dict(trial.data).get("reward", "none")
    if transform != "none":
        raise ValueError(
            f"{trial.label} was trained on rewards transformed by {transform!r}, so that it does "
            "not generate the environment's; train it with data.reward none"
        )
    made: list[tuple[Generated, pd.DataFrame]] = []
    simulator = simulator_of(trial.dataset_id)
    try:
        generated(
            experiment,
            store,
            home,
            (coef,),
            lambda windows, dataset: made.append((windows, measure(windows, dataset, simulator))),
            registry,
        )
    finally:
        if simulator is not None:
            simulator.close()
    ((windows, table),) = made
    return _write_episodes(windows, table, dataset_id, overwrite), table


def _write_episodes(
    made: Generated, table: pd.DataFrame, dataset_id: str, overwrite: bool
) -> RawDataset:
    trial, source = made.trial, resolve(made.trial.dataset_id)
    env = evaluation_environment(trial.dataset_id).make()
    space: Any = env.action_space
    optional = {"ref_min_score": source.ref_min, "ref_max_score": source.ref_max}
    try:
        return write_dataset(
            dataset_id,
            _episodes(made.windows),
            overwrite=overwrite,
            extra_metadata={
                "harness_synthetic": {
                    "trial": trial.id,
                    "algorithm": trial.algorithm,
                    "revision": trial.revision,
                    "seed": trial.seed,
                    "config": dict(trial.config),
                    "data": dict(trial.data),
                    "source": source.id,
                    "source_digest": trial.dataset_digest,
                    "coef": made.coef,
                    "quality": summary(table),
                }
            },
            env=env.unwrapped.spec,
            eval_env=env.unwrapped.spec,
            observation_space=env.observation_space,
            action_space=type(space)(space.low.ravel(), space.high.ravel(), dtype=np.float32),
            algorithm_name=f"generated by {trial.algorithm} (trial {trial.id[:12]})",
            description=f"windows generated from {source.id}; each is an episode",
            **{name: value for name, value in optional.items() if value is not None},
        )
    finally:
        env.close()


def _episodes(windows: Batch) -> list[Any]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    columns = {name: getattr(windows, name).numpy() for name in
               ("obs", "action", "reward", "next_obs", "terminated")}  # fmt: skip
    found = []
    for m, ends in enumerate(columns["terminated"] > 0):
        steps = int(ends.argmax()) + 1 if ends.any() else len(ends)
        terminations, truncations = np.zeros(steps, bool), np.zeros(steps, bool)
        terminations[-1], truncations[-1] = ends.any(), not ends.any()
        last = columns["next_obs"][m, steps - 1 : steps]
        found.append(
            EpisodeBuffer(
                observations=np.concatenate((columns["obs"][m, :steps], last)),
                actions=columns["action"][m, :steps],
                rewards=columns["reward"][m, :steps].astype(np.float64),
                terminations=terminations,
                truncations=truncations,
            )
        )
    return found


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """A dataset's `measure` in a few numbers, JSON-able; absent where nothing was measured."""
    first = table.iloc[0]
    found: dict[str, Any] = {
        name: float(first[name]) for name in ("behaviour_distance", "coverage")
    }
    for name in ("log_density", "dynamics_error", "dynamics_error_median", "reward_error"):
        values = table[name].dropna()
        if len(values):
            found[name] = float(values.mean())
    errors = table.dropna(subset=["dynamics_error"])
    if len(errors):
        picked = errors.iloc[np.unique(np.linspace(0, len(errors) - 1, 4).astype(int))]
        found["dynamics_error_by_index"] = {
            str(row["index"]): float(row["dynamics_error"]) for _, row in picked.iterrows()
        }
    return found
