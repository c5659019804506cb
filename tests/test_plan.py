"""Planning: what is done, what is left, which seeds train together, what waits for what."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pickle
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_catalog import PLUGIN, experiment

from harness.artifacts import ArtifactStore
from harness.plan import (
    Plan,
    balanced,
    checkpoint_name,
    checkpoint_steps,
    make_plan,
    measured_rates,
    resume_groups,
)
from harness.plan_text import plan_tables, seed_ranges
from harness.registry import Registry
from harness.spec import Experiment, TrialSpec, parse_seeds
from harness.typed import config_to_dict
from results.records import DatasetRecord, RunRecord, TrialRecord
from results.store import Store

SPEC = """
name: dag
algorithms: [two_stage]
datasets: [generated/line-v0]
seeds: 0-9
steps: 40
evaluation: {every: 10}
run: {max_stack: 8}
"""


@pytest.fixture(scope="module")
def registry() -> Any:
    sys.path.insert(0, str(PLUGIN))
    yield Registry()
    sys.path.remove(str(PLUGIN))


class Workspace:
    """A home folder with a real database and a real artifact store."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.folder, self.registry = folder, registry
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.work = folder / "work"
        self.store = Store.open(f"sqlite:///{folder / 'results.db'}")

    def load(self, *overrides: str, text: str = SPEC) -> Experiment:
        return experiment(self.folder, text, *overrides, registry=self.registry)

    def plan(self, *overrides: str, text: str = SPEC, **options: Any) -> Plan:
        loaded = self.load(*overrides, text=text)
        return make_plan(loaded, self.store, self.artifacts, self.work, self.registry, **options)

    def publish(self, stage_ids: Any) -> None:
        for stage_id in stage_ids:
            self.artifacts.publish(stage_id, lambda folder: (folder / "x").write_text("1"), {})

    def checkpoint(self, stage_id: str, *steps: int, complete: bool = True) -> None:
        for step in steps:
            folder = self.work / stage_id / "checkpoints" / checkpoint_name(step)
            folder.mkdir(parents=True)
            (folder / "state.safetensors").write_text("...")
            if complete:
                (folder / "manifest.json").write_text("{}")

    def record(self, trial: TrialSpec, status: Any, **changes: Any) -> None:
        """A run of a trial, with its parents."""
        values = {
            "run_id": f"{trial.id[:32]}-1",
            "trial_id": trial.id,
            "attempt": 1,
            "status": status,
            "started_at": "2031-01-01T00:00:00.000000Z",
            "ended_at": None if status == "running" else "2031-01-01T01:00:00.000000Z",
            "git_commit": "",
            "git_dirty": False,
            "versions": {},
            "hardware": {},
            "device": "cpu",
            "compiled": False,
            "stack": (trial.seed,),
            **changes,
        }
        dataset = DatasetRecord(
            trial.dataset_id, trial.dataset_digest, "E-v0", "local", None, None, "", 10, 1
        )
        row = TrialRecord(
            trial.id,
            trial.variant_id,
            trial.label,
            trial.algorithm,
            trial.revision,
            trial.dataset_id,
            trial.dataset_digest,
            dict(trial.data),
            dict(trial.config),
            trial.seed,
            config_to_dict(trial.evaluation),
            trial.evaluation.simulator,
            "2031-01-01T00:00:00.000000Z",
        )
        self.store.append([dataset, row, RunRecord(**values)])


@pytest.fixture
def home(tmp_path: Path, registry: Registry) -> Any:
    workspace = Workspace(tmp_path, registry)
    yield workspace
    workspace.store.close()


def stacks_of(plan: Plan) -> list[tuple[str, tuple[int, ...], int]]:
    return [(stack.stages[0].name, stack.seeds, stack.resume_step) for stack in plan.stacks]


# ---------------------------------------------------------------------------------------- stages


