"""Kills sweeps at random points until there were enough kills; what is left is compared elsewhere.

    python -m tests.killing SPEC FOLDER POINTS

Prints the number of sweeps (FOLDER/0, FOLDER/1, ...) and the most steps that a kill cost, as JSON.
Each try is a fork of this process, which has imported everything and runs no other thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # seconds that each try would spend on importing it

from harness.home import Home
from harness.spool import read
from results.records import MetricRecord, RunRecord
from tests import inline


def start(spec: Path, home: Path) -> int:
    child = os.fork()
    if child == 0:
        os._exit(not inline.sweep(spec, home).ok)
    return child


def state(home: Path) -> dict[str, tuple[int, int, int]]:
    """By stage in progress: segments begun, where the last one began, the last step told."""
    found = {}
    for path in Home.find(home).work.glob("*/spool.jsonl"):
        records = list(read(path))
        runs = [record for record in records if isinstance(record, RunRecord)]
        steps = [record.step for record in records if isinstance(record, MetricRecord)]
        if runs:
            segments = runs[-1].segments
            found[path.parent.name] = (
                len(segments),
                segments[-1]["from_step"],
                max(steps, default=0),
            )
    return found


def main(spec: Path, folder: Path, points: int) -> None:
    rng, kills, sweeps, cost = random.Random(0), 0, 0, 0
    began = time.monotonic()
    os.waitpid(start(spec, folder / "timing"), 0)
    span = time.monotonic() - began
    before: dict[str, tuple[int, int, int]] = {}
    while kills < points:
        home = folder / str(sweeps)
        child = start(spec, home)
        time.sleep(rng.uniform(0.0, 0.6 * span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):  # it had ended by itself
            assert os.waitstatus_to_exitcode(status) == 0
            sweeps, before = sweeps + 1, {}
            continue
        kills += 1
        after = state(home)
        for stage, (segments, begun, _) in after.items():
            if stage in before and segments > before[stage][0]:
                cost = max(cost, before[stage][2] - begun)
        before = after
    _, status = os.waitpid(start(spec, folder / str(sweeps)), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    print(json.dumps({"kills": kills, "sweeps": sweeps + 1, "steps_lost_at_most": cost}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
