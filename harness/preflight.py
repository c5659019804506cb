"""What would make a sweep fail later, tried before anything is scheduled, and told all at once.

Each dataset is read and compared with its record, each environment is stepped, each learner does
one gradient step and acts once, the database is written to, and disk and memory are compared with
what the stages need. Machine checks that `harness doctor` shows as well live here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from algorithms.api import Recipe, StageInput, Train
from algorithms.blocks.rng import RowRng, Stream
from harness import datasets, environments
from harness.home import Home
from harness.memory import GIB, Capacity, Cost, available_bytes, peak_bytes, stack_size
from harness.plan import Plan, Stack, Stage
from harness.registry import Registry
from harness.spec import RunOptions
from harness.stages import data_key, declared_stage, load_dataset
from harness.storage import Storage, StorageError
from harness.trainer import Trainer, check_precision, resolve_compile
from harness.training_run import KEPT_CHECKPOINTS
from harness.typed import config_to_dict, content_hash
from results.store import Store

LOW_DISK_BYTES = 2 * GIB
LOW_MEMORY_BYTES = 2 * GIB
ROWS_BYTES = 2 << 20  # spooled rows of one trial, and their share of the database: generous


@dataclass(frozen=True)
class Check:
    """One line of a report: what was looked at, how it is, what to do if it is bad."""

    name: str
    state: Literal["ok", "note", "bad"]
    text: str


class PreflightError(RuntimeError):
    """The sweep would fail; one line for each reason."""


def refuse(checks: Iterable[Check]) -> None:
    """Raises PreflightError if any check is bad, naming all of them."""
    bad = [check for check in checks if check.state == "bad"]
    if bad:
        lines = "\n".join(f"  {check.name}: {check.text}" for check in bad)
        many = f"{len(bad)} problems" if len(bad) > 1 else "a problem"
        raise PreflightError(f"nothing was started, because of {many}:\n{lines}")


# ------------------------------------------------------------------------------------ the trials


@dataclass
class Probe:
    """Tries what the stages of a sweep need, each thing once.

    Attributes:
        problems: in the order they were found.
        damaged: as `harness.ingest.Ingester` found it while planning.
    """

    run: RunOptions
    registry: Registry
    problems: list[Check] = field(default_factory=list)
    damaged: Mapping[str, str] = field(default_factory=dict)
    _verified: dict[str, bool] = field(default_factory=dict)
    _data: dict[str, _Data | None] = field(default_factory=dict)  # by `data_key`; None is bad
    _costs: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # state, working

    def cost(self, stage: Stage) -> Cost | None:
        """What a stage needs, of those that `look` was given.

        None where one step cannot be tried on its own (data that the learner generates, or a
        `Make` stage, come first), or where it failed.
        """
        data = self._data.get(data_key(stage))
        found = self._costs.get(_kind(stage, data)) if data else None
        return Cost(*found, data.bytes) if data and found else None

    def verify(self, dataset_ids: Iterable[str]) -> bool:
        """Compares the files of datasets with their records; whether there is no problem so far."""
        for dataset_id in dict.fromkeys(dataset_ids):
            if dataset_id not in self._verified:
                try:
                    datasets.verify_files(dataset_id)
                except datasets.DatasetError as error:
                    self._bad(dataset_id, error)
                self._verified[dataset_id] = not any(p.name == dataset_id for p in self.problems)
        return not self.problems

    def look(self, wanted: Iterable[Stage], stages: Mapping[str, Stage]) -> None:
        """Tries datasets, environments and learners of the wanted stages.

        Learners of one config are tried on one dataset of each layout.

        Args:
            stages: all stages of the plan by id, from which needs are built.
        """
        by_data: dict[str, list[Stage]] = {}
        for stage in wanted:
            by_data.setdefault(data_key(stage), []).append(stage)
        for key, members in by_data.items():
            known = self._data.get(key)
            if key in self._data and (
                known is None or all(_kind(stage, known) in self._costs for stage in members)
            ):
                continue
            dataset = self._dataset(members[0], first=key not in self._data)
            self._data[key] = found = _Data.of(dataset) if dataset is not None else None
            for stage in members if found else ():
                kind = _kind(stage, found)
                if kind not in self._costs:
                    self._costs[kind] = self._learner(stage, dataset, stages)

    def sizes(
        self, groups: Mapping[str, Sequence[Stage]], stages: Mapping[str, Stage]
    ) -> dict[str, int]:
        """Seeds in a stack for each group: a `harness.plan.StackSizes`."""
        self.look([stage for group in groups.values() for stage in group], stages)
        capacity, left = Capacity.of(self.run), sum(map(len, groups.values()))
        return {
            name: stack_size(self.run, capacity, self.cost(group[0]), group[0].steps, left)
            for name, group in groups.items()
        }

    def _dataset(self, stage: Stage, first: bool) -> Any:
        self.verify([stage.dataset_id])
        if not self._verified[stage.dataset_id]:
            return None
        try:
            dataset = load_dataset(stage, torch.device("cpu"))
            if first:
                _step_environment(stage.dataset_id, dataset.spec)
        except Exception as error:  # whatever a reader or an environment raises
            self._bad(stage.dataset_id, error)
            return None
        return dataset

    def _learner(
        self, stage: Stage, dataset: Any, stages: Mapping[str, Stage]
    ) -> tuple[int, int] | None:
        if stage.kind != "train":
            return None
        try:
            learner = _learner_of(stage, dataset, stages, self.registry)
            if learner is None:
                return None
            return self._tried(stage, learner, dataset)
        except Exception as error:  # whatever an algorithm raises
            labels = ", ".join(dict.fromkeys(trial.label for trial in stage.trials))
            self._bad(f"{labels or stage.algorithm} ({stage.name}) on {stage.dataset_id}", error)
            return None

    def _tried(self, stage: Stage, learner: Any, dataset: Any) -> tuple[int, int] | None:
        """Bytes of state and of work, from one gradient step and one policy call of one seed."""
        if getattr(learner, "refresh_every", 0):
            return None  # it trains on data that it would have to generate first
        working = 0
        trainer = Trainer(learner, dataset, (stage.seed or 0,), torch.device("cpu"), False)
        if stage.steps:
            working = peak_bytes(lambda: trainer.advance(1))
        if stage.trials:
            rows = min(_episodes(stage), self.run.max_envs)
            working = max(working, peak_bytes(lambda: _act(trainer, dataset, rows)))
        return sum(tensor.nbytes for tensor in learner.state_dict().values()), working

    def _bad(self, name: str, error: Exception) -> None:
        kind = "" if isinstance(error, datasets.DatasetError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split()) or "no message"
        self.problems.append(Check(name, "bad", f"{kind}{text}"))


@dataclass(frozen=True)
class _Data:
    """The layout of a loaded dataset, and its bytes in memory."""

    obs_dim: int
    action_dim: int
    bytes: int

    @classmethod
    def of(cls, dataset: Any) -> _Data:
        held = (value for value in vars(dataset).values() if isinstance(value, torch.Tensor))
        spec = dataset.spec
        return cls(spec.obs_dim, spec.action_dim, sum(tensor.nbytes for tensor in held))


def _kind(stage: Stage, data: _Data | None) -> str:
    """Stages with equal keys need equally much beside their data."""
    layout = [data.obs_dim, data.action_dim] if data else []
    needs = {name: config_to_dict(config) for name, config in stage.need_configs.items()}
    config = config_to_dict(stage.config)
    return content_hash([stage.algorithm, stage.name, config, needs, layout, _episodes(stage)])


def _episodes(stage: Stage) -> int:
    return max((trial.evaluation.episodes for trial in stage.trials), default=0)


def _learner_of(
    stage: Stage, dataset: Any, stages: Mapping[str, Stage], registry: Registry
) -> Any | None:
    """An untrained learner of one seed with untrained needs; None if a need must be computed."""
    recipe: Recipe = registry.get(stage.algorithm)
    declared = declared_stage(recipe, stage)
    if not isinstance(declared, Train):
        return None
    inputs = {}
    for name, need in stage.needs.items():
        learner = _learner_of(stages[need], dataset, stages, registry)
        if learner is None:
            return None
        state = {key: value.clone() for key, value in learner.state_dict().items()}
        inputs[name] = StageInput(config=stage.need_configs[name], state=state)
    return declared.learner(declared.config, dataset.spec, (stage.seed or 0,), inputs)


def _act(trainer: Trainer, dataset: Any, rows: int) -> None:
    zeros = torch.zeros(1, rows, dtype=torch.int64)
    rng = RowRng(trainer.seeds, trainer.step, Stream.EVALUATION, zeros, zeros)
    with torch.no_grad():
        trainer.learner.act(torch.zeros(1, rows, dataset.spec.obs_dim), rng)  # type: ignore[attr-defined]


def _step_environment(dataset_id: str, spec: Any) -> None:
    """Builds the evaluation environment and steps it once.

    Raises:
        DatasetError: if it does not fit the data, or its observation is not finite.
    """
    env = environments.evaluation_environment(dataset_id).make()
    try:
        environments.check_fit(env, spec)
        env.reset(seed=0)
        env.action_space.seed(0)
        obs, reward, *_ = env.step(env.action_space.sample())
        if not (np.isfinite(obs).all() and np.isfinite(float(reward))):
            raise datasets.DatasetError(
                f"the environment of {dataset_id!r} gives an observation or reward that is not "
                "finite after one step; check the simulator's version"
            )
    finally:
        env.close()


# -------------------------------------------------------------------------------------- the checks


def check(plan: Plan, store: Store | None, home: Home, probe: Probe) -> list[Check]:
    """All checks of a plan; of what can be read alone if there is nothing to run.

    Args:
        store: the database that rows will go to; None where this process writes to none.
    """
    unread = [Check("rows", "note", text) for text in probe.damaged.values()]
    if not plan.stacks:
        return probe.problems + unread
    wanted = [stage for stack in plan.stacks for stage in stack.stages]
    probe.look(wanted, plan.stages)
    found = probe.problems + unread
    capacity = Capacity.of(plan.experiment.run)
    found += [disk(plan, home, probe, capacity), *memory(plan, probe, capacity)]
    for precision in dict.fromkeys(stage.precision for stage in wanted):
        try:
            check_precision(precision, torch.device(capacity.device))
        except ValueError as error:
            found.append(Check("precision", "bad", str(error)))
    if store is not None:
        found.append(database(store))
    shared = home.shared(plan.experiment.run.storage)
    if shared.storage:
        found.append(storage(shared))
    if not probe.problems:
        kinds = {stage.id: probe.cost(stage) for stage in wanted if stage.kind == "train"}
        tried = sum(cost is not None for cost in kinds.values())
        text = (
            f"{len({stage.dataset_id for stage in wanted})} datasets read, environments stepped; "
        )
        text += f"{tried} of {len(kinds)} trainings tried for one step"
        text += "; the others need what other stages make" if tried < len(kinds) else ""
        found.insert(0, Check("trials", "ok", text))
    return found


def disk(plan: Plan, home: Home, probe: Probe, capacity: Capacity) -> Check:
    """Whether artifacts, checkpoints and rows will fit."""
    need, largest, unknown = 0, 0, False
    for stack in plan.stacks:
        cost = probe.cost(stack.stages[0])
        unknown |= cost is None
        states = len(stack.stages) * (cost.state if cost else 0)
        need += states + ROWS_BYTES * len(stack.stages)
        largest = max(largest, states)
    need += largest * (KEPT_CHECKPOINTS + 1) * min(capacity.slots, len(plan.stacks))
    try:
        free = writable(home)
    except OSError as error:
        return Check("disk", "bad", f"{home.root} cannot be written: {error.strerror or error}")
    text = f"{'at least ' * unknown}{gib(need)} needed in {home.root}, {gib(free)} free"
    if need > free:
        return Check("disk", "bad", f"{text}. Free some, or choose another folder with --home")
    return Check("disk", "note" if free - need < LOW_DISK_BYTES else "ok", text)


def writable(home: Home) -> int:
    """Free bytes of a folder that can be written; raises OSError if it cannot."""
    found = home.root / f".probe-{os.getpid()}"
    found.write_bytes(b"probe")
    found.unlink()
    return shutil.disk_usage(home.root).free


def memory(plan: Plan, probe: Probe, capacity: Capacity) -> list[Check]:
    """Whether each stack fits alone, and those that run at once together.

    What is measured is an upper bound (compiled steps need less), and a stack that runs out of
    memory is tried again with half of its seeds: only what one seed cannot do without is refused.
    """
    run = plan.experiment.run
    found: dict[str, Check] = {}  # by text: seeds of one stage need the same
    sizes = [stack_bytes(stack, run, probe, capacity) for stack in plan.stacks]
    known = sorted((size for size in sizes if size), reverse=True)
    if capacity.each is None:
        return [Check("memory", "note", "not estimated: this machine has no GPU to look at")]
    if not known:
        return [Check("memory", "note", "not estimated: no learner can be tried on its own")]
    room = capacity.each * (capacity.slots if capacity.device == "cpu" else 1)
    for stage in (stack.stages[0] for stack in plan.stacks):
        cost = probe.cost(stage)
        if cost and cost.least(capacity.device) > room:
            text = (
                f"one seed of {stage.algorithm} ({stage.name}) on {stage.dataset_id} needs "
                f"{gib(cost.least(capacity.device))}, {gib(room)} are there: use a larger machine"
            )
            found[text] = Check("memory", "bad", text)
    if found:
        return list(found.values())
    together = sum(known[: capacity.slots]) if capacity.device == "cpu" else known[0]
    text = f"at most {gib(known[0])} per stack, {gib(together)} at once, {gib(room)} there"
    if together > room:
        advice = "run.max_stack=auto, or a lower run.max_concurrent, if stacks run out of it"
        return [Check("memory", "note", f"{text}. {advice}")]
    return [Check("memory", "ok", text)]


def stack_bytes(stack: Stack, run: RunOptions, probe: Probe, capacity: Capacity) -> int | None:
    """What a stack's process needs; None if unknown."""
    cost = probe.cost(stack.stages[0])
    if cost is None:
        return None
    steps = 0 if stack.evaluate_only else stack.stages[0].steps
    compiled, _ = resolve_compile(run.compile, torch.device(capacity.device), steps)
    return cost.stack(len(stack.stages), capacity.device, compiled)


