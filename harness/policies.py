"""Trained policies in a home folder: which trials have one, by which name, and how it is loaded.

Asked by everything that looks at a policy after its run (`harness.actions`, `harness.latency`,
`harness.export`). Trains, evaluates and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import storage
from harness.home import Home
from harness.plan import Stage, unique_stages
from harness.registry import Registry
from harness.spec import EvaluationSpec, TrialSpec, load_experiment
from harness.stages import load_dataset, load_trained
from harness.trainer import Trainer
from harness.typed import config_from_dict, content_hash
from results.records import TrialRecord

if TYPE_CHECKING:
    from results.store import Store

MOST_NAMED = 8  # trials in an error message
SPEC_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Trained:
    """A finished trial whose policy is in the home folder, or in the storage."""

    trial: TrialSpec
    stage: Stage  # the trial's last one, whose artifact the policy is
    run_id: str
    home: Home  # where the artifact is

    @property
    def title(self) -> str:
        return f"{self.trial.label} {self.trial.dataset_id} seed {self.trial.seed}"


def split(
    trials: Iterable[TrialSpec], store: Store, home: Home, registry: Registry
) -> tuple[list[Trained], dict[str, str]]:
    """The trials that have a trained policy, in order, and why the others (by id) have none."""
    trials = list(trials)
    artifacts = storage.artifacts(home)
    runs = store.statuses([trial.id for trial in trials]) if trials else {}
    stages, last = unique_stages(trials, registry)
    trained: list[Trained] = []
    left_out: dict[str, str] = {}
    for trial in trials:
        run, stage = runs.get(trial.id), stages[last[trial.id]]
        if run is None or run.status != "done":
            left_out[trial.id] = run.status if run is not None else "never run"
        elif not artifacts.has(stage.id):
            left_out[trial.id] = "done, but its artifact is not in this home folder"
        else:
            trained.append(Trained(trial, stage, run.run_id, home))
    return trained, left_out


def refusal(trials: Sequence[TrialSpec], left_out: Mapping[str, str]) -> str:
    """The message about trials without a trained policy."""
    names = [f"{t.label} seed {t.seed} ({left_out[t.id]})" for t in trials if t.id in left_out]
    shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    some = len(left_out) < len(trials)
    advice = "Sweep the experiment first" + (", or leave them out with --partial" if some else "")
    return f"{len(names)} of {len(trials)} trials have no trained policy: {shown}. {advice}"


def named(
    words: Sequence[str], store: Store, home: Home, registry: Registry, partial: bool = False
) -> tuple[list[Trained], dict[str, str]]:
    """What a command line names: trained policies, each once, and what was left out.

    Args:
        words: experiment files (*.yaml), beginnings of run or trial ids, and `key=value`, which
            overrides the experiments.
        home: where ids are looked up; an experiment may name a storage of its own.
        partial: leave out trials without a trained policy instead of refusing.
    Raises:
        ValueError: if a word names nothing or several trials, or a trial has no trained policy.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    specs = [name for name in names if name.endswith(SPEC_SUFFIXES)]
    if not names or (overrides and not specs):
        raise ValueError(
            f"{' '.join(overrides) or 'nothing'} names no policy; expected experiment files "
            "(my.yaml), which overrides such as seeds=0 belong to, or ids of runs or trials"
        )
    trials: dict[str, TrialSpec] = {}
    trained: dict[str, Trained] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name in specs:
            experiment = load_experiment(Path(name), overrides, registry)
            found, where = list(experiment.trials), home.shared(experiment.run.storage)
        else:
            found, where = [_by_id(name, store)], home
        here, others = split(found, store, where, registry)
        trials |= {trial.id: trial for trial in found}
        trained |= {each.trial.id: each for each in here}
        left_out |= others
    left_out = {trial_id: why for trial_id, why in left_out.items() if trial_id not in trained}
    if not trained or (left_out and not partial):
        raise ValueError(refusal(list(trials.values()), left_out))
    return list(trained.values()), left_out


def _by_id(name: str, store: Store) -> TrialSpec:
    """The trial that the beginning of a run's or a trial's id names, as it was planned."""
    runs = store.runs()
    of_runs = {
        str(trial)
        for run, trial in zip(runs.run_id, runs.trial_id, strict=True)
        if str(run).startswith(name)
    }
    of_trials = {str(trial) for trial in store.trials().trial_id if str(trial).startswith(name)}
    found = of_runs | of_trials
    if len(found) != 1:
        known = "no run and no trial" if not found else f"{len(found)} trials"
        raise ValueError(
            f"{name!r} is the beginning of the id of {known} in this database. Give more of the "
            "id, or an experiment file and overrides such as: my.yaml seeds=0 algorithms=[name]"
        )
    (record,) = store.records([TrialRecord], found)
    assert isinstance(record, TrialRecord)
    trial = TrialSpec(
        algorithm=record.algorithm,
        revision=record.revision,
        dataset_id=record.dataset_id,
        dataset_digest=record.dataset_digest,
        data=record.data,
        config=record.config,
        seed=record.seed,
        evaluation=config_from_dict(EvaluationSpec, record.evaluation, f"trial {name}"),
        label=record.label,
        precision=record.precision,  # type: ignore[arg-type]
    )
    if trial.id != record.trial_id:
        raise ValueError(
            f"trial {record.trial_id[:12]} cannot be rebuilt from its row: another version of the "
            "harness identified it. Use that version (the run's git_commit), or sweep again"
        )
    return trial


class Loader:
    """Loads trained policies onto one device; trials that share a dataset share its tensors."""

    def __init__(self, registry: Registry, device: torch.device) -> None:
        self.registry, self.device = registry, device
        self._datasets: dict[str, Any] = {}

    def load(self, trained: Trained) -> tuple[Trainer, Any]:
        """A trainer of the trial's one seed, whose learner can act, and its dataset.

        Raises:
            DatasetError: if the dataset is missing or changed.
            ArtifactError: if the artifact is damaged.
        """
        dataset = self.data(trained.stage)
        home, registry = trained.home, self.registry
        return load_trained(trained.stage, dataset, home, registry, self.device), dataset

    def data(self, stage: Stage, held_out: bool = False) -> Any:
        """The data a stage learns from, or those held out from it.

        Raises:
            DatasetError: if they are missing or changed, or nothing is held out.
        """
        key = content_hash([stage.dataset_id, dict(stage.data), held_out])
        if key not in self._datasets:
            self._datasets[key] = load_dataset(stage, self.device, held_out)
        return self._datasets[key]


def observations(dataset: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Evenly spaced rows of a dataset, int64 [N], and the observations there, [N, O]."""
    rows = torch.arange(count, device=dataset.obs.device) * dataset.spec.num_steps // count
    return rows, dataset.obs[rows]
