"""From trials to work: unique stages in dependency order, grouped into stacks.

Owns what is done, what is left and which seeds train together. Planning is a pure function of the
experiment, the database, the artifact store and the checkpoints on disk, so resuming a sweep is
planning it again. Starts nothing and imports no algorithm but to ask for its stages.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.spec import Experiment, RunOptions, TrialSpec
from harness.typed import config_from_dict, config_to_dict, content_hash
from results.records import FINISHED

if TYPE_CHECKING:
    from harness.artifacts import ArtifactStore
    from harness.registry import Registry

UNSIZED = 16
"""Seeds in a stack on a GPU where `run.max_stack: auto` cannot be decided from memory."""

StackSizes = Callable[[Mapping[str, Sequence["Stage"]], Mapping[str, "Stage"]], dict[str, int]]
"""From groups of stages that may be stacked, by name, and all stages by id: seeds in a stack."""


@dataclass(frozen=True)
class Stage:
    """One stage of one seed: a step of a trial that is cached under `id`.

    Attributes:
        config: the stage's own config, a dataclass; what is hashed.
        recipe_config: the whole algorithm's config, from which a worker rebuilds the stages.
        seed: None when all seeds share the stage.
        needs: name of a needed stage -> its id.
        need_configs: name of a needed stage -> its own config.
        trials: those for which this is the last stage.
    """

    id: str
    algorithm: str
    revision: int
    name: str
    kind: Literal["train", "make"]
    config: Any
    steps: int  # gradient steps; 0 for a make
    dataset_id: str
    dataset_digest: str
    data: Mapping[str, Any]
    seed: int | None
    needs: Mapping[str, str]
    precision: str = "float32"
    recipe_config: Any = None
    need_configs: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[TrialSpec, ...] = ()

    @property
    def per_seed(self) -> bool:
        return self.seed is not None

    def identity(self) -> dict[str, Any]:
        """Exactly what is hashed, as JSON values."""
        identity = {
            "algorithm": self.algorithm,
            "revision": self.revision,
            "name": self.name,
            "config": config_to_dict(self.config),
            "steps": self.steps,
            "dataset_id": self.dataset_id,
            "dataset_digest": self.dataset_digest,
            "data": dict(self.data),
            "needs": dict(self.needs),
            "precision": self.precision,
        }
        return identity if self.seed is None else {**identity, "seed": self.seed}

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Stack:
    """Stages that differ only in seed, run in one process.

    Attributes:
        resume_step: the checkpoint that all of them continue from; 0 is from the start.
        evaluate_only: the stages are trained already; only their final policies are evaluated.
        retrain: the stages are trained already, but their trials ask for evaluations before the
            last step, which only training again can give. The artifacts stay as they are.
    """

    stages: tuple[Stage, ...]
    resume_step: int = 0
    evaluate_only: bool = False
    retrain: bool = False

    @functools.cached_property
    def id(self) -> str:
        """A hash of the ids of its stages."""
        return content_hash([stage.id for stage in self.stages])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds in order; (0,) for a stage that all seeds share."""
        return tuple(0 if stage.seed is None else stage.seed for stage in self.stages)

    @property
    def needs(self) -> frozenset[str]:
        """Ids of the stages that must be finished before."""
        return frozenset(need for stage in self.stages for need in stage.needs.values())

    @property
    def seed_steps(self) -> int:
        """Gradient steps left, summed over seeds."""
        if self.evaluate_only:
            return 0
        return sum(max(0, stage.steps - self.resume_step) for stage in self.stages)

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Plan:
    """What an experiment still needs, and what it does not.

    Attributes:
        stages: every stage of every trial by id, needed ones first.
        cached: ids of stages whose artifact is there.
        statuses: trial id -> status of its latest run, for trials that have one.
        done: trials that are finished (`done` or `diverged`).
        stacks: what will run, in dependency order.
    """

    experiment: Experiment
    trials: tuple[TrialSpec, ...]
    stages: Mapping[str, Stage]
    cached: frozenset[str]
    statuses: Mapping[str, str]
    done: tuple[TrialSpec, ...]
    stacks: tuple[Stack, ...]

    @property
    def todo(self) -> tuple[TrialSpec, ...]:
        """Trials that are not finished, in the experiment's order."""
        finished = {trial.id for trial in self.done}
        return tuple(trial for trial in self.trials if trial.id not in finished)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers for a summary line."""
        return {
            "trials": len(self.trials),
            "trials_done": len(self.done),
            "trials_todo": len(self.trials) - len(self.done),
            "stages": len(self.stages),
            "stages_cached": len(self.cached),
            "stacks": len(self.stacks),
        }

    def ready(
        self,
        finished: Collection[str] = (),
        running: Collection[str] = (),
        failed: Collection[str] = (),
    ) -> tuple[Stack, ...]:
        """Stacks that can start now, in dependency order.

        A seed whose needs have failed leaves its stack; the other seeds go on without it.

        Args:
            finished: ids of stages whose artifacts appeared since planning.
            running: ids of stages (or stacks) that are in progress.
            failed: ids of stages that will not appear.
        """
        met = self.cached.union(finished)
        blocked = self.blocked(dict.fromkeys(failed, "failed"))
        taken = {*finished, *running, *failed}
        found = []
        for stack in self.stacks:
            if stack.id in taken or any(stage.id in taken for stage in stack.stages):
                continue
            stages = tuple(stage for stage in stack.stages if stage.id not in blocked)
            if stages and all(need in met for stage in stages for need in stage.needs.values()):
                found.append(stack if stages == stack.stages else replace(stack, stages=stages))
        return tuple(found)

    def blocked(self, failed: Mapping[str, str]) -> dict[str, str]:
        """Stages that cannot run any more: stage id -> why.

        Args:
            failed: id of a failed stage -> its error.
        """
        reasons: dict[str, str] = {}
        for stack in self.stacks:  # dependency order: what blocks comes before what is blocked
            for stage in stack.stages:
                for name, need in stage.needs.items():
                    if need in self.cached:
                        continue
                    if need in reasons:
                        reasons.setdefault(stage.id, reasons[need])
                    elif need in failed:
                        shared = need not in self.stages or self.stages[need].seed is None
                        seed = "" if shared else f" of seed {self.stages[need].seed}"
                        reason = f"needs stage {name!r}{seed}, which failed: {failed[need]}"
                        reasons.setdefault(stage.id, reason)
        return reasons

    def blocked_trials(self, failed: Mapping[str, str]) -> dict[str, str]:
        """Trials that cannot be finished because a stage before their last failed: id -> why."""
        reasons = self.blocked(failed)
        planned = {stage.id: stage for stack in self.stacks for stage in stack.stages}
        return {
            trial.id: reason
            for stage_id, reason in reasons.items()
            for trial in planned[stage_id].trials
        }

    @functools.cached_property
    def needed_by(self) -> dict[str, tuple[Stage, ...]]:
        """Stage id -> the planned last stages of trials that cannot be finished without it."""
        found: dict[str, dict[str, Stage]] = {}
        planned = [stage for stack in self.stacks for stage in stack.stages]
        for stage in reversed(planned):  # dependency order: what needs it was seen before
            ends = found.get(stage.id, {}) | ({stage.id: stage} if stage.trials else {})
            for need in stage.needs.values():
                found.setdefault(need, {}).update(ends)
        return {stage_id: tuple(ends.values()) for stage_id, ends in found.items()}

    def made_since(self, stack: Stack, artifacts: ArtifactStore) -> bool:
        """Whether all stages of a stack were made after planning, by whomever."""
        ids = (stage.id for stage in stack.stages)
        return all(stage_id not in self.cached and artifacts.has(stage_id) for stage_id in ids)

    def waiting_for(self, stack: Stack) -> dict[str, tuple[Stage, ...]]:
        """What `needed_by` says of the stages of one stack."""
        return {stage.id: self.needed_by.get(stage.id, ()) for stage in stack.stages}

    def seconds(self, rates: Mapping[str, float], concurrent: int = 1) -> float | None:
        """Estimated seconds of training left; None if an algorithm's rate is unknown.

        Args:
            rates: seed-steps per second of one stack, by algorithm.
            concurrent: stacks that run at once.
        """
        total = 0.0
        for stack in self.stacks:
            if not stack.seed_steps:
                continue
            rate = rates.get(stack.stages[0].algorithm, 0.0)
            if rate <= 0:
                return None
            total += stack.seed_steps / rate
        return total / max(1, min(concurrent, len(self.stacks)))

    def describe(
        self, rates: Mapping[str, float] | None = None, concurrent: int = 1
    ) -> dict[str, Any]:
        """The plan as JSON values, for `--dry-run`.

        Keys: `name`, `counts`, `settings` (one entry per label and dataset: where its
        hyperparameters come from and what was changed of them, how the dataset relates to the name
        asked for, how many trials are done), `stacks` (in the order they become ready), `seconds`
        (estimate, None if unknown).
        """
        rates = rates or {}
        finished = {trial.id for trial in self.done}
        settings = []
        for origin in self.experiment.origins:
            trials = [
                trial
                for trial in self.trials
                if trial.label == origin.label and trial.dataset_id == origin.dataset_id
            ]
            settings.append(
                {
                    "label": origin.label,
                    "algorithm": origin.algorithm,
                    "dataset_id": origin.dataset_id,
                    "requested": origin.requested,
                    "relation": origin.relation,
                    "note": origin.note,
                    "hparams": origin.hparams,
                    "changed": {who: dict(given) for who, given in origin.changed.items()},
                    "trials": len(trials),
                    "done": sum(trial.id in finished for trial in trials),
                }
            )
        return {
            "name": self.experiment.name,
            "counts": self.counts,
            "settings": settings,
            "stacks": [_describe_stack(stack, self.cached, rates) for stack in self.stacks],
            "seconds": self.seconds(rates, concurrent),
        }


def _describe_stack(
    stack: Stack, cached: Collection[str], rates: Mapping[str, float]
) -> dict[str, Any]:
    stage = stack.stages[0]
    rate = rates.get(stage.algorithm, 0.0)
    labels = {trial.label: None for item in stack.stages for trial in item.trials}
    return {
        "id": stack.id,
        "labels": list(labels),
        "algorithm": stage.algorithm,
        "stage": stage.name,
        "kind": stage.kind,
        "dataset_id": stage.dataset_id,
        "seeds": [item.seed for item in stack.stages if item.seed is not None],
        "steps": stage.steps,
        "resume_step": stack.resume_step,
        "evaluate_only": stack.evaluate_only,
        "retrain": stack.retrain,
        "waits_for": sorted(need for need in stack.needs if need not in cached),
        "seconds": stack.seed_steps / rate if rate > 0 else (None if stack.seed_steps else 0.0),
    }


# --------------------------------------------------------------------------------------- planning


def make_plan(
    experiment: Experiment,
    store: Any,
    artifacts: ArtifactStore,
    work: str | os.PathLike[str],
    registry: Registry | None = None,
    retry: Sequence[str] = ("failed",),
    sizes: StackSizes | None = None,
    checkpoints: Callable[[str], list[int]] | None = None,
) -> Plan:
    """What is left of an experiment.

    Args:
        store: what is asked for `statuses`: a results store, or an `Ingester`; None for nothing.
        artifacts: where finished stages are.
        work: the folder whose `<stage_id>/checkpoints/<step>/` are looked at for resuming.
        retry: statuses to run again. Unfinished trials always are; add "diverged" (or "done") to
            repeat results.
        sizes: how `run.max_stack: auto` is decided; without it, by `unmeasured_stack`.
        checkpoints: steps of a stage's checkpoints by its id, where they are not below `work`.

    Raises:
        ValueError: if a trial's revision or config does not fit the installed algorithm.
    """
    if registry is None:
        from harness.registry import Registry

        registry = Registry()
    trials = experiment.trials
    runs = store.statuses([trial.id for trial in trials]) if store is not None and trials else {}
    statuses = {trial_id: run.status for trial_id, run in runs.items()}
    done = tuple(
        trial
        for trial in trials
        if statuses.get(trial.id) in FINISHED and statuses[trial.id] not in retry
    )
    stages, last = unique_stages(trials, registry)
    cached = artifacts.present(stages)
    finished = {trial.id for trial in done}
    todo: dict[str, list[TrialSpec]] = {}
    for trial in trials:
        if trial.id not in finished:
            todo.setdefault(last[trial.id], []).append(trial)
    wanted = _wanted(stages, cached, todo)
    evaluate_only = {
        stage_id
        for stage_id in todo
        if stage_id in cached
        and all(_only_final(t, stages[stage_id], runs) for t in todo[stage_id])
    }
    families = _families(stages)
    groups: dict[str, list[Stage]] = {}
    for stage_id in wanted:  # in dependency order
        stage = replace(stages[stage_id], trials=tuple(todo.get(stage_id, ())))
        kind = (stage_id in cached, stage_id in evaluate_only)
        groups.setdefault(_group(stage, families[stage_id], kind), []).append(stage)
    stacks: list[Stack] = []
    most = _stack_sizes(experiment.run, groups, stages, sizes)
    for name, group in groups.items():
        only = group[0].id in evaluate_only
        again = group[0].id in cached and not only
        steps: dict[str, list[int]] = {stage.id: [] for stage in group}
        if not only:
            for stage in group:
                folder = Path(work) / stage.id / "checkpoints"
                found = checkpoints(stage.id) if checkpoints else checkpoint_steps(folder)
                steps[stage.id] = usable_steps(stage, found, runs)
        stacks += [
            Stack(part, step, only, again) for part, step in _split(group, steps, most[name])
        ]
    return Plan(experiment, trials, stages, cached, statuses, done, tuple(stacks))


def unique_stages(
    trials: Iterable[TrialSpec], registry: Registry
) -> tuple[dict[str, Stage], dict[str, str]]:
    """All stages by id, needed ones first, and the id of each trial's last stage."""
    from algorithms.api import Train
    from harness.registry import stages_of

    declared: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    stages: dict[str, Stage] = {}
    last: dict[str, str] = {}
    for trial in trials:
        recipe = registry.get(trial.algorithm)
        if recipe.revision != trial.revision:
            raise ValueError(
                f"trial {trial.id[:12]} is of {trial.algorithm} revision {trial.revision}, but "
                f"revision {recipe.revision} is installed; load the experiment again"
            )
        key = content_hash([trial.algorithm, trial.config])
        if key not in declared:
            config = config_from_dict(recipe.config, trial.config, f"config of {trial.algorithm}")
            declared[key] = config, stages_of(recipe, config)
        config, parts = declared[key]
        own: dict[str, Stage] = {}
        for part in parts:
            owner = part.recipe or recipe  # a borrowed stage is the one of its owner's own trials
            stage = Stage(
                id="",
                algorithm=owner.name,
                revision=owner.revision,
                name=part.name,
                kind="train" if isinstance(part, Train) else "make",
                config=part.config,
                steps=part.steps if isinstance(part, Train) else 0,
                dataset_id=trial.dataset_id,
                dataset_digest=trial.dataset_digest,
                data=trial.data,
                seed=trial.seed if part.per_seed else None,
                needs={need: own[need].id for need in part.needs},
                precision=trial.precision,
                recipe_config=config if part.recipe is None else part.recipe_config,
                need_configs={need: own[need].config for need in part.needs},
            )
            own[part.name] = stage = replace(stage, id=content_hash(stage.identity()))
            stages.setdefault(stage.id, stage)
        last[trial.id] = stage.id
        known = stages[stage.id]
        stages[stage.id] = replace(known, trials=(*known.trials, trial))
    return stages, last


