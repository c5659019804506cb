"""Every benchmark runs at its smallest size; what it measures is nobody's test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "bootstrap": "--methods 2 --seeds 3 --tasks 2 --reps 200 --repeats 1",
    "coverage": "--simulations 4 --reps 50 --seeds 3 --tasks 1",
    "database": "--rows 2000",
    "doser": "--quick",
    "evaluation": "--seeds 2 --envs 2 --steps 20 --repeats 1",
    "fidelity": "",
    "generation": "--width 16 --windows 8",
    "leaderboard_site": "--methods 2 --evaluations 2 --episodes 2",
    "load": "--quick",
    "peers": "--seconds 1 --seeds 1",
    "training": "--quick",
}


def test_each_benchmark_is_run_here():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_ends_with_figures(name, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *SMALL[name].split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HARNESS_HOME": str(tmp_path)}
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert any(character.isdigit() for character in told.stdout.splitlines()[-1])
