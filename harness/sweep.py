"""The driver: plan, run stacks, take in what they leave, plan again.

Owns what runs next and what is reported at the end. Resuming is planning again: the to-do list is
what the database and the artifact store lack. Does not import ray.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from harness import storage, watchdog
from harness.display import Display
from harness.failures import EngineError, classify, kernel_oom_kills, telling_line, with_end
from harness.home import Home
from harness.ingest import Ingester
from harness.job import Job, Progress
from harness.plan import Plan, Stack, Stage, balanced, is_done, make_plan
from harness.plan_text import seed_ranges
from harness.preflight import Probe, check, refuse
from harness.provenance import utc_now
from harness.registry import Registry
from harness.spec import Experiment, TrialSpec
from harness.spool import Spool, SpoolError, read
from harness.storage import Hold, StackBusyError, StorageError
from results.records import RunRecord
from results.store import Store

BUSY_RETRY_S = 30.0
"""Until a stack that another driver was found to train is looked at again."""
INGEST_EVERY_S = 10.0
"""Between two looks at the spool of a stack in progress: with hundreds of stacks that each report
twice a second the driver would do nothing else."""
INGEST_SHARED_EVERY_S = 60.0
"""The same for a storage, where every look is a request over the network."""

RunQueue = Callable[["Queue", Callable[[], None]], None]
"""What runs a queue to its end; `harness.tune.run_queue` outside tests of the planning alone."""


@dataclass(frozen=True)
class Summary:
    """How a sweep ended, by trial."""

    statuses: dict[str, str]  # trial id -> status; "pending" if it never ran
    errors: dict[str, str]  # trial id -> why, for failed and diverged ones
    trained: int  # stacks run by this call
    seconds: float
    interrupted: bool = False
    damaged: tuple[str, ...] = ()  # rows of whatever stages that cannot be read, and what to do

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(self.statuses.values()))

    @property
    def ok(self) -> bool:
        """Whether every trial is done."""
        return set(self.statuses.values()) <= {"done"}


@dataclass
class Queue:
    """Hands out stacks whose needs are met; implements `harness.tune.WorkQueue`.

    A stack that failed is handed out again: with half of its seeds if it ran out of memory, else as
    it was, `run.max_failures` times.
    """

    plan: Plan
    experiment: Experiment
    home: Home
    display: Display
    ingester: Ingester
    stop_file: Path
    attempts: dict[str, int]
    running: dict[str, Stack] = field(default_factory=dict)
    finished_stages: set[str] = field(default_factory=set)
    failed_stages: dict[str, str] = field(default_factory=dict)  # id -> why
    busy_until: dict[str, float] = field(default_factory=dict)  # stack id -> when to look again
    ingest_at: dict[str, float] = field(default_factory=dict)  # stack id -> when to ingest again
    crashes: dict[str, int] = field(default_factory=dict)  # stage id -> how often
    limits: dict[str, int] = field(default_factory=dict)  # stage id -> most seeds with it
    most_running: int = 0  # 0 is any number
    completed_stacks: int = 0

    def __post_init__(self) -> None:
        self._oom_kills = kernel_oom_kills()

    def next(self) -> Job | None:
        full = self.most_running and len(self.running) >= self.most_running
        if self.stop_file.exists() or full:
            return None
        now = time.monotonic()
        for stack in self._ready():
            if self.busy_until.get(stack.id, 0.0) > now:
                continue
            if self._done_elsewhere(stack):
                self.finished_stages.update(stage.id for stage in stack.stages)
                self.display.end(stack.id, f"{title(stack)}: done by the other sweep")
                continue
            self.running[stack.id] = stack
            return Job(
                stack,
                self.experiment.run,
                self.home,
                self.attempts,
                self.stop_file,
                self.plan.waiting_for(stack),
            )
        return None

    def _done_elsewhere(self, stack: Stack) -> bool:
        """Whether another sweep has finished a stack since it was planned.

        Its rows are in the database or in the spool: a driver takes them in before it cleans up.
        """
        artifacts = storage.artifacts(self.home)
        if stack.id not in self.busy_until and not self.plan.made_since(stack, artifacts):
            return False
        for stage in stack.stages:
            self.ingester.stage(stage.id)
        return is_done(stack, self.ingester.store)

    def exhausted(self) -> bool:
        """No stack is running and none can become ready."""
        return not self.running and (self.stop_file.exists() or not self._ready())

    def _ready(self) -> tuple[Stack, ...]:
        in_flight = {stage.id for stack in self.running.values() for stage in stack.stages}
        return self.plan.ready(self.finished_stages, in_flight, self.failed_stages)

    def progressed(self, job: Job, progress: Progress) -> None:
        self.display.update(job.stack.id, title(job.stack), len(job.stack.seeds), progress)
        now = time.monotonic()
        if now >= self.ingest_at.get(job.stack.id, 0.0):
            every = INGEST_SHARED_EVERY_S if self.home.storage else INGEST_EVERY_S
            self.ingest_at[job.stack.id] = now + every
            try:
                for stage in job.stack.stages:
                    self.ingester.stage(stage.id)
            except StorageError as error:  # the stack's end asks again, and then it counts
                self.display.line(Text.assemble(("rows are late", "yellow"), f": {error}"))

    def completed(self, job: Job, outcome: str, error: str = "") -> None:
        stack = self.running.pop(job.stack.id)
        if outcome == "busy":
            if stack.id not in self.busy_until:
                self.display.line(f"{title(stack)}: another sweep is at it; waiting for its end")
            self.busy_until[stack.id] = time.monotonic() + BUSY_RETRY_S
            return
        self.completed_stacks += 1
        done, artifacts = [], storage.artifacts(self.home)
        bad: dict[str, list[int | None]] = {}  # failed or diverged -> seeds
        for stage in stack.stages:
            if outcome == "failed":
                self._record_failure(stage.id, error, "error")
            self.ingester.stage(stage.id)
            if artifacts.has(stage.id):
                self.finished_stages.add(stage.id)
                done.append(stage)
            elif outcome != "interrupted":
                how, why = self._end_of(stage)
                self.failed_stages[stage.id] = error or why
                bad.setdefault(how, []).append(stage.seed)
        text = Text(f"{title(stack)}: {outcome}")
        if outcome == "failed":
            text.stylize("red")
            text += f" {error}"
        elif bad and done:
            text += ", but " + " and ".join(f"seeds {seeds} {how}" for how, seeds in bad.items())
        self.display.end(stack.id, text)
        # What belongs to other experiments waits for their sweeps.
        clean_up(self.home, (stage.id for stage in done if self.ingester.has_all(stage.id)))

    def _end_of(self, stage: Stage) -> tuple[str, str]:
        """How a stage of a stack that went on ended without an artifact, and why.

        One whose policy is not evaluated has no run, and can only diverge.
        """
        runs = self.ingester.store.statuses([trial.id for trial in stage.trials])
        errors = [run.error or "" for run in runs.values() if run.status == "failed"]
        return ("failed", telling_line(errors[0])) if errors else ("diverged", "diverged")

    def failed(self, job: Job, error: str) -> None:
        stack = self.running.pop(job.stack.id)
        self.completed_stacks += 1
        stale = watchdog.report(self.home.stale(stack.stages[0].id), job.run.stale_after_s)
        error = stale or error
        kills, self._oom_kills = self._oom_kills, kernel_oom_kills()
        kind = classify(error, bool(stale), self._oom_kills - kills)
        reason = error.strip().splitlines()[-1] if error.strip() else "unknown"
        again = self._again(stack, kind)
        for stage in stack.stages:
            if not again:
                tries = f" ({kind}, tried {self.crashes[stage.id]} times)"
                self.failed_stages[stage.id] = reason + tries * (self.crashes[stage.id] > 1)
            self._record_failure(stage.id, error, kind)
            self.ingester.stage(stage.id)
        if again:
            what = (f"{title(stack)}: {kind}", "yellow")
            self.display.line(Text.assemble(what, f" {reason}; {again}"))
        else:
            what = (f"{title(stack)}: failed", "red")
            self.display.end(stack.id, Text.assemble(what, f" {reason}"))

    def _again(self, stack: Stack, kind: str) -> str:
        """How a stack that failed is tried again; "" if it is not."""
        if kind == "out of memory" and len(stack.stages) > 1:
            half = -(-len(stack.stages) // 2)
            self.limits |= dict.fromkeys((stage.id for stage in stack.stages), half)
            self._split()
            return f"again with {half} seed{'s' * (half > 1)} at a time"
        for stage in stack.stages:
            self.crashes[stage.id] = self.crashes.get(stage.id, 0) + 1
        tried, most = (
            max(self.crashes[s.id] for s in stack.stages),
            self.experiment.run.max_failures,
        )
        return f"again ({tried} of {most})" if tried <= most else ""

    def _split(self) -> None:
        before = len(self.plan.stacks)
        self.plan = cut(self.plan, self.limits)
        self.display.total += len(self.plan.stacks) - before

    def engine_died(self, error: str) -> None:
        """Takes back the stacks that were running when the engine ended.

        Whose fault it was is not known. So a death counts against a stack only if it ran alone;
        otherwise, if it was for memory, stacks are halved, and fewer run at once.
        """
        kills, self._oom_kills = self._oom_kills, kernel_oom_kills()
        kind = classify(error, oom_kills=self._oom_kills - kills)
        kind = "killed" if kind == "error" else kind
        stacks = list(self.running.values())
        self.running.clear()
        for stack in stacks:
            alone = len(stacks) == 1
            halved = kind == "out of memory" and len(stack.stages) > 1
            again = self._again(stack, kind) if alone or halved else "again with fewer at once"
            for stage in stack.stages:
                if not again:
                    self.failed_stages[stage.id] = f"{kind}: {error}"
                self._record_failure(stage.id, error, kind)
                self.ingester.stage(stage.id)
            what = (f"{title(stack)}: {kind}", "yellow")
            self.display.line(Text.assemble(what, f"; {again or 'given up'}"))
        self.most_running = max(1, len(stacks) // 2)

    def _record_failure(self, stage_id: str, error: str, kind: str) -> None:
        """A worker that was killed could not say so itself: mark its last runs as failed."""
        hold = Hold(self.home, [stage_id], self.stop_file.name)
        with contextlib.suppress(StackBusyError), hold:  # or another sweep has gone on with it
            self._append_failure(stage_id, error, kind)
            hold.push_rows()
            hold.forget()

    def _append_failure(self, stage_id: str, error: str, kind: str) -> None:
        last: dict[str, RunRecord] = {}
        path = self.home.spool(stage_id)
        with contextlib.suppress(SpoolError):  # the damage is why it failed, and is told
            for record in read(path) if path.exists() else ():
                if isinstance(record, RunRecord):
                    last[record.run_id] = record
        with Spool(path) as spool:
            spool.append(
                [
                    with_end(
                        replace(
                            record,
                            status="failed",
                            ended_at=utc_now(),
                            error=record.error or error,
                        ),
                        kind,
                    )
                    for record in last.values()
                    if record.status in ("running", "failed")
                ]
            )


def cut(plan: Plan, limits: Mapping[str, int], failed: Collection[str] = ()) -> Plan:
    """The plan without failed stages, its stacks cut where they hold more than their limits.

    Args:
        limits: stage id -> most seeds of a stack that it is in.
    """
    stacks: list[Stack] = []
    for stack in plan.stacks:
        stages = tuple(stage for stage in stack.stages if stage.id not in failed)
        most = min((limits.get(stage.id, len(stages)) for stage in stages), default=1)
        stacks += [replace(stack, stages=tuple(part)) for part in balanced(stages, most)]
    return replace(plan, stacks=tuple(stacks))


def title(stack: Stack) -> str:
    """What a person reads: `diffusion_ql generated/bandit2d-v0 seeds 0-2`."""
    stage = stack.stages[0]
    labels = sorted({trial.label for item in stack.stages for trial in item.trials})
    name = ",".join(labels) if labels else f"{stage.algorithm}:{stage.name}"
    seeds = seed_ranges(item.seed for item in stack.stages if item.seed is not None)
    return f"{name} {stage.dataset_id} seeds {seeds}"


def clean_up(home: Home, stage_ids: Iterable[str]) -> None:
    """Removes the work folders of published stages whose rows are all in the database."""
    for stage_id in stage_ids:
        storage.forget(home, stage_id)


def plan_sweep(
    experiment: Experiment,
    store: Store,
    home: Home,
    registry: Registry | None = None,
    retry: tuple[str, ...] = ("failed",),
    register: bool = True,
    probe: Probe | None = None,
) -> Plan:
    """What is left to do, after taking in what earlier drivers left unread.

    Args:
        register: put the trials and their datasets into the database; not for a dry run, and
            not again once it was done.
        probe: what decides `run.max_stack: auto`, and what `preflight.check` goes on with.
    """
    home = home.shared(experiment.run.storage)
    ingester = Ingester(store, home)
    probe = probe or Probe(experiment.run, registry or Registry())
    intact = probe.verify(trial.dataset_id for trial in experiment.trials)
    if register and intact:  # else `preflight.check` tells, with whatever else is wrong
        ingester.register(experiment.trials)
    ingester.leftovers()
    probe.damaged = ingester.damaged
    return make_plan(
        experiment,
        ingester,
        storage.artifacts(home),
        home.work,
        registry,
        retry,
        probe.sizes,
        storage.checkpoint_steps(home),
    )


def run_sweep(
    experiment: Experiment,
    store: Store,
    home: Home,
    display_factory: Callable[[int], Display],
    run_queue: RunQueue,
    registry: Registry | None = None,
    retry: tuple[str, ...] = ("failed",),
    plan: Plan | None = None,
    probe: Probe | None = None,
) -> Summary:
    """Runs what is left of an experiment.

    What ends before its queue does (Ray's memory monitor ends a whole `Tuner.fit`) is followed by
    another wave, until every trial is done or was tried too often: see `Queue`.

    Args:
        display_factory: makes a display for a number of stacks.
        run_queue: runs a queue until it is exhausted.
        retry: statuses besides unfinished ones that are run again.
        plan, probe: of `plan_sweep` for the same experiment and `retry`, if the caller made it
            already.
    Raises:
        PreflightError: if the sweep would fail; nothing was started.
    """
    started = time.monotonic()
    home = home.shared(experiment.run.storage)
    stop_file = home.stop_file()
    home.work.mkdir(parents=True, exist_ok=True)
    trained, interrupted = 0, False
    given_up: dict[str, str] = {}
    blocked: dict[str, str] = {}
    crashes: dict[str, int] = {}
    limits: dict[str, int] = {}
    most_running = 0
    probe = probe or Probe(experiment.run, registry or Registry())
    plan = plan or plan_sweep(experiment, store, home, registry, retry, probe=probe)
    refuse(check(plan, store, home, probe))
    attempts = prepare_attempts(experiment.trials, store, home, plan, retry)
    try:
        while True:
            whole, plan = plan, cut(plan, limits, given_up)
            if not plan.ready(failed=given_up):
                break
            with display_factory(len(plan.stacks)) as display:
                queue = Queue(
                    plan=plan,
                    experiment=experiment,
                    home=home,
                    display=display,
                    ingester=Ingester(store, home),
                    stop_file=stop_file,
                    attempts=attempts,
                    failed_stages=dict(given_up),
                    crashes=crashes,
                    limits=limits,
                    most_running=most_running,
                )

                def on_interrupt(display: Display = display) -> None:
                    stop_file.touch()
                    storage.ask_to_stop(home, stop_file.name)
                    display.line(
                        Text.assemble(
                            ("stopping", "yellow"),
                            ": each stack writes a checkpoint where it is. Ctrl-C again stops now "
                            "(back to the last checkpoint)",
                        )
                    )

                died = _run(run_queue, queue, on_interrupt)
            trained += queue.completed_stacks
            given_up |= queue.failed_stages
            blocked |= whole.blocked_trials(given_up) | failed_trials(whole, given_up)
            if stop_file.exists():
                interrupted = True
                break
            if not (queue.completed_stacks or died):
                break
            # After progress all may run at once again: a death now and then costs little.
            most_running = 0 if queue.completed_stacks else queue.most_running
            # Diverged seeds are results: from here on only what never ended is planned again.
            plan = plan_sweep(experiment, store, home, registry, ("failed",), False, probe)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if stop_file.exists():
            storage.was_stopped(home, stop_file.name)
        stop_file.unlink(missing_ok=True)
        ingester = Ingester(store, home)
        ingester.leftovers()
    seconds, damaged = time.monotonic() - started, tuple(ingester.damaged.values())
    return _summary(experiment, store, trained, seconds, interrupted, blocked, damaged)


def failed_trials(plan: Plan, failed: Mapping[str, str]) -> dict[str, str]:
    """Trials whose last stage failed: id -> why."""
    stages = {stage.id: stage for stack in plan.stacks for stage in stack.stages}
    return {
        trial.id: reason
        for stage_id, reason in failed.items()
        if stage_id in stages
        for trial in stages[stage_id].trials
    }


def _run(run_queue: RunQueue, queue: Queue, on_interrupt: Callable[[], None]) -> bool:
    """Runs a queue; whether its engine died with stacks that were running.

    Raises:
        EngineError: if it died before it ran anything, which another try would not change.
    """
    try:
        run_queue(queue, on_interrupt)
    except EngineError as error:
        if not queue.running:
            raise
        queue.engine_died(str(error))
        return True
    return False


def prepare_attempts(
    trials: Iterable[TrialSpec], store: Store, home: Home, plan: Plan, retry: tuple[str, ...]
) -> dict[str, int]:
    """The attempt each trial's rows belong to.

    What was not finished continues its run. A diverged trial that is to be retried starts a new
    attempt from step 0, so its old checkpoints and rows are set aside, and the checkpoints of
    stages that it needs and that were not finished: one of those may be what diverged.
    """
    statuses = store.statuses([trial.id for trial in trials])
    attempts = {trial_id: run.attempt for trial_id, run in statuses.items()}
    if "diverged" not in retry:
        return attempts
    diverged = {trial_id for trial_id, run in statuses.items() if run.status == "diverged"}
    for stage in (stage for stack in plan.stacks for stage in stack.stages):
        for trial in stage.trials:
            attempts[trial.id] = attempts.get(trial.id, 1) + (trial.id in diverged)
        ends = (stage, *plan.needed_by.get(stage.id, ()))
        if any(trial.id in diverged for end in ends for trial in end.trials):
            kept = storage.checkpoints(home, stage.id)
            for name in kept.ids():
                kept.remove(name)
            shutil.rmtree(home.checkpoints(stage.id), ignore_errors=True)
    return attempts


def _summary(
    experiment: Experiment,
    store: Store,
    trained: int,
    seconds: float,
    interrupted: bool,
    blocked: dict[str, str],
    damaged: tuple[str, ...],
) -> Summary:
    ids = [trial.id for trial in experiment.trials]
    runs = store.statuses(ids)
    return Summary(
        statuses={i: runs[i].status if i in runs else "pending" for i in ids},
        errors=blocked | {i: run.error for i, run in runs.items() if run.error},
        trained=trained,
        seconds=seconds,
        interrupted=interrupted,
        damaged=damaged,
    )