def _stack_sizes(
    run: RunOptions,
    groups: Mapping[str, Sequence[Stage]],
    stages: Mapping[str, Stage],
    sizes: StackSizes | None,
) -> dict[str, int]:
    """The most seeds in a stack, for each group."""
    if run.max_stack == "auto" and sizes is not None:
        return sizes(groups, stages)
    return dict.fromkeys(groups, unmeasured_stack(run))


def unmeasured_stack(run: RunOptions) -> int:
    """Most seeds in a stack, as `run.max_stack` says without looking at stages or the machine.

    For auto it is one on a CPU, where compiled steps are fastest so, and `UNSIZED` on a GPU.
    """
    if isinstance(run.max_stack, int):
        return run.max_stack
    return UNSIZED if run.on_gpu() else 1


def _wanted(stages: Mapping[str, Stage], cached: Collection[str], todo: Iterable[str]) -> list[str]:
    """Ids of the stages to run: the last ones of unfinished trials and what these lack."""
    wanted: set[str] = set()
    waiting = list(todo)
    while waiting:
        stage_id = waiting.pop()
        if stage_id not in wanted:
            wanted.add(stage_id)
            waiting += [need for need in stages[stage_id].needs.values() if need not in cached]
    return [stage_id for stage_id in _by_depth(stages) if stage_id in wanted]


