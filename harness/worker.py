"""Runs one stack from its data to its artifacts: what happens inside a worker process.

Owns which of its stages are run, from where, and under which locks; `harness.training_run` trains.
Knows neither Ray nor the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from algorithms.api import Make
from algorithms.blocks.rng import Rng, Stream
from harness import storage
from harness.job import Job, Progress, Stopped
from harness.memory import forget_the_last_stack, keep_freed_memory
from harness.plan import Stage, resume_groups, usable_steps
from harness.registry import Registry
from harness.stages import declared_stage, last_runs, load_inputs, locked, publish, stack_dataset
from harness.storage import Hold
from harness.trainer import resolve_device
from harness.training_run import TrainingRun
from harness.watchdog import Watchdog
from results.records import FINISHED


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
    if job.should_stop:
        return "interrupted"  # it was waiting for resources when the user stopped the sweep
    forget_the_last_stack()
    keep_freed_memory()
    job = replace(job, home=job.home.on_this_node())
    hold = Hold(job.home, [stage.id for stage in job.stack.stages], job.sweep)
    with ExitStack() as locks:
        for stage in job.stack.stages:
            locks.enter_context(locked(job.home.stage(stage.id)))
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
            outcomes.append(TrainingRun(part, declared, report, trained, watchdog, hold).run())
            if outcomes[-1] == "interrupted":
                return "interrupted"
    return "diverged" if outcomes and set(outcomes) == {"diverged"} else "done"


def _parts(job: Job) -> Iterator[tuple[tuple[Stage, ...], int, bool]]:
    """Stages that continue together, the step they continue from, and whether they are trained."""
    left = [stage for stage in job.stack.stages if not _has_ended(job, stage)]
    trained = tuple(stage for stage in left if _is_trained(job, stage))
    if trained:
        yield trained, 0, True
    rest = [stage for stage in left if stage not in trained]
    steps, found = {}, storage.checkpoint_steps(job.home)
    for stage in rest:
        runs = {run.trial_id: run for run in last_runs(job, stage).values()}
        steps[stage.id] = usable_steps(stage, found(stage.id), runs)
    for step, ids in resume_groups(steps):
        yield tuple(stage for stage in rest if stage.id in ids), step, False


def _has_ended(job: Job, stage: Stage) -> bool:
    """Whether nothing is left to do for a stage.

    One that other stages need is published; the runs of a last one are done or diverged.
    """
    if not stage.trials:
        return storage.artifacts(job.home).has(stage.id)
    last = last_runs(job, stage)
    ended = [record for record in last.values() if record.status in FINISHED]
    return len(ended) == len(stage.trials)


def _is_trained(job: Job, stage: Stage) -> bool:
    """Whether only the final policy is left to evaluate.

    An artifact alone is not enough: a new trial may ask for evaluations along the way, and then
    the plan has it trained again.
    """
    if not storage.artifacts(job.home).has(stage.id):
        return False
    last = last_runs(job, stage)
    return job.stack.evaluate_only or (
        bool(last) and all(record.steps_done >= stage.steps for record in last.values())
    )


@dataclass
class MakeOutput:
    """Where a `Make` stage puts what it computed: `out.array(name, tensor led by K)`.

    It may call `out.progress(done, total)` on its way, and is stopped there if it has to be.
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
    """Computes a stage that trains nothing; where it is stopped, it begins anew the next time."""

    def report_or_stop(progress: Progress) -> None:
        report(progress)
        if job.should_stop or hold.asked_to_stop:
            raise Stopped

    device = resolve_device(job.run.device)
    first = job.stack.stages[0]
    report(Progress(0, 1, 0.0, phase="load"))
    dataset = stack_dataset(first, device)
    inputs = load_inputs(storage.artifacts(job.home), job.stack.stages, declared, device)
    seeds = torch.tensor(job.stack.seeds, dtype=torch.int64, device=device)
    rng = Rng(seeds, torch.zeros_like(seeds), Stream.MAKE)
    out = MakeOutput(len(job.stack.seeds), report_or_stop)
    try:
        with torch.no_grad():
            declared.function(declared.config, dataset, inputs, rng, out)
    except Stopped:
        report(Progress(0, 1, 0.0, phase="interrupted"))
        return "interrupted"
    for index, stage in enumerate(job.stack.stages):
        state = {name: values[index : index + 1].clone() for name, values in out.arrays.items()}
        publish(job, stage, state, None, hold)
    hold.push_rows()
    report(Progress(1, 1, 0.0, phase="done"))
    return "done"