def test_a_trial_is_its_stages_in_dependency_order_stacked_in_balance(home: Workspace) -> None:
    plan = home.plan()
    low, high = tuple(range(5)), tuple(range(5, 10))
    assert stacks_of(plan) == [
        ("teacher", low, 0),
        ("teacher", high, 0),
        ("calibration", low, 0),
        ("calibration", high, 0),
        ("student", low, 0),
        ("student", high, 0),
    ]
    assert plan.counts == {
        "trials": 10,
        "trials_done": 0,
        "trials_todo": 10,
        "stages": 30,
        "stages_cached": 0,
        "stacks": 6,
    }
    student = plan.stacks[-1].stages[0]
    assert (student.kind, student.steps, student.seed) == ("train", 40, 5)
    assert list(student.needs) == ["teacher", "calibration"]
    teacher = plan.stages[student.needs["teacher"]]
    calibration = plan.stages[student.needs["calibration"]]
    assert (teacher.seed, teacher.steps, teacher.needs) == (5, 30, {})
    assert (calibration.kind, calibration.needs) == ("make", {"teacher": teacher.id})
    assert student.need_configs == {"teacher": teacher.config, "calibration": calibration.config}
    assert [trial.seed for trial in student.trials] == [5]
    assert teacher.trials == ()
    assert student.recipe_config.steps == 40


def test_a_stage_id_holds_exactly_what_can_change_the_stage(home: Workspace) -> None:
    def ids(*overrides: str) -> dict[str, str]:
        plan = home.plan("seeds=3", *overrides)
        return {stage.name: stage.id for stage in plan.stages.values()}

    base = ids()

    def changed(*overrides: str) -> set[str]:
        return {name for name, stage_id in ids(*overrides).items() if stage_id != base[name]}

    everything = {"teacher", "calibration", "student"}
    assert changed("config.student_lr=0.2") == {"student"}
    assert changed("steps=41") == {"student"}
    assert changed("config.calibration_size=9") == {"calibration", "student"}
    assert changed("config.teacher_lr=0.2") == everything
    assert changed("config.teacher_steps=31") == everything
    assert changed("data.reward=normalize") == everything
    assert changed("seeds=4") == everything
    assert changed("config.shared_teacher=true") == everything
    assert changed("evaluation.every=7", "run.max_stack=2", "name=other") == set()
    assert changed("algorithms={other: {algorithm: two_stage}}") == set()


def test_shared_stages_run_once_for_all_seeds(home: Workspace) -> None:
    plan = home.plan("config.shared_teacher=true")
    assert [(s.stages[0].name, len(s.stages)) for s in plan.stacks] == [
        ("teacher", 1),
        ("calibration", 1),
        ("student", 5),
        ("student", 5),
    ]
    teacher = plan.stacks[0].stages[0]
    assert teacher.seed is None
    assert "seed" not in teacher.identity()
    assert plan.stacks[0].seeds == (0,)
    assert {s.needs["teacher"] for s in plan.stages.values() if s.name == "student"} == {teacher.id}


def test_trials_that_share_a_stage_plan_it_once(home: Workspace) -> None:
    text = SPEC.replace(
        "[two_stage]",
        "{slow: {algorithm: two_stage}, fast: {algorithm: two_stage, config: {student_lr: 0.3}}}",
    )
    plan = home.plan(text=text)
    names = [stage.name for stage in plan.stages.values()]
    assert {name: names.count(name) for name in names} == {
        "teacher": 10,
        "calibration": 10,
        "student": 20,
    }


def test_stages_are_stacked_only_with_those_that_differ_in_seed(home: Workspace) -> None:
    text = SPEC.replace("[generated/line-v0]", '["generated/*"]').replace(
        "[two_stage]",
        "{slow: {algorithm: two_stage}, fast: {algorithm: two_stage, config: {student_lr: 0.3}}}",
    )
    plan = home.plan("seeds=0-2", text=text)
    for stack in plan.stacks:
        without_seed = []
        for stage in stack.stages:
            identity = stage.identity()
            assert identity.pop("seed") == stage.seed
            identity["needs"] = sorted(identity["needs"])
            without_seed.append(json.dumps(identity, sort_keys=True))
        assert len(set(without_seed)) == 1
        assert stack.seeds == (0, 1, 2)
    assert len(plan.stacks) == 2 + 2 + 4