def _by_depth(stages: Mapping[str, Stage]) -> list[str]:
    """Ids ordered so that what needs nothing comes first; otherwise as given."""
    depth: dict[str, int] = {}
    for stage_id, stage in stages.items():  # needed ones come first in `stages`
        depth[stage_id] = 1 + max((depth[need] for need in stage.needs.values()), default=-1)
    return sorted(stages, key=depth.__getitem__)


def _only_final(trial: TrialSpec, stage: Stage, runs: Mapping[str, Any]) -> bool:
    """Whether evaluating the final policy is all that a trained trial lacks.

    True if its protocol has no evaluation before the last step, or its own run came to the last
    step (it was killed after publishing the artifact; the earlier evaluations are in that run).
    Otherwise the curve can only come from training again.
    """
    if trial.evaluation.every >= stage.steps:
        return True
    run = runs.get(trial.id)
    return run is not None and run.status not in FINISHED and run.steps_done >= stage.steps


def _families(stages: Mapping[str, Stage]) -> dict[str, str]:
    """Stage id -> hash of what it shares with the same stage of other seeds."""
    families: dict[str, str] = {}
    for stage_id, stage in stages.items():
        identity = {name: value for name, value in stage.identity().items() if name != "seed"}
        identity["needs"] = {name: families[need] for name, need in stage.needs.items()}
        families[stage_id] = content_hash([identity, stage.per_seed])
    return families


