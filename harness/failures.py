"""Why the process of a stack ended, told from what it left, so that the next try can differ.

Owns the classes and how they are recognised; what follows from them is decided in `harness.sweep`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from harness.datasets import DatasetError
from harness.evaluate import EvaluationError
from harness.full_disk import DiskFullError
from results.records import RunRecord

Kind = Literal["out of memory", "no progress", "killed", "error"]

WORKER_DIED = "the worker process died"

NOT_RETRIED = (
    *(ValueError, TypeError, LookupError, AttributeError, ImportError),
    *(DatasetError, DiskFullError, EvaluationError),
)
"""Errors of data, configuration or code, a full disk, an episode that failed twice: a second try
would meet them again."""

_OUT_OF_MEMORY = re.compile(
    r"\bMemoryError\b|\b_ArrayMemoryError\b|OutOfMemoryError|CUDA out of memory|std::bad_alloc"
    r"|DefaultCPUAllocator: (can't|not enough)|[Cc]annot allocate memory"
    r"|node running low on memory|address the out of memory issue"
)
"""Python, NumPy, torch on GPU and CPU, C++, the system, and Ray's memory monitor."""
_DIED = re.compile(rf"{WORKER_DIED}|worker process has died|ActorDiedError|actor died unexpected")
"""Ray guesses at causes behind these words, an OOM killer among them, whatever the cause was."""


class EngineError(RuntimeError):
    """The engine ended before its queue did, and took the stacks that were running along.

    Ray Tune does so when its memory monitor kills a worker.
    """


def classify(error: str, stale: bool = False, oom_kills: int = 0) -> Kind:
    """The class of a failure.

    Args:
        error: its traceback or message.
        stale: whether the watchdog ended the process.
        oom_kills: processes that the kernel ended for memory since the stack was started.
    """
    if stale:
        return "no progress"
    if _OUT_OF_MEMORY.search(error):
        return "out of memory"
    if _DIED.search(error):
        return "out of memory" if oom_kills else "killed"
    return "error"


def telling_line(error: str) -> str:
    """The line of an error's text that says why: about memory if one is, else the last."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    of_memory = (line for line in lines if _OUT_OF_MEMORY.search(line))
    return next(of_memory, lines[-1] if lines else "no message")


def kernel_oom_kills(path: Path = Path("/proc/vmstat")) -> int:
    """How many processes of this machine the kernel has ended for memory, within limits or not."""
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def with_end(run: RunRecord, kind: str) -> RunRecord:
    """The run with the class of its last process's end, kept with that process."""
    if not run.segments:
        return run
    return replace(run, segments=(*run.segments[:-1], {**run.segments[-1], "ended": kind}))
