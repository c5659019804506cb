"""Batch scripts for Slurm: a Ray cluster inside one job, or an array of jobs without Ray.

Both checkpoint when Slurm gives notice (SIGUSR1, 90 s before the end) and put themselves back into
the queue; the same home folder makes them continue. A Ray cluster gets ports and a temporary folder
of its job, so that it neither meets another user's nor is met by it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOTICE_S = 90
REQUEUED = 130
"""The exit code of a sweep that was stopped; see `harness.cli.exit_codes`."""


@dataclass(frozen=True)
class Resources:
    """What one job (or one task of an array) asks for."""

    nodes: int = 1
    time: str = "24:00:00"  # Slurm's format
    cpus_per_node: int = 8
    gpus_per_node: int = 0
    mem: str = ""  # such as 64G; empty leaves the site's default
    partition: str = ""
    account: str = ""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.cpus_per_node < 1 or self.gpus_per_node < 0:
            raise ValueError(
                f"nodes {self.nodes}, cpus per node {self.cpus_per_node}, gpus per node "
                f"{self.gpus_per_node}; expected at least 1, 1 and 0"
            )


def ray_script(name: str, sweep: Sequence[str], resources: Resources, log: Path) -> str:
    """A job that starts a Ray cluster on its nodes and runs a sweep on it.

    Args:
        name: of the job.
        sweep: the command, `harness sweep ...`.
        log: folder for Slurm's output.
    """
    head = f"""\
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{nodes[0]}}
port=$((20000 + SLURM_JOB_ID % 20000))
# Short: Ray puts sockets there, whose paths may have about 100 characters.
scratch="${{TMPDIR:-/tmp}}/ray-$SLURM_JOB_ID"
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{{print $1}}')
resources="--num-cpus={resources.cpus_per_node} --num-gpus={resources.gpus_per_node}"
# Ray runs what anyone who reaches its port sends: only what knows this job's token may.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \\
  ray start --head --node-ip-address="$address" --port="$port" --temp-dir="$scratch" \\
  --include-dashboard=false --disable-usage-stats $resources --block &
for ((i = 1; i < SLURM_JOB_NUM_NODES; i++)); do
  srun --nodes=1 --ntasks=1 --nodelist="${{nodes[$i]}}" --overlap \\
    ray start --address="$address:$port" --disable-usage-stats $resources --block &
done
export RAY_ADDRESS="$address:$port"
for ((tries = 0; tries < 60; tries++)); do
  ray status --address="$RAY_ADDRESS" >/dev/null 2>&1 && break
  sleep 2
done
"""
    return _script(name, sweep, resources, log, before=head, after="kill $(jobs -p) 2>/dev/null")


def array_script(
    name: str, work: Sequence[str], tasks: int, resources: Resources, log: Path
) -> str:
    """An array of jobs that each work on their share: `work` plus `--shard INDEX/COUNT`.

    Args:
        work: the command, `harness work ...`.
        tasks: of the array.
    Raises:
        ValueError: for fewer than one task, or more than one node each.
    """
    if tasks < 1:
        raise ValueError(f"an array of {tasks} tasks; expected at least 1")
    if resources.nodes != 1:
        raise ValueError(f"{resources.nodes} nodes for each task of an array; expected 1")
    shard = f'--shard "$SLURM_ARRAY_TASK_ID/{tasks}"'
    return _script(name, work, resources, log, extra=f" {shard}", array=f"0-{tasks - 1}")


def _script(
    name: str,
    command: Sequence[str],
    resources: Resources,
    log: Path,
    before: str = "",
    after: str = "",
    extra: str = "",
    array: str = "",
) -> str:
    options = [
        f"--job-name={name}",
        f"--nodes={resources.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={resources.cpus_per_node}",
        f"--time={resources.time}",
        f"--signal=B:USR1@{NOTICE_S}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}/%x-{'%A_%a' if array else '%j'}.log",
    ]
    for flag, value in (
        ("gpus-per-node", resources.gpus_per_node),
        ("mem", resources.mem),
        ("partition", resources.partition),
        ("account", resources.account),
        ("array", array),
    ):
        if value:
            options.append(f"--{flag}={value}")
    again = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if array else "$SLURM_JOB_ID"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "set -u",
        "export OMP_NUM_THREADS=1",
        f'export PATH={shlex.quote(str(Path(command[0]).parent))}:"$PATH"',
        before.rstrip(),
        f"{shlex.join(command)}{extra} &",
        "main=$!",
        "trap 'kill -USR1 \"$main\"' USR1 TERM",
        "# A signal ends `wait`, not what is waited for.",
        'wait "$main"; code=$?',
        'while kill -0 "$main" 2>/dev/null; do wait "$main"; code=$?; done',
        after,
        f'if [ "$code" -eq {REQUEUED} ]; then scontrol requeue "{again}"; fi',
        'exit "$code"',
    ]
    return "\n".join(line for line in lines if line) + "\n"
