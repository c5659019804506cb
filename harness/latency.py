"""How long a trained policy takes to act: milliseconds of a call, measured fairly.

What is timed is one call of `act` of one seed's policy (never of a stack), from observations that
are tensors on the device to actions on the device; environment, conversions and transfers are not
in it. All policies, batches and modes take turns in rounds, so that a machine that slows down
slows all of them, and the medians of the rounds show how far a number can be trusted.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from algorithms.blocks import products
from algorithms.blocks.rng import RowRng, Stream
from harness import provenance
from harness.policies import Loader, Trained, observations
from harness.trainer import Trainer
from results.records import LatencyRecord

WARM_UP_CALLS = 3  # before the first round; the first of a compiled call compiles
TURN_WARM_UP_CALLS = 1  # at the start of each turn: the one before left the caches to another
LEAST_CALLS = 5  # timed in a turn, however long they take
MOST_CALLS = 2000  # timed in a turn, however short they are

Report = Callable[[int, int, str], None]
"""Told the turns done, the turns in all and what comes next."""


@dataclass
class _Contender:
    """One policy with one batch size in one mode, and the times of its calls in each round."""

    trained: Trained
    batch: int
    compiled: bool
    call: Callable[[], float]  # does one call and returns its seconds
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.trained.title}, batch {self.batch}{', compiled' if self.compiled else ''}"

    def turn(self, seconds: float) -> None:
        """One round's calls: for `seconds`, but not fewer or more than the limits."""
        for _ in range(TURN_WARM_UP_CALLS):
            self.call()
        times: list[float] = []
        while len(times) < LEAST_CALLS or (sum(times) < seconds and len(times) < MOST_CALLS):
            times.append(self.call())
        self.rounds.append(times)

    def record(self, device: str, threads: int) -> LatencyRecord:
        milliseconds = 1e3 * np.concatenate([np.array(times) for times in self.rounds])
        return LatencyRecord(
            run_id=self.trained.run_id,
            measured_at=provenance.utc_now(),
            batch=self.batch,
            compiled=self.compiled,
            device=device,
            threads=threads,
            calls=len(milliseconds),
            median_ms=float(np.median(milliseconds)),
            p99_ms=float(np.quantile(milliseconds, 0.99, method="higher")),
            round_medians_ms=tuple(float(1e3 * np.median(times)) for times in self.rounds),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
        )


def measure(
    policies: Sequence[Trained],
    loader: Loader,
    *,
    batches: Sequence[int] = (1, 256),
    compiled: bool = False,
    threads: int = 1,
    rounds: int = 5,
    seconds: float = 2.0,
    report: Report = lambda done, total, text: None,
) -> list[LatencyRecord]:
    """One record for each policy, batch size and mode, in this order.

    Args:
        batches: observations in a call, evenly spaced rows of the policy's dataset.
        compiled: also measure the call compiled as one graph.
        threads: of PyTorch on the CPU.
        rounds: turns of each, the others measured in between.
        seconds: of timed calls for each, over all rounds; each turn makes at least five calls.
    Raises:
        ValueError: if a number is not positive, or policies of tf32 and of other precisions, which
            is a setting of the process, are to be timed together.
        DatasetError, ArtifactError: as `Loader.load`.
    """
    for name, value in (("threads", threads), ("rounds", rounds), *(("batch", n) for n in batches)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; expected more than 0")
    precisions = {trained.stage.precision for trained in policies}
    if "tf32" in precisions and len(precisions) > 1:
        raise ValueError(
            f"policies of precision {', '.join(sorted(precisions))}: tf32 is a setting of the "
            "whole process; time them in calls of their own"
        )
    modes = (False, True) if compiled else (False,)
    with _threads(threads), torch.no_grad():
        contenders: list[_Contender] = []
        total = len(policies) * len(modes) * len(set(batches)) * (rounds + 1)
        for trained in policies:
            trainer, dataset = loader.load(trained)
            for batch in dict.fromkeys(batches):
                _, obs = observations(dataset, batch)
                for mode in modes:
                    each = _Contender(trained, batch, mode, _caller(trainer, obs, mode))
                    report(len(contenders), total, f"warm-up: {each.title}")
                    for _ in range(WARM_UP_CALLS):
                        each.call()
                    contenders.append(each)
        done = len(contenders)
        for place in range(rounds):
            for each in contenders:
                report(done, total, f"round {place + 1} of {rounds}: {each.title}")
                each.turn(seconds / rounds)
                done += 1
        report(total, total, "measured")
    return [each.record(str(loader.device), threads) for each in contenders]


def _caller(trainer: Trainer, obs: torch.Tensor, compiled: bool) -> Callable[[], float]:
    """A function that does one call, each with random numbers of its own, and times it."""
    policy: Any = trainer.learner
    obs = obs.unsqueeze(0)  # [K, N, O] with one seed
    row = torch.arange(obs.shape[1], device=obs.device).unsqueeze(0)  # [K, N]
    count = torch.zeros_like(row)
    wait = torch.cuda.synchronize if obs.device.type == "cuda" else lambda: None

    def source() -> RowRng:
        return RowRng(trainer.seeds, trainer.step, Stream.ACTIONS, row, count)

    def eager() -> float:
        count.add_(1)
        rng = source()
        wait()
        started = time.perf_counter()
        policy.act(obs, rng)
        wait()
        return time.perf_counter() - started

    def act(obs: torch.Tensor) -> torch.Tensor:
        return policy.act(obs, source())  # a graph cannot be given the source: it counts calls

    # Graphs are kept, and tried in turn, by code object: one of its own for each.
    own = types.FunctionType(act.__code__.replace(), globals(), "act", None, act.__closure__)
    function = products.compiled(own, fullgraph=True, dynamic=False) if compiled else None

    def one_graph() -> float:
        assert function is not None
        count.add_(1)
        wait()
        started = time.perf_counter()
        function(obs)
        wait()
        return time.perf_counter() - started

    return one_graph if compiled else eager


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
