"""A training step recorded once as a CUDA graph and replayed: one launch instead of hundreds.

Small networks leave a GPU waiting for the host: a step of Diffusion-QL is some hundred kernels of a
few microseconds each. Owns recording and replaying; what a step does is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[tuple[int, ...]], tuple[tuple[str, ...], Tensor]]
"""phase -> names and values [M, K] of the metrics; changes its tensors in place only."""

Recording = tuple[torch.cuda.CUDAGraph, tuple[str, ...], Tensor]
"""The graph of one phase with the names and values [M, K] of the metrics that it writes."""

WARM_UP_CALLS = 3
"""Calls of a phase before it is recorded: they compile, load kernels and fill the allocator."""


class GraphedStep:
    """A step on CUDA that is replayed from its fourth call on, one graph for each phase.

    The first calls are steps like any other and recording does none, so that the numbers are those
    of the step itself. All graphs share one pool of memory. If a step cannot be recorded it goes on
    being called, and `refused` says why.

    Args:
        step: compiled (recording stands still where the host makes tensors); the values it returns
            are overwritten by the next call of the same phase.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.refused = ""
        self._calls: dict[tuple[int, ...], int] = {}
        self._graphs: dict[tuple[int, ...], Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, phase: tuple[int, ...]) -> tuple[tuple[str, ...], Tensor]:
        if phase not in self._graphs:
            calls = self._calls[phase] = self._calls.get(phase, 0) + 1
            if self.refused or calls <= WARM_UP_CALLS or not self._record(phase):
                return self.step(phase)
        graph, names, values = self._graphs[phase]
        graph.replay()
        return names, values

    def _record(self, phase: tuple[int, ...]) -> bool:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                names, values = self.step(phase)
        except RuntimeError as error:  # nothing was executed
            self.refused = str(error).strip().splitlines()[0]
            return False
        self._graphs[phase] = (graph, names, values)
        return True