def described(plan: dict[str, Any], of: Plan, probe: Probe) -> dict[str, Any]:
    """What `Plan.describe` returned, each stack with its `bytes` (None if unknown)."""
    capacity = Capacity.of(of.experiment.run)
    sizes = [stack_bytes(stack, of.experiment.run, probe, capacity) for stack in of.stacks]
    stacks = [{**s, "bytes": size} for s, size in zip(plan["stacks"], sizes, strict=True)]
    return {**plan, "stacks": stacks}


def database(store: Store) -> Check:
    """Whether rows can be written."""
    try:
        store.check_writable()
    except Exception as error:  # a driver's own exceptions, explained by the store
        return Check("database", "bad", str(error))
    return Check("database", "ok", f"{store.url} can be written")


def storage(home: Home) -> Check:
    """Whether what nodes have in common can be written, read and deleted from here."""
    try:
        store = Storage(home.storage)
        store.check()
    except StorageError as error:
        return Check("storage", "bad", str(error))
    return Check("storage", "ok", f"{store.url} can be written")


def machine_memory() -> Check:
    """What is free now, for `harness doctor`."""
    free = available_bytes()
    return Check("memory", "ok" if free > LOW_MEMORY_BYTES else "note", f"{gib(free)} available")


def gib(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count / 2**20:.0f} MiB"
