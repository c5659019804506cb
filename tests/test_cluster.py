"""A cluster of several nodes, for real, on loopback: trials run on all of them and survive one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from harness import cluster
from harness.cluster import ClusterError, LocalCluster, Node
from tests import inline, mapped
from tests.processes import harness, ray_workers, wait_for, work_files

SPEC = """
name: nodes
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-3
steps: 3000
evaluation: {every: 500, episodes: 3}
run: {log_every: 50, checkpoint_every: 100, compile: "off", device: cpu, max_stack: 1}
"""


@pytest.fixture
def spec_of_few_steps(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "nodes.yaml"
    path.write_text(SPEC.replace("3000", "100").replace("500", "50").replace("0-3", "0-2"))
    return path


def test_impossible_clusters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 nodes with 0 CPUs; expected at least 1 node"):
        cluster.up(tmp_path, nodes=0)
    assert not list(tmp_path.iterdir())


def test_a_second_cluster_of_one_home_is_refused_and_only_its_own_processes_end(tmp_path):
    """`down` knows processes by number and by when they began: a number may be another's by now."""
    ours = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    others = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    nodes = (
        Node(ours.pid, psutil.Process(ours.pid).create_time()),
        Node(others.pid, psutil.Process(others.pid).create_time() - 5.0),
    )
    LocalCluster({"RAY_ADDRESS": "127.0.0.2:1"}, str(scratch), nodes).save(tmp_path)
    with pytest.raises(ClusterError, match=r"runs already, at 127.0.0.2:1.*harness cluster down"):
        cluster.up(tmp_path, nodes=1)
    assert cluster.down(tmp_path) == 1
    assert ours.poll() is not None
    assert others.poll() is None
    assert not scratch.exists()
    assert cluster.find(tmp_path) is None
    assert cluster.down(tmp_path) == 0
    others.communicate(b"\n", timeout=30)


def test_what_a_start_of_ray_left_that_failed_is_ended_and_nothing_else():
    from harness import tune

    earlier = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = set(psutil.Process().children(recursive=True))
    starts_another = "import subprocess as s, sys; s.run([sys.executable, '-c', 'input()'])"
    left = subprocess.Popen([sys.executable, "-c", starts_another], stdin=subprocess.PIPE)
    while len(found := psutil.Process(left.pid).children()) < 1:
        time.sleep(0.01)
    tune._end_start(before)
    assert left.poll() is not None
    assert not found[0].is_running() or found[0].status() == psutil.STATUS_ZOMBIE
    assert earlier.poll() is None
    earlier.communicate(b"\n", timeout=30)


def test_a_ray_that_does_not_start_says_what_to_do_instead():
    from harness import tune

    said = tune.not_started(RuntimeError("the raylet timed out; overloaded.\n"), None)
    assert "; overloaded. Tried a local cluster" in said
    assert said.endswith("or `harness work SPEC`, which needs no Ray")
    assert "RAY_ADDRESS=127.0.0.1:1; unset it" in tune.not_started(OSError("x"), "127.0.0.1:1")


def test_workers_map_the_data_of_their_node_also_where_a_sweep_takes_several_tuners(
    tmp_path, spec_of_few_steps, monkeypatch
):
    """Rows equal those of a process that read its own."""
    from harness import tune

    fit, tuners = tune._fit, []

    def counted(queue, *arguments):
        tuners.append(queue.completed_stacks)
        return fit(queue, *arguments)

    def through_ray(queue, on_interrupt):
        with tune.cluster():
            tune.run_queue(queue, queue.experiment.run, on_interrupt)
        assert tuners == [0, 2]

    monkeypatch.setattr(tune, "_fit", counted)
    monkeypatch.setattr(tune, "_train_stack", mapped.train_without_reading)
    monkeypatch.setattr(tune, "STACKS_OF_A_TUNER", 2)
    monkeypatch.setattr(tune, "ROUNDS_OF_A_TUNER", 0)
    spec, homes = spec_of_few_steps, (tmp_path / "alone", tmp_path / "ray")
    summary = inline.sweep(spec, homes[1], run_queue=through_ray)
    assert summary.ok, summary.errors
    assert inline.sweep(spec, homes[0]).ok
    assert inline.rows(homes[0]) == inline.rows(homes[1])


def test_data_that_cannot_be_read_in_the_driver_are_left_to_the_worker(bandit):
    from harness import tune

    stage = SimpleNamespace(dataset_id=bandit, dataset_digest="0" * 64, data={})
    assert tune._NodeData().of(stage) is None


def test_what_is_remembered_and_cannot_be_read_is_named(tmp_path):
    (tmp_path / cluster.STATE).write_text("{}")
    with pytest.raises(ClusterError, match=r"cluster\.json cannot be read"):
        cluster.down(tmp_path)


@contextlib.contextmanager
def two_nodes(folder: Path):
    folder.mkdir()
    started = cluster.up(folder, nodes=2, cpus=1)
    family = [p for n in started.nodes for p in psutil.Process(n.pid).children(recursive=True)]
    try:
        yield started
    finally:
        assert cluster.down(folder) >= 1
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "a process of the cluster outlived it"


@pytest.mark.slow
def test_trials_move_when_a_node_is_lost_and_rows_equal_those_of_one_node(bandit, tmp_path):
    """Two sweeps on two nodes, one of them in peace; the other loses a node in the middle."""
    spec, whole = tmp_path / "nodes.yaml", tmp_path / "whole"
    spec.write_text(SPEC)
    assert inline.sweep(spec, whole).ok
    with two_nodes(tmp_path / "cluster") as started:
        environment = {**os.environ, **started.environment}

        def sweep(home: Path) -> subprocess.Popen:
            return harness("sweep", str(spec), "--home", str(home), env=environment)

        def working() -> int:
            return sum(bool(ray_workers(node.pid)) for node in started.nodes if node.process())

        home = tmp_path / "peace"
        process = sweep(home)
        assert wait_for(lambda: working() == 2, process=process), "both nodes were to train"
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert inline.rows(home) == inline.rows(whole)

        home, lost = tmp_path / "lost", started.nodes[1]
        process = sweep(home)
        assert wait_for(lambda: work_files(home) > 10_000 and working() == 2, process=process), (
            "the node was to be lost in the middle"
        )
        (raylet,) = [
            child
            for child in psutil.Process(lost.pid).children(recursive=True)
            if child.name() == "raylet"
        ]
        trainers = ray_workers(lost.pid)
        raylet.kill()
        _, alive = psutil.wait_procs(trainers, timeout=30)
        assert not alive, "training goes on 30 s after the node was lost"
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        assert inline.rows(home) == inline.rows(whole)