def test_a_plan_survives_pickling(home: Workspace) -> None:
    plan = home.plan("seeds=0-1")
    again = pickle.loads(pickle.dumps(plan.stacks))
    assert again == plan.stacks
    assert [stack.id for stack in again] == [stack.id for stack in plan.stacks]


def test_a_revision_other_than_the_installed_one_is_refused(home: Workspace) -> None:
    loaded = home.load("seeds=0")
    old = dataclasses.replace(loaded.trials[0], revision=2)
    loaded = dataclasses.replace(loaded, trials=(old,))
    with pytest.raises(ValueError, match="revision 2, but revision 3 is installed"):
        make_plan(loaded, None, home.artifacts, home.work, home.registry)


# ---------------------------------------------------------------------------------- what is done


def test_a_finished_experiment_leaves_nothing_to_do(home: Workspace) -> None:
    first = home.plan()
    home.publish(first.stages)
    for trial in first.trials:
        home.record(trial, "done")
    second = home.plan()
    assert (second.stacks, second.todo, second.done) == ((), (), second.trials)
    assert second.counts["stages_cached"] == 30
    assert second.ready() == ()


def test_adding_seeds_plans_just_those(home: Workspace) -> None:
    first = home.plan("seeds=0-2")
    home.publish(first.stages)
    for trial in first.trials:
        home.record(trial, "done")
    second = home.plan("seeds=0-4")
    assert {stack.seeds for stack in second.stacks} == {(3, 4)}
    assert [stack.stages[0].name for stack in second.stacks] == [
        "teacher",
        "calibration",
        "student",
    ]


def test_done_trials_need_no_artifact(home: Workspace) -> None:
    for trial in home.load().trials[:4]:
        home.record(trial, "done")
    assert {seed for stack in home.plan().stacks for seed in stack.seeds} == set(range(4, 10))


def test_cached_stages_are_skipped_and_what_only_they_need_too(home: Workspace) -> None:
    stages = home.plan("seeds=0-1").stages.values()
    home.publish(stage.id for stage in stages if stage.name == "calibration")
    # The student needs the teacher itself too, the calibration does not run again.
    assert [stack.stages[0].name for stack in home.plan("seeds=0-1").stacks] == [
        "teacher",
        "student",
    ]
    home.publish(stage.id for stage in stages if stage.name == "teacher")
    plan = home.plan("seeds=0-1")
    assert [stack.stages[0].name for stack in plan.stacks] == ["student"]
    assert plan.ready() == plan.stacks
    damaged = next(stage.id for stage in stages if stage.name == "teacher" and stage.seed == 1)
    (home.artifacts.path(damaged) / "manifest.json").unlink()
    assert stacks_of(home.plan("seeds=0-1"))[0] == ("teacher", (1,), 0)


@pytest.mark.parametrize(
    ("status", "retry", "runs_again"),
    [
        ("done", ("failed",), False),
        ("diverged", ("failed",), False),
        ("diverged", ("failed", "diverged"), True),
        ("done", ("done",), True),
        ("failed", ("failed",), True),
        ("failed", (), True),
        ("running", ("failed",), True),
        ("interrupted", ("failed",), True),
    ],
)
def test_a_result_is_kept_and_everything_else_is_run(
    home: Workspace, status: str, retry: tuple[str, ...], runs_again: bool
) -> None:
    trial = home.load("seeds=5").trials[0]
    home.record(trial, status)
    plan = home.plan("seeds=5", retry=retry)
    assert bool(plan.stacks) == runs_again
    assert plan.statuses == {trial.id: status}


