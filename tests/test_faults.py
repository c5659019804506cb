"""kill -9 for real, at random points: the final rows equal an uninterrupted run's."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from harness import datasets, provenance, watchdog
from harness.artifacts import ArtifactError, ArtifactStore
from harness.datasets import DatasetError
from harness.datasets.bandit2d import make_bandit2d
from harness.datasets.record import DIGEST_FILE
from harness.environments import Bandit2D
from harness.ingest import Ingester
from harness.job import Job
from harness.plan import make_plan
from harness.spec import load_experiment
from harness.sweep import plan_sweep
from harness.worker import run_stack
from tests import inline
from tests.processes import REPOSITORY, harness, ray_workers, wait_for, work_files

TWO_DRIVERS = """
import sys
from pathlib import Path
from harness import stages, sweep
sweep.BUSY_RETRY_S, stages.LOCK_WAIT_S = 0.5, 0.2
from tests import inline
summary = inline.sweep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
sys.exit(not summary.ok)
"""

HUNG = """
import sys, time
from pathlib import Path
from harness.evaluate import Evaluator
from tests import inline

def play(self, k, slot, action):
    time.sleep(1000)

Evaluator._play = play
inline.sweep(Path(sys.argv[1]), Path(sys.argv[2]), ["steps=100", "run.stale_after_s=2"])
"""

SPEC = """
name: faults
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 3000
evaluation: {every: 500, episodes: 3}
run: {log_every: 50, checkpoint_every: 100, compile: "off", device: cpu, max_stack: 2}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str) -> Path:
    path = tmp_path / "faults.yaml"
    path.write_text(SPEC)
    return path


def job_of(experiment, home, stop_file) -> Job:
    plan = make_plan(experiment, None, ArtifactStore(home.artifacts), home.work)
    return Job(plan.ready()[0], experiment.run, home, {}, stop_file)


