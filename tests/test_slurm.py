"""Batch scripts: what they ask for, that a shell understands them, and what they do on a signal."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness import cli
from harness.slurm import Resources, array_script, ray_script
from tests import inline

SPEC = """
name: array
algorithms: {bc: {config: {hidden_dim: 8, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-2
steps: 6000
evaluation: {every: 3000, episodes: 3}
run: {log_every: 50, checkpoint_every: 1000, compile: "off", device: cpu, max_stack: 2}
"""
BIG = Resources(nodes=3, time="8:00:00", cpus_per_node=16, gpus_per_node=4, mem="64G")


def check_syntax(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_cluster_of_its_own_asks_for_what_it_was_told():
    script = ray_script("paper", ["/opt/bin/harness", "sweep", "my spec.yaml"], BIG, Path("/log"))
    check_syntax(script)
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --mem=64G",
        "#SBATCH --signal=B:USR1@90",
        "#SBATCH --output=/log/%x-%j.log",
        "/opt/bin/harness sweep 'my spec.yaml' &",
        'export PATH=/opt/bin:"$PATH"',
        "export RAY_AUTH_MODE=token",
    ):
        assert line in script.splitlines()
    assert "--partition" not in script
    assert "SLURM_JOB_ID % 20000" in script, "a port of the job's own"
    assert script.count("ray start") == 2


def test_an_array_gives_every_task_its_share():
    one = Resources(cpus_per_node=2, account="lab")
    script = array_script("paper", ["harness", "work", "s.yaml"], 16, one, Path("/log"))
    check_syntax(script)
    assert "#SBATCH --array=0-15" in script
    assert "#SBATCH --account=lab" in script
    assert 'harness work s.yaml --shard "$SLURM_ARRAY_TASK_ID/16" &' in script
    assert "ray start" not in script
    assert "RAY_ADDRESS" not in script


def test_the_advised_sweep_is_of_the_same_trials(bandit, tmp_path):
    spec, home = tmp_path / "my spec.yaml", tmp_path / "home"
    spec.write_text(SPEC)
    given = [str(spec), "seeds=0,4", "algorithms=[bc]"]
    where = ["--home", str(home), "--db", f"sqlite:///{tmp_path / 'rows.db'}"]
    options = ["--array", "2", "--out", str(tmp_path / "x.sbatch")]
    result = CliRunner().invoke(cli.app, ["slurm", *given, *where, *options])
    assert result.exit_code == cli.OK, result.output
    (advice,) = (line for line in result.output.splitlines() if "harness sweep" in line)
    command = shlex.split(advice.partition("what is left: ")[2])
    assert command == ["harness", "sweep", *given, *where]


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="expected at least 1, 1 and 0"):
        Resources(nodes=0)
    with pytest.raises(ValueError, match="an array of 0 tasks"):
        array_script("x", ["harness"], 0, Resources(), Path("/log"))
    with pytest.raises(ValueError, match="3 nodes for each task"):
        array_script("x", ["harness"], 2, BIG, Path("/log"))


@pytest.mark.slow
def test_a_task_that_gets_notice_checkpoints_and_asks_to_be_requeued(bandit, tmp_path):
    """The script itself runs; only `scontrol`, which is Slurm's, is a stand-in that takes notes."""
    spec, home = tmp_path / "array.yaml", tmp_path / "home"
    spec.write_text(SPEC)
    assert inline.sweep(spec, tmp_path / "whole").ok
    notes, stand_in = tmp_path / "notes", tmp_path / "bin" / "scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {notes}\n')
    stand_in.chmod(0o755)
    program = str(Path(sys.executable).parent / "harness")
    command = [program, "work", str(spec), "--home", str(home)]
    script = tmp_path / "array.sbatch"
    script.write_text(array_script("array", command, 1, Resources(), tmp_path))
    environment = {
        **os.environ,
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    run = ["bash", str(script)]
    process = subprocess.Popen(run, env=environment, cwd=Path(__file__).resolve().parents[1])
    deadline = time.monotonic() + 120
    while not list(home.glob("work/*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - asked < 10.0, "the notice is 90 s, of which this may use 10"
    assert notes.read_text() == "requeue 7_0\n"
    assert subprocess.run(run, env=environment, timeout=300).returncode == 0
    assert inline.sweep(spec, home).trained == 0
    assert inline.rows(home) == inline.rows(tmp_path / "whole")
    assert shutil.which("scontrol") is None, "the stand-in must not outlive the test"