def test_a_diverged_trial_that_is_tried_again_starts_from_zero(home: Workspace) -> None:
    trial = home.load("seeds=5").trials[0]
    home.record(trial, "diverged")
    student = next(s for s in home.plan("seeds=5").stages.values() if s.name == "student")
    home.checkpoint(student.id, 10, 20)
    plan = home.plan("seeds=5", retry=("diverged",))
    assert stacks_of(plan)[-1] == ("student", (5,), 0)


def test_a_trained_trial_that_lacks_its_last_evaluation_is_only_evaluated(home: Workspace) -> None:
    home.publish(home.plan("seeds=0-2").stages)
    for every in (40, 1000):
        plan = home.plan("seeds=0-2", f"evaluation.every={every}")
        (stack,) = plan.stacks
        assert (stack.evaluate_only, stack.retrain, stack.seed_steps) == (True, False, 0)
        assert stack.seeds == (0, 1, 2)
        assert plan.ready() == (stack,)


def test_a_learning_curve_that_was_never_measured_is_trained_again(home: Workspace) -> None:
    home.publish(home.plan("seeds=0-2").stages)
    (stack,) = home.plan("seeds=0-2", "evaluation.every=39").stacks
    assert (stack.evaluate_only, stack.retrain) == (False, True)
    # Killed between the artifact and the last row: the curve is in the run already.
    for trial in home.load("seeds=0-1").trials:
        home.record(trial, "running", steps_done=40)
    only, again = sorted(home.plan("seeds=0-2").stacks, key=lambda found: found.seeds)
    assert (only.seeds, only.evaluate_only, only.retrain) == ((0, 1), True, False)
    assert (again.seeds, again.evaluate_only, again.retrain) == ((2,), False, True)


def test_evaluating_needs_the_inputs_of_the_policy(home: Workspace) -> None:
    stages = home.plan("seeds=0").stages.values()
    home.publish(stage.id for stage in stages if stage.name == "student")
    plan = home.plan("seeds=0", "evaluation.every=40")
    assert [stack.stages[0].name for stack in plan.stacks] == ["teacher", "calibration", "student"]
    assert plan.stacks[-1].evaluate_only
    assert [stack.stages[0].name for stack in plan.ready()] == ["teacher"]


# ------------------------------------------------------------------------------- stacks and resume


@given(st.integers(0, 40), st.integers(1, 12))
def test_balanced_parts_are_few_even_and_in_order(count: int, most: int) -> None:
    parts = balanced(list(range(count)), most)
    assert [item for part in parts for item in part] == list(range(count))
    assert len(parts) == -(-count // most)
    sizes = [len(part) for part in parts]
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, []),
        ({"a": [], "b": []}, [(0, ["a", "b"])]),
        # Killed while the seeds of one stack wrote a checkpoint: all have step 10.
        ({"a": [5, 10], "b": [10, 15], "c": [10, 15]}, [(10, ["a", "b", "c"])]),
        ({"a": [5, 10], "b": [5, 10]}, [(10, ["a", "b"])]),
        ({"a": [5, 10], "b": []}, [(10, ["a"]), (0, ["b"])]),
        ({"a": [5, 10], "b": [20, 25]}, [(25, ["b"]), (10, ["a"])]),
        (
            {"a": [5, 10], "b": [20, 25], "c": [10, 15], "d": [], "e": [25, 30]},
            [(25, ["b", "e"]), (10, ["a", "c"]), (0, ["d"])],
        ),
    ],
)
def test_seeds_resume_together_where_they_can(
    steps: dict[str, list[int]], expected: list[tuple[int, list[str]]]
) -> None:
    assert resume_groups(steps) == expected


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(1, 6), max_size=3)))
def test_every_seed_resumes_once_from_a_checkpoint_it_has(steps: dict[str, list[int]]) -> None:
    groups = resume_groups(steps)
    assert sorted(name for _, names in groups for name in names) == sorted(steps)
    for step, names in groups:
        assert names
        assert all(step in steps[name] if step else not steps[name] for name in names)
    assert len({step for step, _ in groups}) == len(groups)
    holders = [set(have) for have in steps.values() if have]
    common = set.intersection(*holders) if holders else set()
    if common:  # all that have a checkpoint share one: they resume together at the largest
        assert groups[0][0] == max(common)
        assert len(groups) <= 2


