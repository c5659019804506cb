"""What would fail later fails before anything starts, all of it at once; and memory measured."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from algorithms.bc import BehaviourCloning
from algorithms.testing import TinyDataset
from harness import cli, memory, preflight
from harness.artifacts import ArtifactStore
from harness.datasets.bandit2d import make_bandit2d, make_ring2d
from harness.environments import Bandit2D
from harness.home import Home
from harness.job import Job
from harness.memory import GIB, Capacity, Cost, available_bytes, peak_bytes, stack_size
from harness.plan import UNSIZED, make_plan
from harness.preflight import PreflightError, Probe, check, refuse
from harness.registry import Registry
from harness.spec import RunOptions, load_experiment
from harness.trainer import Trainer
from harness.work import Shard
from harness.worker import run_stack
from results.store import Store
from tests import inline

SPEC = """
name: preflight
algorithms:
  bc: {config: {hidden_dim: 8, batch_size: 8}}
  wide: {algorithm: bc, config: {hidden_dim: 64, batch_size: 8}}
datasets: [generated/bandit2d-v0, generated/ring2d-v0]
seeds: 0-4
steps: 20
evaluation: {every: 10, episodes: 2}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With data of its own, which a test may damage."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    make_bandit2d(steps=400)
    make_ring2d(steps=400)
    path = tmp_path / "preflight.yaml"
    path.write_text(SPEC)
    return path


def checks(spec: Path, overrides=(), store: Store | None = None):
    experiment = load_experiment(spec, list(overrides))
    home = Home.find()
    probe = Probe(experiment.run, Registry())
    artifacts = ArtifactStore(home.artifacts)
    plan = make_plan(experiment, store, artifacts, home.work, sizes=probe.sizes)
    return plan, {item.name: item for item in check(plan, store, home, probe)}


def flip_a_byte(folder: Path) -> None:
    (path,) = folder.rglob("*.hdf5")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk would


def test_every_problem_is_named_at_once_and_nothing_is_started(spec, tmp_path, monkeypatch):
    experiment = load_experiment(spec, [])  # also records the datasets' hashes
    home = Home.find()
    with Store.open(home.database_url()):
        pass
    flip_a_byte(tmp_path / "datasets" / "generated" / "ring2d-v0")
    monkeypatch.setattr(preflight, "ROWS_BYTES", 1 << 60)
    loss = BehaviourCloning.update

    def broken(learner, batch, rng):
        if learner.config.hidden_dim == 64:
            raise RuntimeError("shapes do not match")
        return loss(learner, batch, rng)

    monkeypatch.setattr(BehaviourCloning, "update", broken)
    started = time.perf_counter()
    with Store.open(home.database_url(), read_only=True) as store:
        probe = Probe(experiment.run, Registry())
        plan = make_plan(experiment, store, ArtifactStore(home.artifacts), home.work)
        with pytest.raises(PreflightError) as refused:
            refuse(check(plan, store, home, probe))
    assert time.perf_counter() - started < 60.0
    lines = str(refused.value).splitlines()
    assert lines[0] == "nothing was started, because of 4 problems:"
    expected = "  wide (policy) on generated/bandit2d-v0: RuntimeError: shapes do not match"
    assert lines[1] == expected
    assert lines[2].startswith("  generated/ring2d-v0: ")
    assert "has changed" in lines[2]
    assert "disk: " in lines[3]
    assert "--home" in lines[3]
    assert "database: " in lines[4]

    def never(queue, on_interrupt):
        raise AssertionError("a stack was scheduled")

    with pytest.raises(PreflightError, match="3 problems"):
        inline.sweep(spec, home.root, run_queue=never)
    assert not list(home.work.glob("*/spool.jsonl"))


def test_an_environment_that_breaks_at_its_first_step_is_found(spec, monkeypatch):
    step = Bandit2D.step

    def broken(env, action):
        obs, *rest = step(env, action)
        return obs * np.nan, *rest

    monkeypatch.setattr(Bandit2D, "step", broken)
    _, found = checks(spec)
    assert found["generated/bandit2d-v0"].state == "bad"
    assert "not finite after one step" in found["generated/bandit2d-v0"].text
    assert "generated/ring2d-v0" not in found
    assert "trials" not in found


def test_a_sound_sweep_passes_and_nothing_to_do_asks_for_nothing(spec):
    home = Home.find()
    with Store.open(home.database_url()) as store:
        _, found = checks(spec, (), store)
        assert {item.state for item in found.values()} == {"ok"}
        assert "2 datasets read" in found["trials"].text
        assert "20 of 20 trainings" in found["trials"].text
    assert inline.sweep(spec, home.root, ["seeds=0"]).ok
    with Store.open(home.database_url()) as store:
        assert checks(spec, ["seeds=0"], store)[1] == {}


def test_a_dry_run_shows_checks_and_memory_and_fails_if_the_sweep_would(spec, monkeypatch):
    result = CliRunner().invoke(cli.app, ["sweep", str(spec), "--dry-run", "--json"])
    assert result.exit_code == cli.OK
    plan = json.loads(result.stdout)
    assert {item["state"] for item in plan["checks"]} == {"ok"}
    by_label = {stack["labels"][0]: stack["bytes"] for stack in plan["stacks"]}
    assert memory.WORKER_BYTES["cpu"] < by_label["bc"] < by_label["wide"]
    monkeypatch.setattr(preflight, "ROWS_BYTES", 1 << 60)
    result = CliRunner().invoke(cli.app, ["sweep", str(spec), "--dry-run"])
    assert result.exit_code == cli.ENVIRONMENT
    assert "GiB needed in" in " ".join(result.stdout.split())


