"""The training of one stack, boundary by boundary: rows, evaluations, checkpoints, artifacts.

Owns the order in which things reach the disk. At a boundary (end of a chunk): metrics, then
evaluations, are spooled; then the checkpoint is published; at the end the artifact is published
before the run is called done. A kill at any point therefore loses at most the steps since the
last checkpoint, and replayed rows carry the same keys. Where homes are not shared the same order
holds for what is pushed to the storage.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from algorithms.api import DatasetSpec, Train
from harness import environments, provenance, storage
from harness.artifacts import ArtifactStore
from harness.evaluate import EvaluationError, Evaluator
from harness.failures import with_end
from harness.job import Job, Progress, Stopped, run_id
from harness.plan import Stage, checkpoint_name, checkpoint_steps
from harness.spec import EvaluationSpec
from harness.spool import Spool, read
from harness.stages import last_runs, locked, new_trainer, publish, stack_dataset
from harness.storage import ROWS_EVERY_S, Hold, StackBusyError, StorageError
from harness.trainer import (
    STOP_CHECK_S,
    Divergence,
    Trainer,
    check_precision,
    resolve_compile,
    resolve_cuda_graphs,
    resolve_device,
)
from harness.watchdog import Watchdog
from results.records import EvalRecord, MetricRecord, RunRecord

KEPT_CHECKPOINTS = 2


class TrainingRun:
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
            earlier = last_runs(self.job, stage)
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
        dataset = stack_dataset(self.stages[0], self.device)
        trainer = new_trainer(
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
        except Stopped:
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
        return self.job.should_stop or self.hold.asked_to_stop

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
            with contextlib.suppress(StackBusyError), locked(home.stage(last.id)), hold:
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
                raise Stopped

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
                    publish(self.job, stage, trainer.seed_state(index), run, self.hold)
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
