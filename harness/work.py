"""A share of a sweep in this process, without Ray and without writing to the database.

For schedulers that start many independent jobs (a Slurm array): every job works on its own trials
in the same home folder, or with the same storage. What they leave behind are spools and artifacts;
the sweep that is run last, by whomever, takes these rows into the database and finishes what a job
did not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from harness import storage
from harness.home import Home
from harness.job import Job, Progress
from harness.plan import Stack, is_done, make_plan, parted, unmeasured_stack
from harness.preflight import Probe, check, refuse
from harness.registry import Registry
from harness.spec import Experiment, TrialSpec
from harness.storage import StackBusyError
from harness.worker import run_stack
from results.store import Store

BUSY_WAIT_S = 5.0
"""Between looks at a stage that another job is making."""


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of an experiment.

    Raises:
        ValueError: unless 0 <= index < count.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index}/{self.count}; expected INDEX/COUNT with INDEX from 0 to "
                "COUNT - 1"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16` is the fourth of sixteen."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"shard {text!r}; expected INDEX/COUNT such as 0/16")
        return cls(int(index), int(count))

    def of(self, experiment: Experiment) -> Experiment:
        """The experiment with this share's trials only.

        Seeds that can train together stay together, up to `unmeasured_stack`, unless that makes
        fewer stacks than shares: then the largest are made smaller. The shares depend on the
        experiment alone, not on what is done already nor on this machine, so that jobs agree
        without talking.
        """
        most = unmeasured_stack(experiment.run)
        variants: dict[str, list[TrialSpec]] = {}
        for trial in experiment.trials:
            variants.setdefault(trial.variant_id, []).append(trial)
        parts = {name: -(-len(trials) // most) for name, trials in variants.items()}
        for _ in range(min(self.count, len(experiment.trials)) - sum(parts.values())):
            parts[max(parts, key=lambda name: len(variants[name]) / parts[name])] += 1
        groups = [g for name, trials in variants.items() for g in parted(trials, parts[name])]
        mine = [trial for group in groups[self.index :: self.count] for trial in group]
        return replace(experiment, trials=tuple(mine))


@dataclass(frozen=True)
class Done:
    """How a share ended, by stack."""

    stacks: int
    failed: dict[str, str]  # stage id -> why
    interrupted: bool


def work(
    experiment: Experiment,
    home: Home,
    store: Store | None,
    report: Callable[[Stack, Progress], None],
    ended: Callable[[Stack, str], None],
    stop_file: Path,
    registry: Registry | None = None,
    planned: Callable[[int], None] = lambda stacks: None,
) -> Done:
    """Runs what is left of an experiment, one stack after the other.

    Args:
        store: read to know what is done already; None if there is no database yet.
        report: told how a stack comes along.
        ended: told how a stack ended.
        stop_file: when it appears, the stack in progress writes a checkpoint and nothing more is
            started.
        planned: told how many stacks are left, before the first.
    """
    home = home.shared(experiment.run.storage)
    artifacts = storage.artifacts(home)
    probe = Probe(experiment.run, registry or Registry())
    plan = make_plan(
        experiment,
        store,
        artifacts,
        home.work,
        registry,
        sizes=probe.sizes,
        checkpoints=storage.checkpoint_steps(home),
    )
    refuse(check(plan, None, home, probe))
    planned(len(plan.stacks))
    ids = [trial.id for trial in experiment.trials]
    runs = store.statuses(ids) if store is not None else {}
    attempts = {trial_id: run.attempt for trial_id, run in runs.items()}
    finished: set[str] = set()
    failed: dict[str, str] = {}
    stacks = 0
    while ready := plan.ready(finished, failed=failed):
        busy = 0
        for stack in ready:
            if store is not None and plan.made_since(stack, artifacts) and is_done(stack, store):
                finished.update(stage.id for stage in stack.stages)
                ended(stack, "done by another process")
                continue
            waiting = plan.waiting_for(stack)
            job = Job(stack, experiment.run, home, attempts, stop_file, waiting)
            try:
                outcome = run_stack(job, functools.partial(report, stack))
            except StackBusyError:
                busy += 1
                continue
            except Exception as error:
                failed |= {stage.id: f"{type(error).__name__}: {error}" for stage in stack.stages}
                ended(stack, f"failed: {type(error).__name__}: {error}")
                continue
            if outcome == "interrupted":
                return Done(stacks, failed, interrupted=True)
            stacks += 1
            for stage in stack.stages:
                if artifacts.has(stage.id):
                    finished.add(stage.id)
                else:
                    failed[stage.id] = "diverged, or its environment failed: see its run"
            ended(stack, outcome)
        if busy == len(ready):  # others are at it: wait for what they make
            time.sleep(BUSY_WAIT_S)
        if stop_file.exists():
            return Done(stacks, failed, interrupted=True)
    return Done(stacks, failed, interrupted=False)
