"""One stack from data to artifacts: what is on disk when, and what a restart does with it."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from small_catalog import PLUGIN

from harness import datasets, stages, storage, training_run
from harness.artifacts import ArtifactStore
from harness.datasets import cards
from harness.evaluate import Evaluator
from harness.home import Home
from harness.job import Job
from harness.plan import checkpoint_steps, make_plan
from harness.spec import load_experiment
from harness.spool import Spool, read
from harness.storage import StackBusyError
from harness.sweep import clean_up, plan_sweep
from harness.trainer import Trainer
from harness.work import work
from harness.worker import run_stack
from results.records import EvalRecord, MetricRecord, RunRecord
from results.store import Store
from tests import inline

REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = """
name: tiny
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 40
evaluation: {every: 20, episodes: 4}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def job_of(spec: Path, home: Home, overrides=(), **changes) -> Job:
    experiment = load_experiment(spec, list(overrides))
    plan = make_plan(experiment, None, ArtifactStore(home.artifacts), home.work)
    (stack,) = plan.ready()
    return Job(stack, experiment.run, home, {}, **changes)


def stop_after_a_chunk(spec: Path, home: Home, stop: Path) -> Job:
    """Runs a stack that is asked to stop during its first chunk."""
    job = job_of(spec, home, stop_file=stop)
    assert run_stack(job, lambda progress: stop.touch()) == "interrupted"
    return job


def last_status(home: Home, stage) -> str:
    records = [r for r in read(home.spool(stage.id)) if isinstance(r, RunRecord)]
    return records[-1].status


def test_data_are_read_once_for_all_stacks_of_a_process_and_not_at_all_if_nothing_is_left(
    spec, tmp_path, monkeypatch
):
    loads, cards_made, load, load_raw = [], [], datasets.load, cards.load_raw

    def counted(dataset_id, data, *arguments):
        loads.append(data.reward)
        return load(dataset_id, data, *arguments)

    monkeypatch.setattr(datasets, "load", counted)
    monkeypatch.setattr(cards, "load_raw", lambda name: cards_made.append(name) or load_raw(name))
    stages._held.clear()
    home, one = tmp_path / "home", ["run.max_stack=1"]
    assert inline.sweep(spec, home, one).trained == 3
    assert (loads, cards_made) == (["none"] * 2, ["generated/bandit2d-v0"]), "preflight, worker"
    assert inline.sweep(spec, home, one).trained == 0
    assert (len(loads), len(cards_made)) == (2, 1)
    assert inline.sweep(spec, home, [*one, "data.reward=normalize"]).trained == 3
    assert (loads[2:], len(cards_made)) == (["normalize"] * 2, 1)
    assert len(stages._held) == 1, "room for one dataset"


def test_a_stack_leaves_rows_and_a_verified_artifact_for_each_seed(spec, tmp_path):
    home = Home.find(tmp_path / "home")
    job = job_of(spec, home)
    phases = []
    assert run_stack(job, lambda progress: phases.append(progress.phase)) == "done"
    assert phases[0] == "load"
    assert phases[-1] == "done"
    store = ArtifactStore(home.artifacts)
    for stage in job.stack.stages:
        store.verify(stage.id)
        records = list(read(home.spool(stage.id)))
        evals = [r for r in records if isinstance(r, EvalRecord)]
        assert [(r.step, r.episode) for r in evals] == [(s, e) for s in (20, 40) for e in range(4)]
        assert all(r.length == 1 for r in evals)
        steps = {r.step for r in records if isinstance(r, MetricRecord)}
        assert steps == set(range(5, 41, 5))
        final = [r for r in records if isinstance(r, RunRecord)][-1]
        assert (final.status, final.steps_done, final.stack) == ("done", 40, (0, 1, 2))
        assert final.versions["mujoco"]
        assert final.timings["train"] > 0
        assert not home.checkpoints(stage.id).exists()


