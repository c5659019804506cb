"""Many tiny trials through Ray: what a trial costs besides its work, and where.

    python benchmarks/load.py --quick        200 trials
    python benchmarks/load.py                2,000 trials and a million evaluation rows

Splits the time that a trial holds a worker into its own work (data, steps, episodes), spool,
database (in the driver) and the rest: scheduling, that is Ray and the start of processes. Meanwhile
it samples the driver's memory and asks `harness status`. The machine should be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from database import make_evals, make_parents

from harness import spool, tune
from harness.datasets.bandit2d import make_bandit2d
from harness.display import Display
from harness.home import Home
from harness.ingest import Ingester
from harness.spec import load_experiment
from harness.spool import Spool
from harness.sweep import run_sweep
from results.store import Store

SPEC = """
name: load
algorithms: {{bc: {{config: {{hidden_dim: 8, batch_size: 8}}}}}}
datasets: [generated/bandit2d-v0]
seeds: 0-{last}
steps: 4
evaluation: {{every: 2, episodes: 1}}
run: {{log_every: 2, compile: "off", device: cpu, max_stack: 1}}
"""
SAMPLE_S = 1.0
STATUS_EVERY_S = 20.0


def drive(spec: Path, home: Home) -> None:
    """A sweep in this process; prints what the database took, as JSON."""
    from rich.console import Console

    seconds = [0.0]
    read = Ingester._file

    def timed(self: Ingester, path: Path) -> int:
        began = time.perf_counter()
        try:
            return read(self, path)
        finally:
            seconds[0] += time.perf_counter() - began

    Ingester._file = timed  # type: ignore[method-assign]
    experiment = load_experiment(spec, [])

    def run_queue(queue, on_interrupt) -> None:
        with tune.cluster():
            tune.run_queue(queue, experiment.run, on_interrupt)

    with Store.open(home.database_url()) as store:
        quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
        summary = run_sweep(experiment, store, home, lambda n: Display(quiet, n), run_queue)
    print(json.dumps({"ok": summary.ok, "seconds": summary.seconds, "database": seconds[0]}))


def spool_seconds(home: Home) -> float:
    """Mean time that the spool of one trial takes to write, append by append as a worker does."""
    found = sorted(home.artifacts.glob("*/spool.jsonl"))[:50]
    total = 0.0
    for number, path in enumerate(found):
        lines = path.read_bytes().splitlines(keepends=True)
        records = [spool._unpack(json.loads(line)) for line in lines]
        began = time.perf_counter()
        with Spool(home.root / "again" / f"{number}.jsonl") as again:
            for part in records:
                again.append(part)
        total += time.perf_counter() - began
    return total / len(found)


def measure(trials: int, folder: Path) -> None:
    spec, home = folder / "load.yaml", Home.find(folder / "home")
    spec.write_text(SPEC.format(last=trials - 1))
    Store.open(home.database_url()).close()
    command = [sys.executable, __file__, "--drive", str(spec), str(home.root)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process, memory, latencies, asked = psutil.Process(driver.pid), [], [], time.monotonic()
    while driver.poll() is None:
        memory.append(process.memory_info().rss / 2**20)
        if time.monotonic() - asked > STATUS_EVERY_S:
            asked = time.monotonic()
            status = [sys.executable, "-m", "harness.cli", "status", "--home", str(home.root)]
            began = time.perf_counter()
            subprocess.run(status, check=True, stdout=subprocess.DEVNULL)
            latencies.append(time.perf_counter() - began)
        time.sleep(SAMPLE_S)
    output, _ = driver.communicate()
    if driver.returncode or not (told := json.loads(output))["ok"]:
        raise SystemExit("the sweep failed")
    slots = os.cpu_count() or 1
    with Store.open(home.database_url(), read_only=True) as store:
        work = statistics.mean(sum(timings.values()) for timings in store.runs()["timings"])
    held = told["seconds"] * slots / trials
    spooled, stored = spool_seconds(home), told["database"] / trials
    print(f"{trials} trials in {told['seconds']:.0f} s on {slots} cores")
    for what, value in (
        ("a trial holds a worker for", held),
        ("  of this its own work (data, 4 steps, 3 evaluations)", work),
        ("  spool", spooled),
        ("  scheduling: Ray, processes", held - work - spooled),
        ("database, in the driver", stored),
    ):
        print(f"{what:55} {1000 * value:8.1f} ms")
    half = len(memory) // 2
    print(f"driver's memory after {half} s, at the end: {memory[half]:.0f}, {memory[-1]:.0f} MiB")
    if latencies:
        print(f"harness status meanwhile: {statistics.median(latencies):.2f} s (median), "
              f"{max(latencies):.2f} s (longest)")  # fmt: skip


def leaderboard(rows: int, folder: Path) -> None:
    with Store.open(f"sqlite:///{folder}/rows.db") as store:
        trials = rows // len(make_evals(0))
        store.append(make_parents(trials))
        for trial in range(trials):
            store.append(make_evals(trial))
        began = time.perf_counter()
        means = store.evaluation_means()
        seconds = time.perf_counter() - began
        print(f"leaderboard's query over {means['episodes'].sum():,} rows: {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--drive", nargs=2, metavar=("SPEC", "HOME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(Path(options.drive[0]), Home.find(options.drive[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MINARI_DATASETS_PATH"] = str(folder / "data")
        make_bandit2d(seed=0, steps=400)
        measure(options.trials or (200 if options.quick else 2000), folder)
        leaderboard(100_000 if options.quick else 1_000_000, folder)


if __name__ == "__main__":
    main()
