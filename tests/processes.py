"""Commands in processes of their own, and looking for what they started and wrote."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]


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
    """Bytes of the spools of a home folder: they grow as its stages make progress."""
    return sum(path.stat().st_size for path in home.glob("work/*/spool.jsonl"))


def harness(*arguments: str, **options) -> subprocess.Popen:
    """The command line in a process of its own; what it prints goes to `communicate`."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def ray_workers(pid: int) -> list[psutil.Process]:
    """The processes that train, below a driver with a Ray of its own or below a node of one."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "_train_stack" in child.name() or any(
                "_train_stack" in part or "ImplicitFunc" in part for part in child.cmdline()
            ):
                found.append(child)
        except psutil.Error:
            continue
    return found