def test_only_what_one_seed_cannot_do_without_is_refused_for_memory(spec, monkeypatch):
    for each, state in ((int(0.1 * GIB), "bad"), (int(0.62 * GIB), "note"), (2 * GIB, "ok")):
        capacity = Capacity("cpu", 1, each)
        monkeypatch.setattr(Capacity, "of", classmethod(lambda cls, run, c=capacity: c))
        monkeypatch.setattr(preflight, "stack_bytes", lambda *_: GIB)
        assert checks(spec)[1]["memory"].state == state


# ------------------------------------------------------------------------------ what is measured


def test_peak_bytes_counts_what_is_alive_at_once_and_nothing_twice():
    held = torch.zeros(1000)

    def work():
        first = held + 1  # 4000 bytes
        view = first.view(10, 100)  # none
        first.add_(1)  # none
        second = view * 2  # 8000 at once
        del first, view
        return second.view(-1) + held  # 8000 again

    assert peak_bytes(work) == 8000
    assert peak_bytes(lambda: held.view(10, 100)) == 0


def test_a_stack_needs_what_its_seeds_need():
    recipe = Registry().get("bc")
    config = recipe.config(hidden_dim=64, batch_size=64)
    dataset = TinyDataset()

    def measured(seeds: tuple[int, ...]) -> int:
        learner = recipe.stages(config)[-1].learner(config, dataset.spec, seeds, {})
        trainer = Trainer(learner, dataset, seeds, torch.device("cpu"), False)
        return peak_bytes(lambda: trainer.advance(1))

    one, four = measured((0,)), measured((0, 1, 2, 3))
    assert four == pytest.approx(4 * one, rel=0.02)
    assert one > sum(
        p.nbytes for p in BehaviourCloning(config, dataset.spec, (0,), {}).parameters()
    )


def test_probing_leaves_no_trace_in_what_is_trained(spec, tmp_path):
    """The same rows whether the learners were tried in this process before or not."""
    few = ["datasets=[generated/bandit2d-v0]", "seeds=0-1"]
    assert inline.sweep(spec, tmp_path / "probed", [*few, "run.max_stack=auto"]).ok
    experiment = load_experiment(spec, few)
    home = Home.find(tmp_path / "plain")
    plan = make_plan(experiment, None, ArtifactStore(home.artifacts), home.work)
    for stack in plan.stacks:
        run_stack(Job(stack, experiment.run, home, {}), lambda progress: None)
    assert inline.sweep(spec, home.root, few).trained == 0
    assert inline.rows(tmp_path / "probed") == inline.rows(tmp_path / "plain")


# ---------------------------------------------------------------------------- how many seeds


COST = Cost(state=10 << 20, working=90 << 20, dataset=100 << 20)
EAGER = RunOptions(device="cpu", compile="off", max_stack="auto")


def test_seeds_are_spread_over_cores_first_and_stacked_beyond():
    capacity = Capacity("cpu", slots=4, each=64 * GIB)
    sizes = [stack_size(EAGER, capacity, COST, 1000, left) for left in (1, 4, 5, 8, 9, 100)]
    assert sizes == [1, 1, 2, 2, 3, 25]


def test_what_does_not_fit_is_not_stacked():
    room = memory.WORKER_BYTES["cpu"] + COST.dataset + 3 * (100 << 20)
    assert stack_size(EAGER, Capacity("cpu", 1, room), COST, 1000, 100) == 3
    assert stack_size(EAGER, Capacity("cpu", 1, room - 1), COST, 1000, 100) == 2
    assert stack_size(EAGER, Capacity("cpu", 1, 0), COST, 1000, 100) == 1
    assert stack_size(EAGER, Capacity("cuda", 1, 1000 * GIB), COST, 1000, 999) == memory.MOST_SEEDS
    assert stack_size(EAGER, Capacity("cuda", 1, None), COST, 1000, 999) == UNSIZED
    assert stack_size(EAGER, Capacity("cpu", 1, GIB), None, 1000, 999) == UNSIZED


def test_a_compiled_step_on_a_cpu_trains_one_seed(monkeypatch):
    from harness import trainer

    monkeypatch.setattr(trainer, "compiler", lambda: "g++")
    compiled = replace(EAGER, compile="auto")
    capacity = Capacity("cpu", 2, 64 * GIB)
    assert stack_size(compiled, capacity, COST, 10_000, 100) == 1
    assert stack_size(compiled, capacity, COST, 9_999, 100) == 50
    assert stack_size(compiled, Capacity("cuda", 2, 64 * GIB), COST, 10_000, 100) == 50


def test_memory_is_what_a_container_may_use(tmp_path):
    (tmp_path / "memory.max").write_text(f"{10 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{4 << 20}\n")
    assert available_bytes(tmp_path) == 6 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 6 << 20


def test_auto_plans_stacks_for_this_machine(spec):
    slots = Capacity.of(EAGER).slots
    plan, _ = checks(spec, ["run.max_stack=auto"])
    most = min(5, -(-20 // slots))
    assert max(len(stack.stages) for stack in plan.stacks) == most
    assert sorted(s.id for stack in plan.stacks for s in stack.stages) == sorted(plan.stages)


def test_shares_of_an_automatic_sweep_are_the_same_everywhere(spec):
    for extra, count, largest in ((), 20, 1), (("run.device=cuda",), 4, 5):
        experiment = load_experiment(spec, ["run.max_stack=auto", *extra])
        shares = [Shard(index, count).of(experiment).trials for index in range(count)]
        assert {len(share) for share in shares} == {largest}
        assert len({trial.id for share in shares for trial in share}) == 20
