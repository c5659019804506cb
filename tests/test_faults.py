"""kill -9 for real, at random points: the final rows equal an uninterrupted run's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import inline

REPOSITORY = Path(__file__).resolve().parents[1]

SPEC = """
name: faults
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 6000
evaluation: {every: 500, episodes: 3}
run: {log_every: 50, checkpoint_every: 100, compile: "off", device: cpu, max_stack: 2}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "faults.yaml"
    path.write_text(SPEC)
    return path


def wait_for(condition, timeout_s: float = 120.0, process: subprocess.Popen | None = None) -> bool:
    """True as soon as the condition holds; False if the process ended before it did."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("the sweep made no progress")
        time.sleep(0.01)
    return True


def work_files(home: Path) -> int:
    return sum(path.stat().st_size for path in home.glob("work/*/spool.jsonl"))


def test_a_process_killed_at_random_points_leaves_the_rows_of_an_uninterrupted_run(spec, tmp_path):
    whole, home = tmp_path / "whole", tmp_path / "killed"
    assert inline.sweep(spec, whole).ok
    command = [sys.executable, "-m", "tests.inline", str(spec), str(home)]
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=REPOSITORY)
        before = work_files(home)
        if wait_for(lambda before=before: work_files(home) > before, process=process):
            time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    assert inline.rows(home) == inline.rows(whole)


def harness(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def ray_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, among the children of a sweep's driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "_train_stack" in child.name() or any(
                "_train_stack" in part or "ImplicitFunc" in part for part in child.cmdline()
            ):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_killed_ray_workers_and_drivers_lose_and_repeat_nothing(spec, tmp_path):
    whole, home = tmp_path / "whole", tmp_path / "killed"
    assert inline.sweep(spec, whole).ok
    arguments = ("sweep", str(spec), "--home", str(home))
    rng = random.Random(1)
    killed = {"worker": 0, "driver": 0}

    process = harness(*arguments)
    for _ in range(2):
        before = work_files(home)
        if not wait_for(
            lambda before=before: work_files(home) > before and ray_workers(process),
            process=process,
        ):
            break
        time.sleep(rng.uniform(0.0, 1.0))
        for child in ray_workers(process)[:1]:
            child.kill()
            killed["worker"] += 1
    for _ in range(2):
        before = work_files(home)
        if wait_for(lambda before=before: work_files(home) > before, process=process):
            time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() is None:
            trainers = ray_workers(process)
            process.kill()
            killed["driver"] += 1
            _, alive = psutil.wait_procs(trainers, timeout=30)
            assert not alive, f"training goes on 30 s after the driver was killed: {alive}"
        process.wait()
        process = harness(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert killed["worker"] >= 1
    assert killed["driver"] >= 1
    assert inline.rows(home) == inline.rows(whole)


@pytest.mark.slow
def test_ctrl_c_finishes_the_chunk_and_the_same_command_continues(spec, tmp_path):
    whole, home = tmp_path / "whole", tmp_path / "stopped"
    assert inline.sweep(spec, whole).ok
    arguments = ("sweep", str(spec), "--home", str(home), "run.max_concurrent=1")
    process = harness(*arguments, start_new_session=True)
    assert wait_for(lambda: work_files(home) > 20_000, process=process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command continues" in output
    statuses = {run[3] for run in inline.rows(home)["runs"]}
    assert "interrupted" in statuses
    process = harness(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert inline.rows(home) == inline.rows(whole)
