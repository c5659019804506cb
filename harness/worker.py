"""Runs one stack from its data to its artifacts: what happens inside a worker process.

Owns the order in which things reach the disk. At a boundary (end of a chunk): metrics, then
evaluations, are spooled; then the checkpoint is published; at the end the artifact is published
before the run is called done. A kill at any point therefore loses at most the steps since the
last checkpoint, and replayed rows carry the same keys. Where homes are not shared the same order
holds for what is pushed to the storage. Knows neither Ray nor the database.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from algorithms.api import DatasetSpec, Make, Recipe, StageInput, Train
from algorithms.blocks.layers import set_precision
from algorithms.blocks.rng import Rng, Stream
from harness import datasets, environments, provenance, storage
from harness.artifacts import ArtifactStore
from harness.evaluate import EvaluationError, Evaluator
from harness.failures import with_end
from harness.home import Home
from harness.memory import forget_the_last_stack
from harness.plan import (
    Stack,
    Stage,
    checkpoint_name,
    checkpoint_steps,
    resume_groups,
    usable_steps,
)
from harness.registry import Registry
from harness.spec import EvaluationSpec, RunOptions
from harness.spool import Spool, read
from harness.storage import ROWS_EVERY_S, Hold, StackBusyError, StorageError
from harness.trainer import (
    STOP_CHECK_S,
    Divergence,
    Trainer,
    check_precision,
    resolve_compile,
    resolve_cuda_graphs,
    resolve_device,
    stack_states,
)
from harness.typed import content_hash
from harness.watchdog import Watchdog
from results.records import FINISHED, EvalRecord, MetricRecord, RunRecord

KEPT_CHECKPOINTS = 2
LOCK_WAIT_S = 15.0
"""How long to wait for a process that is still ending, after a kill."""


@dataclass(frozen=True)
class Job:
    """A stack and everything a worker needs to run it."""

    stack: Stack
    run: RunOptions
    home: Home
    attempts: Mapping[str, int]  # trial id -> the attempt these rows belong to
    stop_file: Path | None = None  # appears when the user asks the sweep to stop, and names it
    needed_by: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)  # see `Plan`

    @property
    def sweep(self) -> str:
        """Names the sweep; empty outside of one."""
        return self.stop_file.name if self.stop_file is not None else ""


@dataclass(frozen=True)
class Progress:
    """What a worker tells while it runs."""

    step: int
    steps: int
    steps_per_second: float  # gradient steps of the whole stack, not times K
    last_return: float | None = None  # mean over seeds and episodes of the last evaluation
    phase: str = "train"  # load, compile, generate, train, evaluate, done, interrupted
    notice: str = ""


class _Stopped(Exception):
    """The user asked the sweep to stop while an evaluation was going on."""


def run_id(trial_id: str, attempt: int) -> str:
    """The identity of an attempt."""
    return f"{trial_id[:32]}-{attempt}"


def run_stack(
    job: Job, report: Callable[[Progress], None], registry: Registry | None = None
) -> str:
    """Runs a stack to its end and returns "done", "interrupted" or "diverged" (every seed).

    A seed that diverges, or whose environment fails twice in one episode, ends by itself: its run
    says so, and the others go on. Trials that need a stage which diverged have diverged with it.

    What a killed worker left is looked at here, not only when planning: seeds that ended are
    left alone, seeds that were trained but not called done are evaluated, and the others
    continue from the newest checkpoint they have in common.

    Raises:
        StackBusyError: if another process holds one of the seeds, or took it over.
        StorageError: if the storage that nodes have in common cannot be used.
        DatasetError: if the data are missing or are not those that were planned.
        EvaluationError: if no seed is left, and an environment failed that of the last one.
        Exception: whatever the algorithm raises, after the affected runs have been spooled as
            failed with the traceback.
    """
    if _should_stop(job):
        return "interrupted"  # it was waiting for resources when the user stopped the sweep
    forget_the_last_stack()
    job = replace(job, home=job.home.on_this_node())
    hold = Hold(job.home, [stage.id for stage in job.stack.stages], job.sweep)
    with ExitStack() as locks:
        for stage in job.stack.stages:
            locks.enter_context(_locked(job.home.stage(stage.id)))
        locks.enter_context(hold)
        outcome = _run_held(job, report, registry or Registry(), hold)
        if outcome != "interrupted":
            hold.forget()
    return outcome


def _run_held(job: Job, report: Callable[[Progress], None], registry: Registry, hold: Hold) -> str:
    """`run_stack`, once no other process can be at work on the stack."""
    artifacts = storage.artifacts(job.home)
    if all(not stage.trials and artifacts.has(stage.id) for stage in job.stack.stages):
        return "done"  # another sweep made them while this one waited for it
    first = job.stack.stages[0]
    declared = declared_stage(registry.get(first.algorithm), first)
    if isinstance(declared, Make):
        return _run_make(job, declared, report, hold)
    with Watchdog(job.home.stale(first.id), job.run.stale_after_s) as watchdog:
        outcomes = []
        for stages, resume_step, trained in _parts(job):
            part = replace(job, stack=replace(job.stack, stages=stages, resume_step=resume_step))
            outcomes.append(_TrainingRun(part, declared, report, trained, watchdog, hold).run())
            if outcomes[-1] == "interrupted":
                return "interrupted"
    return "diverged" if outcomes and set(outcomes) == {"diverged"} else "done"


def _should_stop(job: Job) -> bool:
    return job.stop_file is not None and job.stop_file.exists()


def _parts(job: Job) -> Iterator[tuple[tuple[Stage, ...], int, bool]]:
    """Stages that continue together, the step they continue from, and whether they are trained."""
    left = [stage for stage in job.stack.stages if not _has_ended(job, stage)]
    trained = tuple(stage for stage in left if _is_trained(job, stage))
    if trained:
        yield trained, 0, True
    rest = [stage for stage in left if stage not in trained]
    steps, found = {}, storage.checkpoint_steps(job.home)
    for stage in rest:
        runs = {run.trial_id: run for run in _last_runs(job, stage).values()}
        steps[stage.id] = usable_steps(stage, found(stage.id), runs)
    for step, ids in resume_groups(steps):
        yield tuple(stage for stage in rest if stage.id in ids), step, False


def _last_runs(job: Job, stage: Stage) -> dict[str, RunRecord]:
    """The last spooled state of each of a stage's current runs."""
    path = job.home.spool(stage.id)
    runs = {run_id(trial.id, job.attempts.get(trial.id, 1)) for trial in stage.trials}
    records = read(path) if path.exists() else ()
    return {r.run_id: r for r in records if isinstance(r, RunRecord) and r.run_id in runs}