def test_checkpoints_count_only_when_complete(home: Workspace) -> None:
    stage = next(s for s in home.plan("seeds=0").stages.values() if s.name == "student")
    folder = home.work / stage.id / "checkpoints"
    assert checkpoint_steps(folder) == []
    home.checkpoint(stage.id, 10, 20)
    home.checkpoint(stage.id, 30, complete=False)
    for name in (".tmp-00000040-1", "99", "٣", "latest"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}")
    (folder / checkpoint_name(25)).write_text("a file")
    assert checkpoint_steps(folder) == [10, 20]


def test_a_stack_resumes_at_the_last_step_its_seeds_share(home: Workspace) -> None:
    stages = {s.seed: s.id for s in home.plan().stages.values() if s.name == "teacher"}
    for seed in (0, 1, 2):
        home.checkpoint(stages[seed], 10, 20)
    home.checkpoint(stages[3], 5, 10)
    home.checkpoint(stages[7], 25)
    teachers = [entry for entry in stacks_of(home.plan()) if entry[0] == "teacher"]
    assert teachers == [
        ("teacher", (0, 1, 2, 3), 10),
        ("teacher", (7,), 25),
        ("teacher", (4, 5, 6, 8, 9), 0),
    ]


def test_a_trial_continues_only_where_its_own_evaluations_reach(home: Workspace) -> None:
    def students(*overrides: str) -> list[tuple[tuple[int, ...], int]]:
        stacks = stacks_of(home.plan("seeds=0", *overrides))
        return [(seeds, step) for name, seeds, step in stacks if name == "student"]

    stages = home.plan("seeds=0").stages.values()
    student = next(stage for stage in stages if stage.name == "student")
    home.checkpoint(student.id, 10, 20)
    assert students() == [((0,), 0)]  # every 10, and no run that has evaluated at 10 or 20
    home.record(student.trials[0], "running", steps_done=10)  # killed while it wrote step 20
    assert students() == [((0,), 10)]
    home.record(student.trials[0], "interrupted", steps_done=20)
    assert students() == [((0,), 20)]
    # Another protocol is another trial of the same stage: nothing of its curve exists yet.
    assert students("evaluation.every=15") == [((0,), 10)]
    assert students("evaluation.every=5") == [((0,), 0)]
    assert students("evaluation.every=1000") == [((0,), 20)]


def test_a_large_group_of_resumed_seeds_is_split_in_balance(home: Workspace) -> None:
    for stage in home.plan().stages.values():
        if stage.name == "teacher":
            home.checkpoint(stage.id, 20)
    teachers = [entry for entry in stacks_of(home.plan("run.max_stack=4")) if entry[0] == "teacher"]
    assert [(len(seeds), step) for _, seeds, step in teachers] == [(4, 20), (3, 20), (3, 20)]


# ---------------------------------------------------------------------------------- running a plan


def run_to_the_end(plan: Plan, rng: random.Random, fails: Any = lambda stage: False) -> Any:
    """Runs ready stacks in a random order; returns what ran and what failed."""
    finished: set[str] = set()
    failed: set[str] = set()
    running: list[Any] = []
    order: list[Any] = []
    while True:
        in_flight = {stage.id for stack in running for stage in stack.stages}
        ready = plan.ready(finished, in_flight, failed)
        if ready and (not running or rng.random() < 0.6):
            stack = rng.choice(ready)
            for stage in stack.stages:
                assert set(stage.needs.values()) <= finished | plan.cached
            running.append(stack)
            order.append(stack)
        elif running:
            stack = running.pop(rng.randrange(len(running)))
            for stage in stack.stages:
                (failed if fails(stage) else finished).add(stage.id)
        else:
            return order, finished, failed