@pytest.mark.parametrize("points", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_points_leaves_the_rows_of_an_uninterrupted_run(
    spec, tmp_path, points
):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    smaller = {"steps": 240, "every": 80, "log_every": 10, "checkpoint_every": 20}
    for name, value in smaller.items():
        spec.write_text(re.sub(rf"\b{name}: \d+", f"{name}: {value}", spec.read_text()))
    assert inline.sweep(spec, whole).ok
    command = [sys.executable, "-m", "tests.killing", str(spec), str(folder), str(points)]
    killing = subprocess.run(command, cwd=REPOSITORY, check=True, timeout=600, capture_output=True)
    told = json.loads(killing.stdout)
    assert told["kills"] == points
    assert told["steps_lost_at_most"] <= load_experiment(spec, []).run.checkpoint_every
    rows = inline.rows(whole)
    for number in range(told["sweeps"]):
        assert inline.rows(folder / str(number)) == rows
    print(told)


def test_two_drivers_on_one_spec_train_every_trial_once(spec, tmp_path):
    whole, home = tmp_path / "whole", tmp_path / "both"
    assert inline.sweep(spec, whole, ["steps=500"]).ok
    command = [sys.executable, "-c", TWO_DRIVERS, str(spec), str(home), "steps=500"]
    drivers = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [driver.wait(timeout=180) for driver in drivers] == [0, 0]
    assert inline.rows(home) == inline.rows(whole)
    with inline.Store.open(inline.Home.find(home).database_url()) as store:
        segments = [len(found) for found in store.runs()["segments"]]
    assert segments == [1, 1, 1], "nobody began what another had begun"


def test_a_sweep_that_was_planned_before_another_was_done_trains_nothing_again(spec, tmp_path):
    home, arguments = inline.Home.find(tmp_path / "home"), ["steps=100", "evaluation.every=50"]
    with inline.Store.open(home.database_url()) as store:
        late = plan_sweep(load_experiment(spec, arguments), store, home)
        assert inline.sweep(spec, home.root, arguments).trained == 2
        summary = inline.sweep(spec, home.root, arguments, plan=late)
        assert (summary.ok, summary.trained) == (True, 0)
        assert [len(found) for found in store.runs()["segments"]] == [1, 1, 1]


def test_a_hung_evaluation_is_ended_and_named_and_does_not_take_the_sweep_along(
    spec, tmp_path, bandit
):
    """In a process of its own, which the watchdog ends; then the driver's part of it."""
    home = inline.Home.find(tmp_path / "home")
    hung = subprocess.run(
        [sys.executable, "-c", HUNG, str(spec), str(home.root)], cwd=REPOSITORY, timeout=120
    )
    assert hung.returncode == 1
    (stale,) = home.work.glob("*/stale")
    reason = watchdog.report(stale, 2.0).splitlines()[-1]
    assert reason.startswith("no progress for 2 s")
    assert "<string>" in reason, "the line of the environment that hangs"
    assert inline.sweep(spec, home.root, ["steps=100"]).ok
    assert not list(home.work.glob("*/stale"))


@pytest.mark.slow
@pytest.mark.parametrize("stale_after_s", [2, 3600], ids=["twice the grace period", "less"])
def test_what_comes_late_from_a_stopped_process_is_recorded_once(spec, tmp_path, stale_after_s):
    """SIGSTOP for 4 s, while another driver wants the same stages, then SIGCONT."""
    whole, home = tmp_path / "whole", tmp_path / "stopped"
    overrides = ["steps=1000", f"run.stale_after_s={stale_after_s}"]
    assert inline.sweep(spec, whole, overrides).ok
    command = [sys.executable, "-c", TWO_DRIVERS, str(spec), str(home), *overrides]
    late = subprocess.Popen(command, cwd=REPOSITORY)
    assert wait_for(lambda: work_files(home) > 5_000, process=late)
    late.send_signal(signal.SIGSTOP)
    other = subprocess.Popen(command, cwd=REPOSITORY)
    time.sleep(4.0)
    late.send_signal(signal.SIGCONT)
    assert late.wait(timeout=300) == (1 if stale_after_s == 2 else 0)
    assert other.wait(timeout=300) == 0
    assert inline.rows(home) == inline.rows(whole)
    assert not list(inline.Home.find(home).work.glob("*/stale"))


class _Clock(datetime):
    """The time of day of a machine whose clock is off."""

    off = timedelta(0)

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + cls.off


def test_clocks_that_differ_by_an_hour_make_nothing_stale_and_hide_no_outcome(
    spec, tmp_path, monkeypatch
):
    """Stopped by a clock that is fast, failed by one that is slow, finished by a third."""
    whole, home = tmp_path / "whole", inline.Home.find(tmp_path / "clocks")
    arguments = ["steps=200", "evaluation.every=100", "run.checkpoint_every=50"]
    assert inline.sweep(spec, whole, arguments).ok
    now = time.time
    monkeypatch.setattr(provenance, "datetime", _Clock)

    def off_by(hours: float) -> None:
        monkeypatch.setattr(_Clock, "off", timedelta(hours=hours))
        monkeypatch.setattr(time, "time", lambda: now() + 3600.0 * hours)

    def status() -> set[str]:
        with inline.Store.open(home.database_url()) as store:
            return {run.status for run in store.statuses().values()}

    off_by(+1)
    stop = home.stop_file()
    monkeypatch.setattr(inline.Home, "stop_file", lambda home: stop)
    report = Ingester.stage

    def stop_soon(self, stage_id: str) -> int:
        if "interrupted" not in status():
            stop.touch()
        return report(self, stage_id)

    with monkeypatch.context() as patch:
        patch.setattr(Ingester, "stage", stop_soon)
        assert inline.sweep(spec, home.root, arguments).interrupted
    assert status() == {"interrupted"}

    off_by(-1)
    with monkeypatch.context() as patch:
        patch.setattr(Bandit2D, "step", failing())
        summary = inline.sweep(spec, home.root, arguments)
    assert set(summary.statuses.values()) == {"failed"}
    assert status() == {"failed"}, "an end that came two hours 'before' the stop is the last one"

    off_by(0)
    assert inline.sweep(spec, home.root, arguments).ok
    assert inline.rows(home.root) == inline.rows(whole)
    assert not list(home.work.glob("*/stale"))


def failing(times: float = math.inf):
    """The bandit's `step`, which fails so many times after the one that preflight tries."""
    step, left = Bandit2D.step, [1, times]

    def unwell(self, action):
        if left[0]:
            left[0] -= 1
        elif left[1]:
            left[1] -= 1
            raise RuntimeError("the simulator is unwell")
        return step(self, action)

    return unwell


def test_a_failing_environment_is_counted_and_named_and_never_scored(spec, tmp_path, monkeypatch):
    whole, home = tmp_path / "whole", tmp_path / "home"
    arguments = ["steps=100", "evaluation.every=100"]
    assert inline.sweep(spec, whole, arguments).ok
    expected = inline.rows(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Bandit2D, "step", failing())
        summary = inline.sweep(spec, home, arguments)
    assert set(summary.statuses.values()) == {"failed"}
    for error in summary.errors.values():
        assert re.search(
            r"failed twice in episode 0 \(env seed 0\) at step 1: RuntimeError: the sim", error
        )
    assert inline.rows(home)["evals"] == []

    monkeypatch.setattr(Bandit2D, "step", failing(2))  # once in each of two episodes
    assert inline.sweep(spec, home, arguments).ok
    rows = inline.rows(home)
    counted = [row for row in rows["metrics"] if row[2] == "evaluation_retries"]
    assert sum(row[3] for row in counted) == 2.0
    assert [row for row in rows["metrics"] if row not in counted] == expected["metrics"]
    assert rows["evals"] == expected["evals"]


@pytest.mark.parametrize("kind", ["checkpoint", "artifact"])
def test_any_flipped_byte_is_found(spec, tmp_path, kind):
    home = inline.Home.find(tmp_path / "home")
    arguments = ["steps=300"]
    if kind == "checkpoint":
        stop = tmp_path / "stop"
        job = job_of(load_experiment(spec, arguments), home, stop)
        assert run_stack(job, lambda progress: stop.touch()) == "interrupted"
        folder = next(path for path in home.work.glob("*/checkpoints"))
    else:
        assert inline.sweep(spec, home.root, arguments).ok
        folder = home.artifacts
    store = ArtifactStore(folder)
    name = sorted(path.name for path in folder.iterdir() if path.is_dir())[-1]
    files = sorted(path for path in (folder / name).iterdir() if path.name != "manifest.json")
    rng, found = random.Random(0), 0
    for _ in range(100):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        path.chmod(0o644)
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=re.escape(path.name)):
            store.verify(name)
        found += 1
        content[place] ^= bit
        path.write_bytes(content)
    store.verify(name)
    assert found == 100