def _group(stage: Stage, family: str, kind: tuple[bool, ...]) -> str:
    """The key of stages that may be stacked: one family of seeds, one set of evaluations."""
    if not stage.per_seed:
        return stage.id
    evaluations = [config_to_dict(trial.evaluation) for trial in stage.trials]
    return content_hash([family, evaluations, kind])


def _split(
    group: Sequence[Stage], steps: Mapping[str, Sequence[int]], most: int
) -> Iterator[tuple[tuple[Stage, ...], int]]:
    """Parts of a group that can run as one stack, each with the step it continues from."""
    by_id = {stage.id: stage for stage in group}
    for step, ids in resume_groups(steps):
        for part in balanced(ids, most):
            yield tuple(by_id[stage_id] for stage_id in part), step


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint; sorts as the steps do."""
    return f"{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints (those with a manifest) in a folder, ascending."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [int(name) for name in names if name.isascii() and name.isdigit()]
    return sorted(
        step
        for step in steps
        if step and (folder / checkpoint_name(step) / "manifest.json").is_file()
    )


def usable_steps(stage: Stage, steps: Iterable[int], runs: Mapping[str, Any]) -> list[int]:
    """Those checkpoints of a stage from which its trials lose no evaluation.

    A checkpoint may have been left by another trial of the same stage, with another evaluation
    protocol. A trial can continue from it if its own unfinished run has come as far, or if its
    protocol has no evaluation up to there. A finished trial that is repeated starts from 0.

    Args:
        steps: of the stage's checkpoints.
        runs: trial id -> its latest RunRecord.
    """

    def covered(trial: TrialSpec, step: int) -> bool:
        run = runs.get(trial.id)
        if run is not None and run.status in FINISHED:
            return False
        return trial.evaluation.every > step or (run is not None and run.steps_done >= step)

    return [step for step in steps if all(covered(trial, step) for trial in stage.trials)]


def resume_groups(steps: Mapping[str, Sequence[int]]) -> list[tuple[int, list[str]]]:
    """Which seeds can continue together, and from which step.

    The step that most of them have (the later one of equals) makes a group, then the same again
    for the rest, so seeds that share any step resume at the largest one they all share. Seeds
    without a checkpoint start from 0 together.

    Args:
        steps: stage id -> steps of its checkpoints.

    Returns:
        (step, stage ids in the order given); the group from 0, if any, comes last.
    """
    left = [stage_id for stage_id in steps if steps[stage_id]]
    groups: list[tuple[int, list[str]]] = []
    while left:
        holders = Counter(step for stage_id in left for step in set(steps[stage_id]))
        step = max(holders, key=lambda candidate: (holders[candidate], candidate))
        groups.append((step, [stage_id for stage_id in left if step in steps[stage_id]]))
        left = [stage_id for stage_id in left if step not in steps[stage_id]]
    fresh = [stage_id for stage_id in steps if not steps[stage_id]]
    return [*groups, (0, fresh)] if fresh else groups


def balanced(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """`items` in order, in the fewest parts of at most `most`, sizes differing by at most one."""
    return parted(items, -(-len(items) // most))


def parted(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """`items` in order, in so many parts, sizes differing by at most one."""
    size, larger = divmod(len(items), parts) if parts else (0, 0)
    found, start = [], 0
    for index in range(parts):
        end = start + size + (index < larger)
        found.append(items[start:end])
        start = end
    return found


def is_done(stack: Stack, store: Any) -> bool:
    """Whether the database has the end of all trials that end with a stack; not if none does."""
    ids = [trial.id for stage in stack.stages for trial in stage.trials]
    runs = store.statuses(ids) if ids else {}
    return bool(ids) and all(i in runs and runs[i].status == "done" for i in ids)


def measured_rates(store: Any, device: str | None = None) -> dict[str, float]:
    """Seed-steps per second of one stack by algorithm: medians over finished runs in the store.

    A stack of K seeds that did N steps in T seconds of training counts as K N / T.

    Args:
        device: only runs on this device ("cpu"); None for all.
    """
    runs, trials = store.runs(), store.trials()
    if runs.empty or trials.empty:
        return {}
    algorithm = dict(zip(trials["trial_id"], trials["algorithm"], strict=True))
    rates: dict[str, list[float]] = {}
    for run in runs.itertuples(index=False):
        seconds = (run.timings or {}).get("train", 0.0)
        matches = device is None or str(run.device) == device
        if run.status == "done" and matches and seconds > 0 and run.steps_done > 0:
            rate = run.steps_done * max(1, len(run.stack)) / seconds
            rates.setdefault(algorithm[run.trial_id], []).append(rate)
    return {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