def _has_ended(job: Job, stage: Stage) -> bool:
    """Whether nothing is left to do for a stage.

    One that other stages need is published; the runs of a last one are done or diverged.
    """
    if not stage.trials:
        return storage.artifacts(job.home).has(stage.id)
    last = _last_runs(job, stage)
    ended = [record for record in last.values() if record.status in FINISHED]
    return len(ended) == len(stage.trials)


def _is_trained(job: Job, stage: Stage) -> bool:
    """Whether only the final policy is left to evaluate.

    An artifact alone is not enough: a new trial may ask for evaluations along the way, and then
    the plan has it trained again.
    """
    if not storage.artifacts(job.home).has(stage.id):
        return False
    last = _last_runs(job, stage)
    return job.stack.evaluate_only or (
        bool(last) and all(record.steps_done >= stage.steps for record in last.values())
    )


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    return storage.locked(folder, LOCK_WAIT_S)


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
    _stack_dataset(job.stack.stages[0], resolve_device(job.run.device), read)


def _stack_dataset(
    stage: Stage, device: torch.device, read: Callable[[], Any] | None = None
) -> Any:
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


def _load_inputs(
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


def _new_trainer(
    store: ArtifactStore,
    stack: Stack,
    declared: Train,
    dataset: Any,
    device: torch.device,
    compiled: bool,
    cuda_graphs: bool = False,
) -> Trainer:
    """A trainer at step 0, its learner on `device` with what it needs."""
    inputs = _load_inputs(store, stack.stages, declared, device)
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
    trainer = _new_trainer(store, Stack((stage,)), declared, dataset, device, compiled=False)
    trainer.load_seed_states([store.load_state(stage.id)])
    return trainer


@dataclass
class MakeOutput:
    """Where a `Make` stage puts what it computed: `out.array(name, tensor led by K)`.

    It may call `out.progress(done, total)` on its way.
    """

    num_seeds: int
    report: Callable[[Progress], None] = lambda progress: None
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)

    def progress(self, done: int, total: int) -> None:
        self.report(Progress(done, total, 0.0))

    def array(self, name: str, values: torch.Tensor) -> None:
        if values.dim() == 0 or values.shape[0] != self.num_seeds:
            raise ValueError(
                f"array {name!r} has shape {tuple(values.shape)}; expected it led by K = "
                f"{self.num_seeds}"
            )
        self.arrays[name] = values.detach().cpu()