@pytest.mark.parametrize("flips", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_any_flipped_byte_of_a_dataset_is_found(tmp_path, monkeypatch, flips):
    """`verify` names the file; what is loaded for training is what was recorded, or refused."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    name = make_bandit2d(seed=0, steps=400).id
    folder = tmp_path / "data" / name
    datasets.verify(name)
    recorded, record = datasets.digest(name), (folder / DIGEST_FILE).read_bytes()
    files = sorted(path for path in (folder / "data").iterdir())
    rng, found, harmless = random.Random(0), 0, 0
    for _ in range(flips):
        path = rng.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=re.escape(str(path))):
            datasets.verify(name)
        found += 1
        try:
            assert datasets.load_raw(name).digest == recorded
            harmless += 1
        except DatasetError as error:
            refused = str(error)
            assert name in refused
        path.write_bytes(whole)
        (folder / DIGEST_FILE).write_bytes(record)
    assert found == flips
    print(f"{harmless} of {flips} flips were outside of what is trained on, and loaded as recorded")
    assert datasets.load_raw(name).digest == recorded


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
            lambda before=before: work_files(home) > before and ray_workers(process.pid),
            process=process,
        ):
            break
        time.sleep(rng.uniform(0.0, 1.0))
        for child in ray_workers(process.pid)[:1]:
            child.kill()
            killed["worker"] += 1
    for _ in range(2):
        before = work_files(home)
        if wait_for(lambda before=before: work_files(home) > before, process=process):
            time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() is None:
            trainers = ray_workers(process.pid)
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
