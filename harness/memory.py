"""How much memory a stack needs, and from that how many seeds one process trains.

What a seed needs is measured by one eager gradient step and one policy call of one seed on the CPU:
the bytes of all tensors alive at once. Every tensor but the data leads with K, so K seeds need K
times as much. Compiled steps keep less alive. Owns the arithmetic, and when memory goes back to the
system: not within a stack, but between stacks; `harness.preflight` takes the measurements.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.plan import UNSIZED
from harness.spec import RunOptions
from harness.trainer import resolve_compile

GIB = 2**30
WORKER_BYTES = {"cpu": int(0.6 * GIB), "cuda": 1 * GIB}
"""Of a process before its first tensor: interpreter, torch, ray, simulator; a CUDA context."""
COMPILER_BYTES = GIB // 4
"""What compiling adds on a CPU: 0.12 GiB measured for Diffusion-QL, twice that to be safe."""
HEADROOM = 0.9  # of what is free; allocators round up
KEPT_BYTES = GIB // 4  # freed, at the end of the heap; a policy call needs less
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 2**25  # that mallopt takes
MOST_SEEDS = 64  # in one process: beyond, a crash loses more than stacking gains


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside the block: alive now, and at most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}  # id of a storage -> a reference that notices its end

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._known and id(storage) not in given:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of new tensors that `work()` has alive at once."""
    with LiveBytes() as live:
        work()
    return live.peak


@dataclass(frozen=True)
class Cost:
    """Bytes that a stage needs.

    Attributes:
        state: of one seed, as a checkpoint holds it.
        working: of one seed while it trains or acts, above its state.
        dataset: shared by the seeds of a stack.
    """

    state: int
    working: int
    dataset: int

    def stack(self, seeds: int, device: str, compiled: bool) -> int:
        """Of a process with so many seeds; compiled steps need less."""
        return overhead(device, compiled) + self.dataset + seeds * (self.state + self.working)

    def least(self, device: str) -> int:
        """What one seed cannot do without."""
        return WORKER_BYTES[device] + self.dataset + self.state


def overhead(device: str, compiled: bool) -> int:
    """Of a process before it has data and seeds."""
    return WORKER_BYTES[device] + (COMPILER_BYTES if compiled and device == "cpu" else 0)


@dataclass(frozen=True)
class Capacity:
    """What there is for the stacks of a sweep on this machine.

    Attributes:
        device: cpu or cuda.
        slots: stacks that run at once.
        each: bytes for each of them; None if unknown (GPUs that only other nodes have).
    """

    device: str
    slots: int
    each: int | None

    @classmethod
    def of(cls, run: RunOptions) -> Capacity:
        """Of this machine, for the resources that a stack is given."""
        gpus = torch.cuda.device_count()
        if not run.on_gpu(gpus):
            slots = max(1, int(len(os.sched_getaffinity(0)) / run.cpus_per_stack))
            slots = min(slots, run.max_concurrent or slots)
            return cls("cpu", slots, int(HEADROOM * available_bytes() / slots))
        share = run.gpus_per_stack or 1.0
        slots = max(1, int(max(1, gpus) / share))
        slots = min(slots, run.max_concurrent or slots)
        if not gpus:
            return cls("cuda", slots, None)
        total = torch.cuda.get_device_properties(0).total_memory
        return cls("cuda", slots, int(HEADROOM * total * min(1.0, share)))

    def seeds(self, cost: Cost | None, compiled: bool) -> int:
        """How many seeds fit into one process, at least 1."""
        if cost is None or self.each is None:
            return UNSIZED
        left = self.each - overhead(self.device, compiled) - cost.dataset
        return max(1, min(MOST_SEEDS, left // max(1, cost.state + cost.working)))


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had now, within the limit of a container or a batch job."""
    free = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit, or none that this system tells
        return free
    return min(free, max(0, limit - used))


def stack_size(
    run: RunOptions, capacity: Capacity, cost: Cost | None, steps: int, left: int
) -> int:
    """Most seeds of a stage that `run.max_stack: auto` trains in one process.

    Seeds are first spread over what can run at once, and stacked beyond that. A compiled step on
    a CPU is fastest with one seed (docs/performance.md), so there nothing is stacked.

    Args:
        steps: of the stage.
        left: seeds of all stages that are still to be trained.
    """
    compiled, _ = resolve_compile(run.compile, torch.device(capacity.device), steps)
    if compiled and capacity.device == "cpu":
        return 1
    return min(capacity.seeds(cost, compiled), max(1, -(-left // capacity.slots)))


# ------------------------------------------------------- within a stack, and from stack to stack


def keep_freed_memory() -> None:
    """Has this process use again what tensors free, up to `KEPT_BYTES` of it.

    The C library would give back what is free at the end of its heap at once, and each operation
    on an activation of a megabyte would wait for its pages: by where the heap happened to end,
    none or 120,000 faults in a policy call of IDQL, which took up to twice as long. Thresholds
    in the environment (`MALLOC_...`, `GLIBC_TUNABLES`) are left as they are.
    """
    if any(name in os.environ for name in _MALLOC_VARIABLES):
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def forget_the_last_stack() -> None:
    """Frees what a stack left in a process that runs one after the other.

    Torch would not compile the step of an eighth learner. And the C library keeps freed memory
    that lies between what is in use: 250 MB after a stack that generated data.
    """
    _set_imports_aside()
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if psutil.Process().memory_info().rss > 2 * WORKER_BYTES["cpu"]:
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _set_imports_aside() -> None:
    """400,000 objects that stay, and that each collection would take 0.2 s to look through."""
    gc.collect()
    gc.freeze()
