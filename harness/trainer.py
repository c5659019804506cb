"""The compiled step loop: K seeds of one learner advanced together.

Owns the step counter, the compiled step, the finite check and the slicing of state by seed. It
does not know files, databases, environments or Ray: `harness.training_run` does the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from algorithms.api import Dataset, Learner, phase_of
from algorithms.blocks import products
from algorithms.blocks.rng import Rng, Stream
from harness.cuda_graphs import GraphedStep, Step
from harness.provenance import compiler

STEP_KEY = "trainer.step"
OPEN_KEY = "trainer.open"
"""Prefix of what an unfinished chunk has added up: <prefix>/<phase, if there are any>/<metric>."""
STOP_CHECK_S = 1.0
AUTO_COMPILE_STEPS = {"cpu": 10_000, "cuda": 2_000}
"""From how many steps on compiling pays for itself when `compile: auto`.

A cold build takes 20 to 60 s on CPU and saves about a quarter of each step.
"""


@dataclass(frozen=True)
class Divergence:
    """Where one seed stopped being finite, or passed a limit that its learner declares."""

    step: int  # the gradient step (counted from 1) whose metric was not finite, or too large
    metric: str
    limit: float | None = None  # what it passed while still finite

    def __str__(self) -> str:
        reason = "is not finite" if self.limit is None else f"is above {self.limit:g}"
        return f"{self.metric} {reason} at step {self.step}"


@dataclass(frozen=True)
class Chunk:
    """What `Trainer.advance` saw: means over the chunk's steps, read from the device once."""

    step: int
    metrics: dict[str, list[float]]  # name -> one mean per seed; nan: it had no such step
    diverged: dict[int, Divergence]  # seed index -> where, for seeds not finite in this chunk
    num_steps: int
    seconds: float
    first_call_seconds: float  # of those, the first calls of a compiled step (0 afterwards)
    first_calls: int = 0  # how many: a compiled step has one for each phase of its learner

    @property
    def steps_per_second(self) -> float:
        """Gradient steps of the whole stack per second, without the first calls' compiling."""
        counted = self.num_steps - self.first_calls
        seconds = self.seconds - self.first_call_seconds
        return counted / seconds if counted and seconds > 0 else 0.0