def _run_make(job: Job, declared: Make, report: Callable[[Progress], None], hold: Hold) -> str:
    device = resolve_device(job.run.device)
    first = job.stack.stages[0]
    report(Progress(0, 1, 0.0, phase="load"))
    dataset = _stack_dataset(first, device)
    inputs = _load_inputs(storage.artifacts(job.home), job.stack.stages, declared, device)
    seeds = torch.tensor(job.stack.seeds, dtype=torch.int64, device=device)
    rng = Rng(seeds, torch.zeros_like(seeds), Stream.MAKE)
    out = MakeOutput(len(job.stack.seeds), report)
    with torch.no_grad():
        declared.function(declared.config, dataset, inputs, rng, out)
    for index, stage in enumerate(job.stack.stages):
        state = {name: values[index : index + 1].clone() for name, values in out.arrays.items()}
        _publish(job, stage, state, None, hold)
    hold.push_rows()
    report(Progress(1, 1, 0.0, phase="done"))
    return "done"


def _publish(
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


class _TrainingRun:
    """The training of one stack, boundary by boundary."""

    def __init__(
        self,
        job: Job,
        declared: Train,
        report: Callable[[Progress], None],
        trained: bool,
        watchdog: Watchdog,
        hold: Hold,
    ) -> None:
        self.job, self.declared, self._tell, self.hold = job, declared, report, hold
        self.watchdog, self._asked = watchdog, 0.0
        self.stages = job.stack.stages
        self.spools = [Spool(job.home.spool(stage.id)) for stage in self.stages]
        self.alive = [True] * len(self.stages)
        self.timings = {"train": 0.0, "evaluate": 0.0, "compile": 0.0, "load": 0.0}
        self.last_return: float | None = None
        self.notice = ""
        self.device = resolve_device(job.run.device)
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(job.run.cpus_per_stack)))
        self.store = storage.artifacts(job.home)
        # Trained already, but a trial (another evaluation protocol, or a kill between the
        # artifact and its last row) still needs rows: evaluate the final policy only.
        self.trained = trained
        if not self.trained:
            check_precision(self.stages[0].precision, self.device)
        compiled, self.notice = resolve_compile(job.run.compile, self.device, declared.steps)
        self.compiled = compiled and not self.trained
        self.compiled_act = compiled and job.run.compile_act
        self.cuda_graphs, reason = resolve_cuda_graphs(
            job.run.cuda_graphs and not self.trained, self.device, self.compiled
        )
        self.notice = self.notice or reason
        self.runs = self._begin_runs()

    def report(self, progress: Progress) -> None:
        self.watchdog.feed()
        self._tell(progress)

    # ---------------------------------------------------------------- rows

    def _begin_runs(self) -> list[dict[str, RunRecord]]:
        """The current record of every trial's run, by trial id, for each stage."""
        now = provenance.utc_now()
        begun = self.declared.steps if self.trained else self.job.stack.resume_step
        segment = {
            "started_at": now,
            "from_step": begun,
            "device": str(self.device),
            "compiled": self.compiled,
            "compiled_act": self.compiled_act,
            "cuda_graphs": self.cuda_graphs,
            "stack": list(self.job.stack.seeds),
            "host": provenance.hardware()["host"],
        }
        runs: list[dict[str, RunRecord]] = []
        for stage, spool in zip(self.stages, self.spools, strict=True):
            earlier = _last_runs(self.job, stage)
            current: dict[str, RunRecord] = {}
            for trial in stage.trials:
                run = self._new_run(trial.id, now)
                before = earlier.get(run.run_id)
                current[trial.id] = replace(
                    run,
                    started_at=before.started_at if before else now,
                    timings=before.timings if before else {},
                    steps_done=begun,
                    segments=(*(before.segments if before else ()), segment),
                )
            spool.append(current.values())
            runs.append(current)
        self._earlier_timings = [
            dict(next(iter(current.values())).timings) if current else {} for current in runs
        ]
        return runs

    def _new_run(self, trial_id: str, now: str) -> RunRecord:
        """The record of a trial's run that begins in this process."""
        commit, dirty = provenance.git_state()
        attempt = self.job.attempts.get(trial_id, 1)
        return RunRecord(
            run_id=run_id(trial_id, attempt),
            trial_id=trial_id,
            attempt=attempt,
            status="running",
            started_at=now,
            ended_at=None,
            git_commit=commit,
            git_dirty=dirty,
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            device=str(self.device),
            compiled=self.compiled,
            stack=tuple(self.job.stack.seeds),
        )

    def _set_status(self, index: int, status: Any, steps_done: int, error: str | None) -> None:
        """Spools a new state of all runs of one seed."""
        earlier = self._earlier_timings[index]
        timings = {
            name: round(earlier.get(name, 0.0) + seconds, 3)
            for name, seconds in self.timings.items()
        }
        for trial_id, record in self.runs[index].items():
            self.runs[index][trial_id] = replace(
                record,
                status=status,
                ended_at=None if status == "running" else provenance.utc_now(),
                timings=timings,
                steps_done=steps_done,
                error=error,
            )
        self.spools[index].append(self.runs[index].values())

    def _spool_metrics(self, index: int, step: int, metrics: Mapping[str, list[float]]) -> None:
        self.spools[index].append(
            MetricRecord(record.run_id, step, name, values[index])
            for record in self.runs[index].values()
            for name, values in metrics.items()
        )

    # ---------------------------------------------------------------- the run

    def run(self) -> str:
        try:
            self.hold.push_rows()
            outcome = self._run()
            self.hold.push_rows()
            return outcome
        except (KeyboardInterrupt, StackBusyError):
            raise
        except Exception:
            for index, alive in enumerate(self.alive):
                if alive and self.runs[index]:
                    done = next(iter(self.runs[index].values())).steps_done
                    self._set_status(index, "failed", done, traceback.format_exc())
            with contextlib.suppress(StorageError, StackBusyError):  # the first error is told
                self.hold.push_rows()
            raise

    def _run(self) -> str:
        started = time.perf_counter()
        self.report(Progress(0, self.declared.steps, 0.0, phase="load"))
        dataset = _stack_dataset(self.stages[0], self.device)
        trainer = _new_trainer(
            self.store,
            self.job.stack,
            self.declared,
            dataset,
            self.device,
            self.compiled,
            self.cuda_graphs,
        )
        self._restore(trainer)
        evaluations = self._evaluations(dataset.spec)
        self.timings["load"] += time.perf_counter() - started
        try:
            if self.trained or not self.declared.steps:
                for evaluation in evaluations:
                    self._evaluate(trainer, evaluation)
                return self._finish(trainer)
            return self._train(trainer, evaluations)
        except _Stopped:
            return self._interrupted(trainer)
        finally:
            for evaluation in evaluations:
                evaluation.close()

    def _restore(self, trainer: Trainer) -> None:
        if self.trained:
            states = [self.store.load_state(stage.id) for stage in self.stages]
        elif self.job.stack.resume_step:
            name = checkpoint_name(self.job.stack.resume_step)
            states = [
                storage.checkpoints(self.job.home, stage.id).load_state(name)
                for stage in self.stages
            ]
        else:
            return
        trainer.load_seed_states(states)

    def _evaluations(self, dataset: DatasetSpec) -> list[_Evaluation]:
        """One evaluation for each protocol that the stack's trials ask for."""
        protocols: list[EvaluationSpec] = []
        for stage in self.stages:
            for trial in stage.trials:
                if trial.evaluation not in protocols:
                    protocols.append(trial.evaluation)
        options = (self.job.run.max_envs, self.compiled_act)
        return [_Evaluation(protocol, dataset, self.stages, *options) for protocol in protocols]

    def _train(self, trainer: Trainer, evaluations: list[_Evaluation]) -> str:
        steps, run = self.declared.steps, self.job.run
        refresh_every = getattr(trainer.learner, "refresh_every", 0)
        intervals = [run.log_every, run.checkpoint_every, refresh_every]
        intervals += [evaluation.every for evaluation in evaluations]
        self._evaluate_at(trainer, evaluations, 0.0, missing_only=True)
        if self.compiled:
            self.report(Progress(trainer.steps_done, steps, 0.0, phase="compile"))
        while trainer.steps_done < steps and any(self.alive):
            if refresh_every and trainer.steps_done % refresh_every == 0:
                self._refresh(trainer)
            target = _next_boundary(trainer.steps_done, steps, intervals)
            chunk = trainer.advance(target - trainer.steps_done, self._stopping)
            if trainer.graphed is not None and trainer.graphed.refused:
                self.notice = f"not replayed as CUDA graphs: {trainer.graphed.refused}"
            if chunk is None:
                return self._interrupted(trainer)
            self.timings["compile"] += chunk.first_call_seconds
            self.timings["train"] += chunk.seconds - chunk.first_call_seconds
            self._mark_diverged(chunk.diverged)
            for index, alive in enumerate(self.alive):
                if alive:
                    self._spool_metrics(index, target, chunk.metrics)
            rate = chunk.steps_per_second
            self.report(self._progress(trainer, rate, "train"))
            self._evaluate_at(trainer, evaluations, rate)
            self.hold.push_rows(ROWS_EVERY_S)
            if target < steps:
                if self._stopping():
                    return self._interrupted(trainer)
                if target % run.checkpoint_every == 0:
                    self._checkpoint(trainer)
        return self._finish(trainer)

    def _stopping(self) -> bool:
        """Whether the user asked the sweep to stop; asked while a chunk goes on."""
        self.watchdog.feed()
        return _should_stop(self.job) or self.hold.asked_to_stop

    def _interrupted(self, trainer: Trainer) -> str:
        """Keeps what is done, also within a chunk or before an evaluation that is due."""
        if not self.trained and trainer.steps_done:
            self._checkpoint(trainer)
        for index, alive in enumerate(self.alive):
            if alive:
                self._set_status(index, "interrupted", trainer.steps_done, None)
        self.report(self._progress(trainer, 0.0, "interrupted"))
        return "interrupted"

    def _evaluate_at(
        self,
        trainer: Trainer,
        evaluations: list[_Evaluation],
        rate: float,
        missing_only: bool = False,
    ) -> None:
        """The evaluations that are due at this step.

        Args:
            missing_only: those that were given up when the sweep was stopped.
        """
        step, last = trainer.steps_done, self.declared.steps
        for evaluation in evaluations:
            due = step == last or (evaluation.every and step and step % evaluation.every == 0)
            if due and not (missing_only and self._was_evaluated(evaluation, step)):
                self.report(self._progress(trainer, rate, "evaluate"))
                self._evaluate(trainer, evaluation)

    def _was_evaluated(self, evaluation: _Evaluation, step: int) -> bool:
        """Whether every living run of the protocol has episodes at a step."""
        for stage, runs, alive in zip(self.stages, self.runs, self.alive, strict=True):
            asked = {
                runs[trial.id].run_id
                for trial in stage.trials
                if alive and trial.evaluation == evaluation.protocol
            }
            found = {
                record.run_id
                for record in read(self.job.home.spool(stage.id))
                if isinstance(record, EvalRecord) and record.step == step
            }
            if not asked <= found:
                return False
        return True

    def _refresh(self, trainer: Trainer) -> None:
        """New generated data; the time is kept apart from that of the steps."""
        self.report(self._progress(trainer, 0.0, "generate"))
        started = time.perf_counter()
        trainer.refresh()
        passed = time.perf_counter() - started
        self.timings["generate"] = self.timings.get("generate", 0.0) + passed

    def _progress(self, trainer: Trainer, rate: float, phase: str) -> Progress:
        return Progress(
            trainer.steps_done, self.declared.steps, rate, self.last_return, phase, self.notice
        )

    def _mark_diverged(self, diverged: Mapping[int, Divergence]) -> None:
        for index, where in diverged.items():
            if self.alive[index]:
                self.alive[index] = False
                kept = checkpoint_steps(self.job.home.checkpoints(self.stages[index].id))
                good = f"last good checkpoint: step {kept[-1]}" if kept else "no checkpoint before"
                self._set_status(index, "diverged", where.step, f"{where}; {good}")
                self._end_what_needs(self.stages[index], f"{where}; {good}")

    def _end_what_needs(self, stage: Stage, error: str) -> None:
        """Spools the runs of trials that need a stage which diverged: they have diverged with it.

        Without that a trial would look as if it had never been tried, and every sweep would.
        """
        seed = "" if stage.seed is None else f" of seed {stage.seed}"
        home, now = self.job.home, provenance.utc_now()
        for last in self.job.needed_by.get(stage.id, ()):
            hold = Hold(home, [last.id], self.job.sweep)
            # Whoever is at it finds out without these rows that the stage is not there.
            with contextlib.suppress(StackBusyError), _locked(home.stage(last.id)), hold:
                with Spool(home.spool(last.id)) as spool:
                    spool.append(
                        replace(
                            self._new_run(trial.id, now),
                            status="diverged",
                            ended_at=now,
                            error=f"stage {stage.name!r}{seed}, which it needs: {error}",
                        )
                        for trial in last.trials
                    )
                hold.push_rows()
                hold.forget()

    def _mark_failed(self, errors: Mapping[int, EvaluationError], step: int) -> None:
        """Ends the runs of seeds whose environment failed; raises if that leaves no seed."""
        for index, error in errors.items():
            self.alive[index] = False
            for trial_id, run in self.runs[index].items():
                self.runs[index][trial_id] = with_end(run, "error")
            self._set_status(index, "failed", step, "".join(traceback.format_exception(error)))
        if errors and not any(self.alive):
            raise next(iter(errors.values()))

    def _evaluate(self, trainer: Trainer, evaluation: _Evaluation) -> None:
        started = time.perf_counter()
        episodes, failed = evaluation.evaluator.run(
            trainer.learner,  # type: ignore[arg-type]
            trainer.seeds,
            trainer.step,
            self.alive,
            self._on_environment_step,
        )
        step = trainer.steps_done
        self._mark_diverged(
            {i: Divergence(step, why) for i, why in failed.items() if isinstance(why, str)}
        )
        broken = {i: why for i, why in failed.items() if isinstance(why, EvaluationError)}
        self._mark_failed(broken, step)
        returns = []
        for index, played in enumerate(episodes):
            rows = [
                EvalRecord(
                    self.runs[index][trial.id].run_id,
                    trainer.steps_done,
                    episode.episode,
                    episode.env_seed,
                    episode.episode_return,
                    episode.length,
                    episode.mode,
                )
                for trial in self.stages[index].trials
                if trial.evaluation == evaluation.protocol
                for episode in played
            ]
            if rows:
                self.spools[index].append(rows)
            again = evaluation.evaluator.retried[index]
            # A count that is there only where an environment failed, and then did not.
            if again and index not in broken:
                count = {"evaluation_retries": [float(again)] * len(self.stages)}
                self._spool_metrics(index, trainer.steps_done, count)
            returns += [episode.episode_return for episode in played]
        self.last_return = sum(returns) / len(returns) if returns else None
        self.timings["evaluate"] += time.perf_counter() - started

    def _on_environment_step(self) -> None:
        now = time.perf_counter()
        if now - self._asked > STOP_CHECK_S:
            self._asked = now
            if self._stopping():
                raise _Stopped

    def _checkpoint(self, trainer: Trainer) -> None:
        """Publishes one checkpoint per living seed, then forgets all but the last two."""
        name = checkpoint_name(trainer.steps_done)
        complete: dict[str, list[str]] = {}  # stage id -> names of the last checkpoints
        for index, stage in enumerate(self.stages):
            if not self.alive[index]:
                continue
            folder = self.job.home.checkpoints(stage.id)
            state = trainer.seed_state(index)
            manifest = {"of_stage": stage.id, "step": trainer.steps_done}
            ArtifactStore(folder).publish(
                name, functools.partial(ArtifactStore.save_state, state=state), manifest
            )
            self._set_status(index, "running", trainer.steps_done, None)
            found = checkpoint_steps(folder)
            kept = [step for step in found if step <= trainer.steps_done][-KEPT_CHECKPOINTS:]
            for step in set(found) - set(kept):  # older ones, and leftovers of another trial
                shutil.rmtree(folder / checkpoint_name(step), ignore_errors=True)
            complete[stage.id] = [checkpoint_name(step) for step in kept]
        self.hold.push_rows()  # first: whoever continues from a checkpoint needs the rows before it
        for stage_id, names in complete.items():
            self.hold.push_checkpoints(stage_id, names)

    def _finish(self, trainer: Trainer) -> str:
        for index, stage in enumerate(self.stages):
            if self.alive[index]:
                runs = list(self.runs[index].values())
                if not self.trained:
                    self._set_status(index, "running", trainer.steps_done, None)
                    run = runs[0].run_id if runs else None
                    self.hold.push_rows()
                    _publish(self.job, stage, trainer.seed_state(index), run, self.hold)
                self._set_status(index, "done", trainer.steps_done, None)
        outcome = "done" if any(self.alive) else "diverged"
        self.report(self._progress(trainer, 0.0, outcome))
        return outcome


class _Evaluation:
    """One evaluation protocol and its environments, kept between evaluations."""

    def __init__(
        self,
        protocol: EvaluationSpec,
        dataset: DatasetSpec,
        stages: tuple[Stage, ...],
        max_envs: int,
        compiled: bool,
    ) -> None:
        self.protocol = protocol
        self.every = protocol.every
        spec = environments.evaluation_environment(stages[0].dataset_id)
        if spec.simulator != protocol.simulator:
            raise ValueError(
                f"the trial was planned for {protocol.simulator!r} but this worker has "
                f"{spec.simulator!r}: returns differ between simulator versions. Install the "
                "planned version here, or plan again"
            )
        self.evaluator = Evaluator(
            spec.make, len(stages), protocol.episodes, max_envs, protocol.first_env_seed, compiled
        )
        environments.check_fit(self.evaluator.slots[0][0].env, dataset)

    def close(self) -> None:
        self.evaluator.close()


def _next_boundary(step: int, steps: int, intervals: list[int]) -> int:
    """The first step after `step` that is a multiple of an interval, or the end."""
    following = [(step // every + 1) * every for every in intervals if every > 0]
    return min([steps, *following])