@pytest.mark.parametrize("draw", range(5))
def test_any_order_of_ready_stacks_runs_every_stage_once(home: Workspace, draw: int) -> None:
    plan = home.plan(f"config.shared_teacher={'true' if draw % 2 else 'false'}")
    order, finished, _ = run_to_the_end(plan, random.Random(draw))
    ran = [stage.id for stack in order for stage in stack.stages]
    assert sorted(ran) == sorted(plan.stages)
    assert finished == set(plan.stages)


def test_only_stacks_whose_needs_are_met_are_ready(home: Workspace) -> None:
    plan = home.plan()
    teachers, makes, students = plan.stacks[:2], plan.stacks[2:4], plan.stacks[4:]
    assert plan.ready() == teachers
    done = {stage.id for stage in teachers[0].stages}
    assert plan.ready(done, {stage.id for stage in teachers[1].stages}) == (makes[0],)
    assert plan.ready(done, {teachers[1].id}) == (makes[0],)  # a stack's id will do
    done |= {stage.id for stage in makes[0].stages}
    assert plan.ready(done) == (teachers[1], students[0])


def test_a_failed_seed_leaves_its_stack_and_the_others_go_on(home: Workspace) -> None:
    plan = home.plan()

    def fails(stage: Any) -> bool:
        return stage.name == "teacher" and stage.seed == 3

    order, _, failed = run_to_the_end(plan, random.Random(0), fails)
    ran = {name: set() for name in ("teacher", "calibration", "student")}
    for stack in order:
        ran[stack.stages[0].name].update(stack.seeds)
    everyone = set(range(10))
    assert ran == {
        "teacher": everyone,
        "calibration": everyone - {3},
        "student": everyone - {3},
    }
    (teacher,) = failed
    reasons = plan.blocked({teacher: "CUDA error"})
    assert {(plan.stages[s].name, plan.stages[s].seed) for s in reasons} == {
        ("calibration", 3),
        ("student", 3),
    }
    assert set(reasons.values()) == {"needs stage 'teacher' of seed 3, which failed: CUDA error"}
    (blocked,) = plan.blocked_trials({teacher: "CUDA error"})
    assert blocked == plan.trials[3].id


def test_the_failure_of_a_shared_stage_blocks_every_seed(home: Workspace) -> None:
    plan = home.plan("config.shared_teacher=true", "seeds=0-2")
    order, _, failed = run_to_the_end(plan, random.Random(0), lambda s: s.name == "calibration")
    assert [stack.stages[0].name for stack in order] == ["teacher", "calibration"]
    reasons = plan.blocked_trials(dict.fromkeys(failed, "out of memory"))
    assert set(reasons) == {trial.id for trial in plan.trials}
    assert set(reasons.values()) == {"needs stage 'calibration', which failed: out of memory"}


# ----------------------------------------------------------------------------------- describing it


def test_the_description_says_what_runs_and_where_settings_come_from(home: Workspace) -> None:
    for trial in home.load("seeds=0-1").trials:
        home.record(trial, "done")
    text = SPEC.replace("[generated/line-v0]", "[generated/line-v0, hopper-medium-v2]")
    plan = home.plan(text=text)
    described = plan.describe()
    assert json.loads(json.dumps(described)) == described
    first, second = described["settings"]
    assert (first["trials"], first["done"], first["relation"]) == (10, 2, "generated")
    assert (second["requested"], second["relation"]) == ("hopper-medium-v2", "different")
    assert second["hparams"] == "config defaults"
    assert described["counts"]["trials_done"] == 2
    assert described["seconds"] is None
    stack = described["stacks"][0]
    assert (stack["stage"], stack["seeds"], stack["steps"]) == (
        "teacher",
        [2, 3, 4, 5, 6, 7, 8, 9],
        30,
    )
    assert described["stacks"][-1]["waits_for"]
    assert described["stacks"][-1]["labels"] == ["two_stage"]