def test_a_stopped_stack_continues_to_the_same_rows(spec, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert inline.sweep(spec, whole).ok
    home = Home.find(parts)
    job = stop_after_a_chunk(spec, home, tmp_path / "stop")
    assert {last_status(home, stage) for stage in job.stack.stages} == {"interrupted"}
    assert inline.sweep(spec, parts).ok
    assert inline.rows(parts) == inline.rows(whole)
    with inline.Store.open(home.database_url()) as store:
        (segments,) = {len(s) for s in store.runs()["segments"]}
    assert segments == 2  # both processes are on record


@pytest.mark.parametrize("at", [3, 7, 13])
def test_a_stack_stopped_within_a_chunk_continues_to_the_same_rows(spec, tmp_path, monkeypatch, at):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert inline.sweep(spec, whole).ok
    home, stop = Home.find(parts), tmp_path / "stop"
    job = job_of(spec, home, stop_file=stop)
    with monkeypatch.context() as patch:
        patch.setattr("harness.trainer.STOP_CHECK_S", -1.0)
        one_step = Trainer._one_step

        def counted(trainer, phase):
            if trainer.steps_done == at - 1:
                stop.touch()
            return one_step(trainer, phase)

        patch.setattr(Trainer, "_one_step", counted)
        assert run_stack(job, lambda progress: None) == "interrupted"
    steps = {tuple(checkpoint_steps(home.checkpoints(stage.id))) for stage in job.stack.stages}
    assert {found[-1] for found in steps} == {at}
    assert inline.sweep(spec, parts).ok
    assert inline.rows(parts) == inline.rows(whole)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_stack_stopped_within_an_evaluation_evaluates_first_when_it_continues(
    spec, tmp_path, monkeypatch, evaluation
):
    """The second one is of the final policy, after the last step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert inline.sweep(spec, whole).ok
    home, stop = Home.find(parts), tmp_path / "stop"
    with monkeypatch.context() as patch:
        patch.setattr("harness.training_run.STOP_CHECK_S", -1.0)
        run, calls = Evaluator.run, []

        def counted(*arguments):
            calls.append(1)
            if len(calls) == evaluation:
                stop.touch()
            return run(*arguments)

        patch.setattr(Evaluator, "run", counted)
        job = job_of(spec, home, stop_file=stop)
        assert run_stack(job, lambda progress: None) == "interrupted"
    evaluated = {
        record.step
        for stage in job.stack.stages
        for record in read(home.spool(stage.id))
        if isinstance(record, EvalRecord)
    }
    assert evaluated == ({20} if evaluation == 2 else set())
    assert inline.sweep(spec, parts).ok
    assert inline.rows(parts) == inline.rows(whole)


def test_seeds_that_continue_together_are_evaluated_first_if_one_of_them_was_not(
    spec, tmp_path, monkeypatch
):
    """Both have a checkpoint at step 20, seed 0 from after the evaluation, seed 1 from before."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert inline.sweep(spec, whole, ["seeds=0-1"]).ok
    home, stop = Home.find(parts), tmp_path / "stop"
    job = job_of(spec, home, ["seeds=0"], stop_file=stop)
    after = lambda progress: stop.touch() if progress.step == 25 else None  # noqa: E731
    assert run_stack(job, after) == "interrupted"
    stop.unlink()
    job = job_of(spec, home, ["seeds=1"], stop_file=stop)
    with monkeypatch.context() as patch:
        patch.setattr("harness.training_run.STOP_CHECK_S", -1.0)
        before = lambda progress: stop.touch() if progress.phase == "evaluate" else None  # noqa: E731
        assert run_stack(job, before) == "interrupted"
    assert inline.sweep(spec, parts, ["seeds=0-1"]).trained == 1
    assert inline.rows(parts) == inline.rows(whole)


def test_the_same_sweep_again_runs_nothing_and_more_seeds_run_only_those(spec, tmp_path):
    first = inline.sweep(spec, tmp_path / "home")
    again = inline.sweep(spec, tmp_path / "home")
    more = inline.sweep(spec, tmp_path / "home", ["seeds=0-3"])
    assert (first.trained, again.trained, more.trained) == (1, 0, 1)
    assert more.ok
    assert len(more.statuses) == 4


def test_seeds_trained_one_by_one_or_stacked_give_the_same_rows(spec, tmp_path):
    inline.sweep(spec, tmp_path / "stacked")
    inline.sweep(spec, tmp_path / "single", ["run.max_stack=1"])
    assert inline.rows(tmp_path / "stacked") == inline.rows(tmp_path / "single")


class NanAfter:
    """Makes one seed's parameters nan at a step of the real learner."""

    def __init__(self, monkeypatch, index, step):
        advance = Trainer.advance

        def poisoned(trainer, num_steps, stop=None):
            if trainer.steps_done == step:
                for parameter in trainer.learner.actor.parameters():
                    parameter.data[index] = torch.nan
            return advance(trainer, num_steps, stop)

        monkeypatch.setattr(Trainer, "advance", poisoned)


def test_a_diverged_seed_is_a_result_and_the_others_go_on_unchanged(spec, tmp_path, monkeypatch):
    inline.sweep(spec, tmp_path / "good")
    with monkeypatch.context() as patch:
        NanAfter(patch, index=1, step=20)
        summary = inline.sweep(spec, tmp_path / "bad")
    assert sorted(summary.statuses.values()) == ["diverged", "done", "done"]
    assert not summary.ok
    (error,) = summary.errors.values()
    assert "is not finite at step 21" in error
    assert "last good checkpoint: step 20" in error
    good, bad = inline.rows(tmp_path / "good"), inline.rows(tmp_path / "bad")
    lost = {run[0] for run in bad["runs"] if run[3] == "diverged"}
    for table in ("evals", "metrics", "runs"):
        assert [r for r in good[table] if r[0] not in lost] == [
            r for r in bad[table] if r[0] not in lost
        ]
    again = inline.sweep(spec, tmp_path / "bad")
    assert again.trained == 0  # a result is not run again by itself
    retried = inline.sweep(spec, tmp_path / "bad", retry=("failed", "diverged"))
    assert retried.ok
    with inline.Store.open(Home.find(tmp_path / "bad").database_url()) as store:
        assert sorted(store.runs()["attempt"]) == [1, 1, 1, 2]


def test_a_seed_whose_environment_fails_does_not_take_the_others_along(spec, tmp_path, monkeypatch):
    inline.sweep(spec, tmp_path / "whole")
    step = Evaluator._step

    def unwell(evaluator, slot, action):
        (k,) = (k for k, row in enumerate(evaluator.slots) if any(slot is own for own in row))
        if evaluator._seeds[k] == 1:
            raise ValueError("the simulator is in a bad state")
        return step(evaluator, slot, action)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_step", unwell)
        first = inline.sweep(spec, tmp_path / "home")
        alone = inline.sweep(spec, tmp_path / "home")
    for summary in (first, alone):
        assert sorted(summary.statuses.values()) == ["done", "done", "failed"]
        (error,) = (summary.errors[i] for i, s in summary.statuses.items() if s == "failed")
        last = error.strip().splitlines()[-1]
        assert re.search(
            r"EvaluationError: seed 1: .* failed twice in episode 0 .* bad state", last
        )
    assert inline.sweep(spec, tmp_path / "home").ok
    assert inline.rows(tmp_path / "home") == inline.rows(tmp_path / "whole")


def test_a_computed_stage_that_is_stopped_begins_anew(spec, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    overrides, home = ["algorithms=[two_stage]", "run.max_stack=3"], Home.find(tmp_path / "home")
    assert inline.sweep(spec, tmp_path / "whole", overrides).ok

    def stop_halfway(progress):
        if (progress.step, progress.steps) == (1, 2):  # only the calibration tells this
            job.stop_file.touch()

    with Store.open(home.database_url()) as store:
        experiment = load_experiment(spec, overrides)
        plan = plan_sweep(experiment, store, home)
        teacher, calibration, _ = plan.stacks
        assert run_stack(Job(teacher, experiment.run, home, {}), lambda progress: None) == "done"
        job = Job(calibration, experiment.run, home, {}, tmp_path / "stop")
        assert run_stack(job, stop_halfway) == "interrupted"
    assert not any(storage.artifacts(home).has(stage.id) for stage in calibration.stages)
    summary = inline.sweep(spec, home.root, overrides)
    assert (summary.ok, summary.trained) == (True, 2)
    assert inline.rows(home.root) == inline.rows(tmp_path / "whole")


@pytest.mark.parametrize("first", ["sweep", "work"])
def test_a_trial_whose_earlier_stage_diverges_has_diverged(spec, tmp_path, monkeypatch, first):
    monkeypatch.syspath_prepend(str(PLUGIN))
    overrides, home = ["algorithms=[two_stage]"], Home.find(tmp_path / "home")
    assert inline.sweep(spec, tmp_path / "whole", overrides).ok
    advance = Trainer.advance

    def poisoned(trainer, *arguments):
        if type(trainer.learner).__name__ == "Linear" and trainer.steps_done == 10:
            trainer.learner.weight[trainer.seeds == 1] = torch.nan
        return advance(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", poisoned)
        if first == "sweep":
            assert inline.sweep(spec, home.root, overrides).trained == 3
        else:
            told = lambda *arguments: None  # noqa: E731
            work(load_experiment(spec, overrides), home, None, told, told, tmp_path / "stop")
    summary = inline.sweep(spec, home.root, overrides)
    assert summary.trained == 0
    assert sorted(summary.statuses.values()) == ["diverged", "done", "done"]
    (error,) = summary.errors.values()
    assert error.startswith("stage 'teacher' of seed 1, which it needs: loss is not finite at step")
    assert error.endswith("last good checkpoint: step 10")
    retried = inline.sweep(spec, home.root, overrides, retry=("failed", "diverged"))
    assert retried.ok
    values = [{row[1:] for row in inline.rows(r)["evals"]} for r in (home.root, tmp_path / "whole")]
    assert values[0] == values[1]
    with inline.Store.open(home.database_url()) as store:
        assert sorted(store.runs()["attempt"]) == [1, 1, 1, 2]


def test_a_crash_is_recorded_with_its_traceback_and_retried_by_the_next_sweep(
    spec, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:

        def broken(*arguments):
            raise RuntimeError("the simulator is on fire")

        patch.setattr(training_run.Evaluator, "run", broken)
        summary = inline.sweep(spec, tmp_path / "home")
    assert set(summary.statuses.values()) == {"failed"}
    assert all("on fire" in error for error in summary.errors.values())
    assert inline.sweep(spec, tmp_path / "home").ok


def test_a_stack_in_use_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LOCK_WAIT_S", 0.1)
    home = Home.find(tmp_path / "home")
    job = job_of(spec, home)
    with (
        stages.locked(home.stage(job.stack.stages[1].id)),
        pytest.raises(StackBusyError, match="another process is working in"),
    ):
        run_stack(job, lambda progress: None)


def test_what_a_process_is_at_is_not_cleaned_up(spec, tmp_path):
    home = Home.find(tmp_path / "home")
    job = job_of(spec, home)
    ids, seen = [stage.id for stage in job.stack.stages], set()

    def clean_up_beside(progress):
        clean_up(home, ids)
        seen.update(path.name for i in ids for path in home.stage(i).iterdir())

    assert run_stack(job, clean_up_beside) == "done"
    assert {"spool.jsonl", "checkpoints"} <= seen
    clean_up(home, ids)
    assert [path.name for i in ids for path in home.stage(i).iterdir()] == ["lock"] * 3


def test_changed_data_are_noticed_before_training(spec, tmp_path, monkeypatch):
    from harness import datasets

    home = Home.find(tmp_path / "home")
    job = job_of(spec, home)
    monkeypatch.setattr(datasets, "digest", lambda dataset_id: "0" * 64)
    with pytest.raises(datasets.DatasetError, match="the data changed since"):
        run_stack(job, lambda progress: None)
    assert last_status(home, job.stack.stages[0]) == "failed"


def test_another_simulator_version_is_refused(spec, tmp_path, monkeypatch):
    home = Home.find(tmp_path / "home")
    job = job_of(spec, home)
    found = type(training_run.environments.evaluation_environment("generated/bandit2d-v0"))
    monkeypatch.setattr(found, "simulator", property(lambda self: "mujoco 9.9"))
    with pytest.raises(ValueError, match=r"planned for .* this worker has 'mujoco 9\.9'"):
        run_stack(job, lambda progress: None)


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(spec, tmp_path):
    home = Home.find(tmp_path / "home")
    stop = tmp_path / "stop"
    job = stop_after_a_chunk(spec, home, stop)
    stop.unlink()
    (file,) = home.checkpoints(job.stack.stages[0].id).glob("*/state.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RuntimeError, match=r"state\.safetensors"):
        run_stack(job, lambda progress: None)


def lose_the_last_row(home: Home, job: Job) -> None:
    """As if the process had been killed between the artifact and the row that calls it done."""
    for stage in job.stack.stages:
        records = list(read(home.spool(stage.id)))
        home.spool(stage.id).unlink()
        with Spool(home.spool(stage.id)) as spool:
            spool.append(records[:-1])


def killed(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("again", [False, True], ids=["once", "and again while evaluating"])
def test_a_killed_publish_is_finished_by_evaluating_only(spec, tmp_path, monkeypatch, again):
    """The artifact is there, the run is not done: nothing is trained again."""
    whole, home_path = tmp_path / "whole", tmp_path / "home"
    inline.sweep(spec, whole)
    home = Home.find(home_path)
    job = job_of(spec, home)
    run_stack(job, lambda progress: None)
    lose_the_last_row(home, job)
    if again:
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "run", killed)
            with pytest.raises(KeyboardInterrupt):
                run_stack(job, lambda progress: None)
    phases = []
    assert run_stack(job, lambda progress: phases.append(progress.phase)) == "done"
    assert "train" not in phases
    assert inline.sweep(spec, home_path).trained == 0
    assert inline.rows(home_path) == inline.rows(whole)


def test_a_stage_that_was_published_before_a_kill_is_not_trained_again(spec, tmp_path, monkeypatch):
    """Of a stage that others need, which has no rows: its artifact alone tells."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    job = job_of(spec, Home.find(tmp_path / "home"), ["algorithms=[two_stage]"])
    assert job.stack.seeds == (0, 1, 2)
    publish, published = stages.publish, []

    def killed_after_two(job, stage, *arguments):
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(stage.seed)
        publish(job, stage, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "publish", killed_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_stack(job, lambda progress: None)
    advance, trained = Trainer.advance, set()

    def noted(trainer, *arguments):
        trained.add(tuple(trainer.seeds.tolist()))
        return advance(trainer, *arguments)

    monkeypatch.setattr(Trainer, "advance", noted)
    assert run_stack(job, lambda progress: None) == "done"
    assert (published, trained) == ([0, 1], {(2,)})


@pytest.mark.parametrize("asked", [False, True])
def test_a_compiled_run_compiles_acting_if_asked_also_when_it_is_finished_later(
    spec, tmp_path, asked, monkeypatch
):
    """What is left after a kill acts as the whole run did."""
    modes = []
    make = training_run.Evaluator

    def noted(*arguments):
        modes.append(arguments[-1])
        return make(*arguments)

    monkeypatch.setattr(training_run, "Evaluator", noted)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # only the choice
    home = Home.find(tmp_path / "home")
    job = job_of(spec, home, ["steps=20", "run.compile=on", f"run.compile_act={asked}"])
    run_stack(job, lambda progress: None)
    lose_the_last_row(home, job)
    run_stack(job, lambda progress: None)
    assert modes == [asked] * 2
    for stage in job.stack.stages:
        (*_, last) = (r for r in read(home.spool(stage.id)) if isinstance(r, RunRecord))
        assert [segment["compiled_act"] for segment in last.segments] == modes


LEFT = """
import psutil
from harness.memory import forget_the_last_stack

forget_the_last_stack()
held = lambda: psutil.Process().memory_info().rss
before = held()
size = 2000  # a product of constants would be one object
blocks = [b"x" * size for _ in range(600_000)]
used = held() - before
kept = blocks[::1000]  # the C library keeps what is freed between them
del blocks
assert held() - before > 0.9 * used > 1e9, (held() - before, used)
forget_the_last_stack()
assert held() - before < 0.2 * used, (held() - before, used)
"""


def test_memory_that_the_last_stack_left_is_given_back():
    """In a process of its own: what another test freed would be used again."""
    subprocess.run([sys.executable, "-c", LEFT], check=True, cwd=REPOSITORY)


KEPT = """
import resource
import torch
from harness.memory import keep_freed_memory

def mib_of_faults(sizes):
    # Larger than all before: from the system, unless what was freed is kept.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mib in sizes:
        torch.ones(mib * 2**18)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize() / 2**20

assert mib_of_faults(range(1, 15)) > 0.8 * sum(range(1, 15))
keep_freed_memory()
# 0.09 to 0.26 by where the heap ends; all of it unless kept.
assert mib_of_faults(range(15, 30)) < 0.5 * sum(range(15, 30))
"""


def test_what_tensors_free_is_used_again_within_a_stack():
    """In a process of its own: the setting stays."""
    subprocess.run([sys.executable, "-c", KEPT], check=True, cwd=REPOSITORY)


def test_what_the_last_stack_left_in_cycles_is_freed_before_the_next_one(spec, tmp_path):
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.memory = self, torch.ones(8)

    assert run_stack(job_of(spec, Home.find(tmp_path / "one")), lambda progress: None) == "done"
    cycles = [weakref.ref(Cycle()) for _ in range(10)]
    gc.disable()
    try:
        assert run_stack(job_of(spec, Home.find(tmp_path / "two")), lambda progress: None) == "done"
        assert not any(reference() for reference in cycles)
    finally:
        gc.enable()


def test_a_stack_that_waited_until_the_sweep_was_stopped_does_not_start(spec, tmp_path):
    home, stop = Home.find(tmp_path / "home"), tmp_path / "stop"
    stop.touch()
    assert run_stack(job_of(spec, home, stop_file=stop), lambda progress: None) == "interrupted"
    assert not home.work.exists()
