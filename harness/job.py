"""What a driver hands to a worker, and what it hears from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.home import Home
from harness.plan import Stack, Stage
from harness.spec import RunOptions


@dataclass(frozen=True)
class Job:
    """A stack and everything a worker needs to run it."""

    stack: Stack
    run: RunOptions
    home: Home
    attempts: Mapping[str, int]  # trial id -> the attempt these rows belong to
    stop_file: Path | None = None  # appears when the user asks the sweep to stop, and names it
    needed_by: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)  # see `Plan`

    @property
    def sweep(self) -> str:
        """Names the sweep; empty outside of one."""
        return self.stop_file.name if self.stop_file is not None else ""

    @property
    def should_stop(self) -> bool:
        """Whether the user asked the sweep to stop."""
        return self.stop_file is not None and self.stop_file.exists()


@dataclass(frozen=True)
class Progress:
    """What a worker tells while it runs."""

    step: int
    steps: int
    steps_per_second: float  # gradient steps of the whole stack, not times K
    last_return: float | None = None  # mean over seeds and episodes of the last evaluation
    phase: str = "train"  # load, compile, generate, train, evaluate, done, interrupted
    notice: str = ""


def run_id(trial_id: str, attempt: int) -> str:
    """The identity of an attempt."""
    return f"{trial_id[:32]}-{attempt}"


class Stopped(Exception):
    """The user asked the sweep to stop, in the middle of something that can be done again."""