def resolve_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N`.

    Raises:
        ValueError: if the device is unknown or CUDA was asked for and is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for but torch {torch.__version__} sees no CUDA device. "
            "Use run.device=cpu, or install a CUDA build of torch (README, 'GPU')"
        )
    return found


def resolve_compile(compile_mode: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether to compile, and a notice when compiling was wanted but cannot be done.

    Args:
        compile_mode: `on`, `off`, or `auto` (compile where it pays and can be done).
    """
    if compile_mode not in ("auto", "on", "off"):
        raise ValueError(f"run.compile is {compile_mode!r}; expected auto, on or off")
    if compile_mode == "off":
        return False, ""
    if compile_mode == "auto" and steps < AUTO_COMPILE_STEPS.get(device.type, 0):
        return False, ""
    if device.type == "cpu" and compiler() is None:
        return False, (
            "no C++ compiler found (g++): training runs eagerly, with the same numbers to "
            "rounding but slower. Install g++ to compile the step"
        )
    return True, ""


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses to train in a precision that a device does not have.

    Raises:
        ValueError: for tf32 on anything but CUDA, where it would be float32 under another name.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"precision tf32 exists on CUDA devices only and this one is {device}; "
            "use precision float32 or mixed"
        )


def resolve_cuda_graphs(wanted: bool, device: torch.device, compiled: bool) -> tuple[bool, str]:
    """Whether to replay steps as CUDA graphs, and a notice when that was wanted and cannot be."""
    if not wanted or (device.type == "cuda" and compiled):
        return wanted, ""
    reason = f"the device is {device}" if device.type != "cuda" else "the step is not compiled"
    return False, f"run.cuda_graphs has no effect: {reason}"


class Trainer:
    """Advances a learner for K seeds in one compiled step per gradient step.

    Args:
        learner: built for `seeds`, on `device`.
        dataset: its tensors on `device`.
        seeds: K training seeds.
        compile_step: compile the whole step as one graph.
        cuda_graphs: replay the compiled step as CUDA graphs (`harness.cuda_graphs`).
    """

    def __init__(
        self,
        learner: Learner,
        dataset: Dataset,
        seeds: Sequence[int],
        device: torch.device,
        compile_step: bool,
        cuda_graphs: bool = False,
    ) -> None:
        self.learner = learner
        self.dataset = dataset
        self.device = device
        self.compiled = compile_step
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.step = torch.zeros(len(seeds), dtype=torch.int64, device=device)
        self._steps_done = 0
        self.limits: Mapping[str, float] = getattr(learner, "limits", {})
        self._sums: dict[tuple[int, ...], _Sums] = {}  # of the open chunk, by phase
        self._called: set[tuple[int, ...]] = set()  # phases whose step was called
        self._step_function: Step = (
            products.compiled(self._one_step, fullgraph=True, dynamic=False)
            if compile_step
            else self._one_step
        )
        self.graphed = GraphedStep(self._step_function) if cuda_graphs else None
        if self.graphed is not None:
            self._step_function = self.graphed

    @property
    def steps_done(self) -> int:
        """Gradient steps done so far, the same for all seeds."""
        return self._steps_done

    def _one_step(self, phase: tuple[int, ...]) -> tuple[tuple[str, ...], Tensor]:
        rng = Rng(self.seeds, self.step, Stream.TRAIN)
        batch = self.learner.sample(self.dataset, rng)
        metrics = self.learner.update(batch, rng, *phase)
        self.step.add_(1)
        return tuple(metrics), torch.stack(list(metrics.values()))  # [M, K]

    @overload
    def advance(self, num_steps: int) -> Chunk: ...

    @overload
    def advance(self, num_steps: int, stop: Callable[[], bool]) -> Chunk | None: ...

    def advance(self, num_steps: int, stop: Callable[[], bool] | None = None) -> Chunk | None:
        """Does `num_steps` gradient steps, which end a chunk, and reads the metrics once.

        Args:
            stop: asked about once a second; when it says True, the chunk stays open at the step
                reached, and None is returned. States taken then hold what it has added up, so
                that the chunk that ends later is the one that would have been.
        Raises:
            ValueError: if a metric does not have shape [K].
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; expected at least 1")
        started = time.perf_counter()
        first_calls, first_call_seconds = 0, 0.0
        sums, asked, limits = self._sums, started, self.limits
        with torch.no_grad():
            for step in range(self._steps_done, self._steps_done + num_steps):
                if stop is not None and time.perf_counter() - asked > STOP_CHECK_S:
                    asked = time.perf_counter()
                    if stop():
                        return None
                phase = phase_of(self.learner, step)
                called = time.perf_counter()
                names, values = self._step_function(phase)
                self._steps_done += 1
                if phase not in self._called:
                    self._check_shape(names, values)
                    if self.compiled:
                        first_calls += 1
                        first_call_seconds += time.perf_counter() - called
                    self._called.add(phase)
                if phase not in sums:
                    sums[phase] = _Sums.of(names, values, limits)
                sums[phase].add(names, values, self.step)
        self._sums = {}
        rows = tuple(name for each in sums.values() for name in each.names)
        totals = torch.cat([each.total for each in sums.values()]).cpu()
        bad = torch.cat([each.first_bad for each in sums.values()]).cpu()
        finite = torch.cat([each.finite for each in sums.values()]).cpu()
        counts = torch.stack([each.steps for each in sums.values() for _ in each.names])
        return Chunk(
            step=self._steps_done,
            metrics=_mean_by_name(rows, totals, counts),
            diverged=_first_divergence(rows, bad, finite, limits),
            num_steps=num_steps,
            seconds=time.perf_counter() - started,
            first_call_seconds=first_call_seconds,
            first_calls=first_calls,
        )

    def _check_shape(self, names: tuple[str, ...], values: Tensor) -> None:
        expected = (len(names), len(self.seeds))
        if tuple(values.shape) != expected:
            raise ValueError(
                f"update() returned metrics of stacked shape {tuple(values.shape)}; expected "
                f"{expected}: each of {names} must have shape [K]"
            )

    def refresh(self) -> None:
        """Lets the learner renew the data that it generates, at the current step."""
        rng = Rng(self.seeds, self.step, Stream.MAKE)
        with torch.no_grad():
            self.learner.refresh(self.dataset, rng)  # type: ignore[attr-defined]

    def seed_state(self, index: int) -> dict[str, Tensor]:
        """The complete state of one seed, on CPU, every tensor led by 1."""
        state = {
            name: tensor[index : index + 1].detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.learner.state_dict().items()
        }
        state[STEP_KEY] = self.step[index : index + 1].to("cpu", copy=True)
        for phase, sums in self._sums.items():
            state |= {
                f"{OPEN_KEY}/{','.join(map(str, phase))}/{name}": values
                for name, values in sums.of_seed(index).items()
            }
        return state

    def load_seed_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Continues from the states of K seeds, in the order of `seeds`.

        Raises:
            ValueError: if their number or their steps differ, or a tensor is missing or unknown.
        """
        if len(states) != len(self.seeds):
            raise ValueError(f"{len(states)} states for a stack of {len(self.seeds)} seeds")
        expected = set(self.learner.state_dict()) | {STEP_KEY}
        for state in states:
            found = {name for name in state if not name.startswith(OPEN_KEY)}
            if found != expected:
                raise ValueError(
                    "checkpoint does not fit the learner: missing "
                    f"{sorted(expected - found)}, unknown {sorted(found - expected)}. "
                    "It was written by another version of the algorithm: delete the run's work "
                    "folder to start anew"
                )
        step = torch.cat([state[STEP_KEY] for state in states])
        if len(set(step.tolist())) != 1:
            raise ValueError(f"checkpoints of one stack are at different steps {step.tolist()}")
        self.learner.load_state_dict(stack_states(states))
        self.step.copy_(step)
        self._steps_done = int(step[0])
        self._sums = _open_sums(states, self.device, self.limits)


def stack_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state led by K from K states led by 1, without the trainer's own entries."""
    names = [name for name in states[0] if name != STEP_KEY and not name.startswith(OPEN_KEY)]
    return {name: torch.cat([state[name] for state in states]) for name in names}


@dataclass
class _Sums:
    """What the steps of one phase add up to within a chunk.

    Seeds that were joined from several stacks may have opened the chunk at different steps.
    """

    names: tuple[str, ...]
    total: Tensor  # [M, K]
    first_bad: Tensor  # [M, K], the first step that was not finite or above its limit, or -1
    finite: Tensor  # bool [M, K], whether it was finite in that step
    limit: Tensor  # [M, 1], infinite where there is none
    before: Tensor  # int64 [K], steps added before the seeds came here; on the CPU
    count: int = 0  # steps added since

    @classmethod
    def of(cls, names: tuple[str, ...], values: Tensor, limits: Mapping[str, float]) -> _Sums:
        zeros = torch.zeros_like(values, dtype=torch.float64)
        none = torch.full_like(values, -1, dtype=torch.int64)
        limit = values.new_tensor([[limits.get(name, math.inf)] for name in names])
        finite = torch.zeros_like(values, dtype=torch.bool)
        before = torch.zeros(values.shape[1], dtype=torch.int64)
        return cls(names, zeros, none, finite, limit, before)

    @property
    def steps(self) -> Tensor:
        """Steps added up for each seed, int64 [K]."""
        return self.before + self.count

    def add(self, names: tuple[str, ...], values: Tensor, step: Tensor) -> None:
        if names != self.names:  # read from a checkpoint, which keeps no order
            order = [self.names.index(name) for name in names]
            self.names, self.total, self.limit = names, self.total[order], self.limit[order]
            self.first_bad, self.finite = self.first_bad[order], self.finite[order]
        self.total += values
        finite = torch.isfinite(values)
        newly_bad = (~finite | (values > self.limit)) & (self.first_bad < 0)
        self.first_bad = torch.where(newly_bad, step, self.first_bad)
        self.finite = torch.where(newly_bad, finite, self.finite)
        self.count += 1

    def of_seed(self, index: int) -> dict[str, Tensor]:
        """One seed's sums by metric, each [1, 4]: total, first bad step, whether finite, count."""
        columns = (self.total, self.first_bad.double(), self.finite.double())
        count = torch.full_like(self.total[:, index], float(self.steps[index]))
        values = torch.stack((*(column[:, index] for column in columns), count), dim=1)
        return {name: row.unsqueeze(0) for name, row in zip(self.names, values.cpu(), strict=True)}


def _open_sums(
    states: Sequence[Mapping[str, Tensor]], device: torch.device, limits: Mapping[str, float]
) -> dict[tuple[int, ...], _Sums]:
    """The open chunks that states were taken in, by phase; empty where all are between chunks."""
    nothing = torch.tensor([[0.0, -1.0, 0.0, 0.0]], dtype=torch.float64)  # as `of_seed`
    found: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for key in dict.fromkeys(key for state in states for key in state if key.startswith(OPEN_KEY)):
        numbers, name = key.removeprefix(OPEN_KEY + "/").split("/", 1)
        values = torch.cat([state.get(key, nothing) for state in states]).to(device)  # [K, 4]
        at = tuple(int(number) for number in numbers.split(",") if number)
        found.setdefault(at, {})[name] = values
    sums = {}
    for phase, metrics in found.items():
        columns = torch.stack(list(metrics.values())).unbind(dim=-1)  # each [M, K]
        total, first_bad, finite, count = columns
        opened = _Sums.of(tuple(metrics), total.float(), limits)
        opened.total, opened.first_bad, opened.finite = total, first_bad.long(), finite.bool()
        opened.before = count[0].long().cpu()  # the same for all metrics of a phase
        sums[phase] = opened
    return sums


def _mean_by_name(rows: tuple[str, ...], totals: Tensor, counts: Tensor) -> dict[str, list[float]]:
    """Means over the steps that had the metric, of all phases that share it; nan without any.

    Args:
        totals, counts: [M, K], sums and how many steps are in them.
    """
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(rows):
        at = [i for i, row in enumerate(rows) if row == name]
        found[name] = (totals[at].sum(dim=0) / counts[at].sum(dim=0)).tolist()
    return found


def _first_divergence(
    names: tuple[str, ...], first_bad: Tensor, finite: Tensor, limits: Mapping[str, float]
) -> dict[int, Divergence]:
    found: dict[int, Divergence] = {}
    for index in range(first_bad.shape[1]):
        bad = [
            Divergence(step, name, limits.get(name) if was_finite else None)
            for name, step, was_finite in zip(
                names, first_bad[:, index].tolist(), finite[:, index].tolist(), strict=True
            )
            if step >= 0
        ]
        if bad:
            found[index] = min(bad, key=lambda entry: entry.step)
    return found
