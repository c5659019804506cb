"""What a stage is run with and what it leaves: data, inputs, learner; the artifact.

Data are compared with the plan before anything is trained on them, and kept for the next stack of
the process.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from algorithms.api import Make, Recipe, StageInput, Train
from algorithms.blocks.layers import set_precision
from harness import datasets, provenance, storage
from harness.artifacts import ArtifactStore
from harness.home import Home
from harness.job import Job, run_id
from harness.plan import Stack, Stage
from harness.registry import Registry
from harness.spool import Spool, read
from harness.storage import Hold
from harness.trainer import Trainer, resolve_device, stack_states
from harness.typed import content_hash
from results.records import RunRecord

LOCK_WAIT_S = 15.0
"""How long to wait for a process that is still ending, after a kill."""


def declared_stage(recipe: Recipe, stage: Stage) -> Train | Make:
    """The stage as the recipe declares it for this config."""
    if recipe.revision != stage.revision:
        raise ValueError(
            f"{stage.algorithm} was planned at revision {stage.revision} but this worker has "
            f"revision {recipe.revision}: install the same version on every node"
        )
    kind = Train if stage.kind == "train" else Make
    for declared in recipe.stages(stage.recipe_config):
        if declared.name == stage.name and isinstance(declared, kind):
            return replace(declared, config=stage.config)
    raise ValueError(f"{stage.algorithm} has no {stage.kind} stage named {stage.name!r}")


def load_dataset(stage: Stage, device: torch.device, held_out: bool = False) -> Any:
    """The stage's data, or those held out, after checking that it was planned with them.

    Raises:
        DatasetError: if they are missing, or have another digest.
    """
    _refuse_other_data(stage)
    data = datasets.DataSpec(**stage.data)
    return datasets.load(stage.dataset_id, data, str(device), held_out)


_held: dict[str, Any] = {}
"""The data of the last stack of this process, under what they are."""


def data_key(stage: Stage) -> str:
    """Stages with equal keys are trained on the same data."""
    return content_hash([stage.dataset_id, stage.dataset_digest, dict(stage.data)])


def hold_dataset(job: Job, read: Callable[[], Any]) -> None:
    """Lets a process train on data that were read elsewhere, and compared with the plan there.

    Args:
        read: gives them, unless the stack before in this process was trained on the same.
    """
    stack_dataset(job.stack.stages[0], resolve_device(job.run.device), read)


def stack_dataset(stage: Stage, device: torch.device, read: Callable[[], Any] | None = None) -> Any:
    """The data of the stack before in this process if they are the same, else `load_dataset`.

    What is held was compared with its digest when it was read; nothing changes it since.
    """
    key = f"{data_key(stage)} {device}"
    if key in _held:
        _refuse_other_data(stage)
    else:
        _held.clear()  # before reading: there may be no memory for two
        _held[key] = read().to(device) if read else load_dataset(stage, device)
    return _held[key]


def _refuse_other_data(stage: Stage) -> None:
    found = datasets.digest(stage.dataset_id)
    if found != stage.dataset_digest:
        raise datasets.DatasetError(
            f"dataset {stage.dataset_id!r} has digest {found[:16]}..., but the trial was planned "
            f"with {stage.dataset_digest[:16]}...: the data changed since, or this node holds "
            "another version. Plan again, or copy the same data to every node"
        )


def load_inputs(
    store: ArtifactStore, stages: Sequence[Stage], declared: Train | Make, device: torch.device
) -> dict[str, StageInput]:
    """The needed stages of all seeds, stacked in the order of the seeds."""
    inputs = {}
    for need in declared.needs:
        states = [
            {
                name: tensor.to(device)
                for name, tensor in store.load_state(stage.needs[need]).items()
            }
            for stage in stages
        ]
        config = stages[0].need_configs[need]
        inputs[need] = StageInput(config=config, state=stack_states(states))
    return inputs


def new_trainer(
    store: ArtifactStore,
    stack: Stack,
    declared: Train,
    dataset: Any,
    device: torch.device,
    compiled: bool,
    cuda_graphs: bool = False,
) -> Trainer:
    """A trainer at step 0, its learner on `device` with what it needs."""
    inputs = load_inputs(store, stack.stages, declared, device)
    learner = declared.learner(declared.config, dataset.spec, stack.seeds, inputs)
    learner.to(device)
    set_precision(learner, stack.stages[0].precision)
    return Trainer(learner, dataset, stack.seeds, device, compiled, cuda_graphs)


def load_trained(
    stage: Stage, dataset: Any, home: Home, registry: Registry, device: torch.device
) -> Trainer:
    """A trained stage as its last step left it: a trainer of one seed, whose learner can act.

    Args:
        dataset: of `load_dataset`.
    Raises:
        ArtifactError: if the stage has no artifact, or it is damaged.
    """
    store = storage.artifacts(home)
    declared = declared_stage(registry.get(stage.algorithm), stage)
    if not isinstance(declared, Train):
        raise ValueError(f"stage {stage.name!r} of {stage.algorithm} trains nothing")
    trainer = new_trainer(store, Stack((stage,)), declared, dataset, device, compiled=False)
    trainer.load_seed_states([store.load_state(stage.id)])
    return trainer


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from a stage's folder.

    Raises:
        StackBusyError: if one is at it, and does not end.
    """
    return storage.locked(folder, LOCK_WAIT_S)


def last_runs(job: Job, stage: Stage) -> dict[str, RunRecord]:
    """The last spooled state of each of a stage's current runs."""
    path = job.home.spool(stage.id)
    runs = {run_id(trial.id, job.attempts.get(trial.id, 1)) for trial in stage.trials}
    records = read(path) if path.exists() else ()
    return {r.run_id: r for r in records if isinstance(r, RunRecord) and r.run_id in runs}


def publish(
    job: Job, stage: Stage, state: Mapping[str, torch.Tensor], run: str | None, hold: Hold
) -> None:
    """Publishes a stage's final state with its spool, then drops its checkpoints."""
    spool = job.home.spool(stage.id)

    def write(folder: Path) -> None:
        ArtifactStore.save_state(folder, state)
        if spool.exists():
            shutil.copyfile(spool, folder / spool.name)

    manifest = {
        "stage": stage.name,
        "run_id": run,
        "inputs": stage.identity(),
        "versions": provenance.versions(),
        "git_commit": provenance.git_state()[0],
        "git_dirty": provenance.git_state()[1],
    }
    record = storage.artifacts(job.home).publish(stage.id, write, manifest)
    with Spool(spool) as rows:
        rows.append(record)
    hold.push_checkpoints(stage.id, [])
    shutil.rmtree(job.home.checkpoints(stage.id), ignore_errors=True)