def test_the_estimate_counts_the_steps_that_are_left(home: Workspace) -> None:
    stages = home.plan("seeds=0-3").stages.values()
    home.publish(s.id for s in stages if s.name in ("teacher", "calibration"))
    for stage in stages:
        if stage.name == "student" and stage.seed < 2:
            home.checkpoint(stage.id, 30)
            home.record(stage.trials[0], "interrupted", steps_done=30)
    plan = home.plan("seeds=0-3")
    left = 2 * (40 - 30) + 2 * 40  # seed-steps
    assert sum(stack.seed_steps for stack in plan.stacks) == left
    assert plan.describe({"two_stage": 5.0})["seconds"] == left / 5.0
    assert plan.seconds({"two_stage": 5.0}, concurrent=2) == left / 5.0 / 2
    assert plan.seconds({}) is None
    assert plan.seconds({"other": 5.0}) is None


def test_rates_are_measured_from_finished_runs(home: Workspace) -> None:
    assert measured_rates(home.store) == {}
    trials = home.load("seeds=0-3").trials
    speeds = (2.0, 4.0, 8.0)  # seconds for 40 steps of a stack of 3
    for trial, seconds in zip(trials, speeds, strict=False):
        home.record(trial, "done", stack=(0, 1, 2), steps_done=40, timings={"train": seconds})
    home.record(trials[3], "failed", steps_done=40, timings={"train": 1e-3})
    assert measured_rates(home.store) == {"two_stage": 40 * 3 / 4.0}
    assert measured_rates(home.store, device="cuda") == {}


def test_the_tables_show_every_stack_and_the_counts(home: Workspace) -> None:
    from rich.console import Console

    stages = home.plan().stages.values()
    home.checkpoint(next(s.id for s in stages if s.name == "teacher" and s.seed == 0), 20)
    out = io.StringIO()
    console = Console(file=out, width=160)
    for item in plan_tables(home.plan().describe()):
        console.print(item)
    shown = out.getvalue()
    for text in ("30 from 20", "1-5 | 6-9", "computed", "10 to do in 7 stacks", "unknown"):
        assert text in shown, shown


def test_the_tables_say_what_was_changed_of_the_settings(home: Workspace) -> None:
    text = SPEC.replace("[generated/line-v0]", "[generated/line-v0, hopper-medium-v2]")
    case = 'cases=[{dataset: "hopper*", config: {student_lr: 2}}]'
    items = plan_tables(home.plan(case, "steps=50", text=text).describe())
    notes = [str(item) for item in items]
    assert (
        "settings of two_stage on generated/line-v0 changed by the command line: steps=50" in notes
    )
    assert (
        "settings of two_stage on mujoco/hopper/medium-v0 changed by the command line: "
        "steps=50, student_lr=2.0"
    ) in notes


@given(st.sets(st.integers(0, 50), min_size=1))
def test_seed_ranges_are_what_parse_seeds_reads(seeds: set[int]) -> None:
    assert parse_seeds(seed_ranges(seeds)) == tuple(sorted(seeds))


def test_a_thousand_trials_are_planned_in_seconds(home: Workspace) -> None:
    import time

    started = time.process_time()
    plan = home.plan("seeds=0-999", "run.max_stack=16")
    assert len(plan.trials) == 1000
    assert len(plan.stacks) == 3 * 63
    assert time.process_time() - started < 10.0


def test_the_plan_is_a_function_of_what_is_on_disk(home: Workspace) -> None:
    """Any subset of stages cached: exactly the missing ones that are needed run."""
    stages = list(home.plan("seeds=0").stages.values())
    by_name: Mapping[str, Any] = {stage.name: stage for stage in stages}
    for size in range(4):
        for cached in itertools.combinations(by_name, size):
            for stage in stages:
                home.artifacts.remove(stage.id)
            home.publish(by_name[name].id for name in cached)
            plan = home.plan("seeds=0", "evaluation.every=40")
            expected = [n for n in by_name if n == "student" or n not in cached]
            if "calibration" in cached and "teacher" not in cached:
                expected = ["teacher", "student"]
            assert [stack.stages[0].name for stack in plan.stacks] == expected
            assert plan.cached == {by_name[name].id for name in cached}
