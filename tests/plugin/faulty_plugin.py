"""An algorithm whose process meets a fault at its fifth step: killed or out of memory, for real.

Learns like `two_stage_plugin`'s teacher, so that what it leaves can be compared with a run without.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from two_stage_plugin import Linear, RegressionConfig

from algorithms.api import Metrics, Recipe, Train

GIB = 2**30
FAULT_AT = 5  # not at the first step, which is tried beforehand in the driver


@dataclass(frozen=True)
class Config:
    steps: int = 40
    fault: str = "none"  # none | limit | killed | monitored
    fit: int = 1  # limit, monitored: seeds that fit


@dataclass(frozen=True)
class FaultyConfig(RegressionConfig):
    fault: str
    fit: int


class Faulty(Linear):
    calls = 0

    def update(self, batch: Any, rng: Any) -> Metrics:
        self.calls += 1
        if self.calls == FAULT_AT:
            getattr(self, self.config.fault)()
        return super().update(batch, rng)

    def none(self) -> None:
        """No fault."""

    def limit(self) -> None:
        """A GiB per seed within a limit that `fit` of them stay in; no page of it is touched."""
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + self.config.fit * GIB + GIB // 2, before[1]))
        try:
            torch.empty(len(self.weight), GIB // 4)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def killed(self) -> None:
        """SIGKILL, as often as there are files in a folder that the test names: each is used up."""
        for ticket in _tickets():
            ticket.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def monitored(self) -> None:
        """More and more memory, until Ray's monitor ends this process; 4 GiB at most."""
        held = []
        while len(self.weight) > self.config.fit and len(held) < 16 and _tickets():
            held.append(np.ones(GIB // 4, dtype=np.uint8))
            time.sleep(0.5)  # several looks of the monitor


def _tickets() -> list[Path]:
    """Faults that are left; none where no test asks for them, so that trials are the same."""
    folder = os.environ.get("FAULTY_TICKETS")
    return sorted(Path(folder).iterdir()) if folder else []


def stages(config: Config) -> tuple[Train, ...]:
    own = FaultyConfig(0.05, 32, config.fault, config.fit)
    return (Train("policy", Faulty, own, config.steps),)


recipe = Recipe("faulty", 1, Config, stages)
