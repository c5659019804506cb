"""Training speed: seeds x gradient steps per second of an algorithm, by size of the stack.

    python benchmarks/training.py [--quick] [--device cpu] [--algorithm diffusion_ql] [--modes ...]

Published size (the defaults of its config) on data of Hopper's shape (11 observations, 3 actions).
For each stack size K it times the trainer's steps in each mode; the ratio to K = 1 of the same mode
is what to read. Modes: eager; compiled; graphs (compiled, replayed as CUDA graphs); compiled with
products in bfloat16 (mixed) or, on a GPU, in TensorFloat-32 (tf32), and with a GPU's graphs
(mixed_graphs, tf32_graphs). Memory is the peak while stepping
less the peak before the learner was built, divided by K: of the allocator on a GPU; on a CPU of the
process, so that every row runs in a process of its own, code generation counts, and what the
imports freed is used again for nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from algorithms import bc, cql, diffusion_ql, idql, iql, rebrac, td3_bc
from algorithms.api import phase_of
from algorithms.blocks.layers import set_precision
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import COLUMNS, TinyDataset
from harness.cuda_graphs import WARM_UP_CALLS
from harness.trainer import Trainer

RECIPES = {
    module.recipe.name: module.recipe
    for module in (bc, cql, diffusion_ql, idql, iql, rebrac, td3_bc)
}

MODES = {
    "eager": ("float32", False, False),
    "compiled": ("float32", True, False),
    "mixed": ("mixed", True, False),
    "tf32": ("tf32", True, False),
    "graphs": ("float32", True, True),
    "mixed_graphs": ("mixed", True, True),
    "tf32_graphs": ("tf32", True, True),
}
"""Name -> precision, whether the step is compiled, whether it is replayed as a CUDA graph."""


class DeviceDataset(TinyDataset):
    """TinyDataset with its columns on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(obs_dim=11, action_dim=3, num_episodes=100, episode_length=1000)
        for name in (*COLUMNS, "next_action"):
            setattr(self, name, getattr(self, name).to(device))


@dataclass(frozen=True)
class Row:
    seeds: int
    mode: str
    first_call_s: float
    ms_per_step: float
    mib_per_seed: float

    @property
    def seed_steps_per_s(self) -> float:
        return 1e3 * self.seeds / self.ms_per_step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> int:
    """Peak so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: KiB


def build(algorithm: str, dataset: DeviceDataset, seeds: int, device: torch.device) -> Any:
    recipe = RECIPES[algorithm]
    stage = recipe.stages(recipe.config())[0]
    return stage.learner(stage.config, dataset.spec, range(seeds), {}).to(device)


def matrix_floor(algorithm: str, device_name: str, threads: int) -> tuple[float, float]:
    """GFLOP of matrix products in one step of one seed, and GFLOP/s of a product of its size.

    Their quotient is the least time a step can take, if all but the products were free.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    dataset = DeviceDataset(device)
    learner = build(algorithm, dataset, 1, device)
    period = getattr(learner, "period", 1)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for number in range(period):
            rng = Rng(seeds, torch.full_like(seeds, number), Stream.TRAIN)
            learner.update(learner.sample(dataset, rng), rng, *phase_of(learner, number))
    count, copies = 0, 1 if device.type == "cpu" else 64
    a, b = torch.randn(2, copies, 256, 256, device=device)
    for _ in range(10):
        torch.bmm(a, b)
    synchronize(device)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        torch.bmm(a, b)
        count += 1
    synchronize(device)
    rate = 2 * copies * 256**3 * count / (time.perf_counter() - start)
    return counter.get_total_flops() / period / 1e9, rate / 1e9


def measure(
    algorithm: str, seeds: int, mode: str, device_name: str, threads: int, budget: float
) -> Row:
    """Times steps for about `budget` seconds after those that compile, warm up and record."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    dataset = DeviceDataset(device)
    before = memory(device)
    learner = build(algorithm, dataset, seeds, device)
    precision, compiled, graphs = MODES[mode]
    set_precision(learner, precision)
    trainer = Trainer(learner, dataset, range(seeds), device, compiled, graphs)
    period = getattr(learner, "period", 1)

    start = time.perf_counter()
    trainer.advance(period)  # reads its metrics at the end of a chunk, as in a sweep
    first_call = time.perf_counter() - start
    trainer.advance((WARM_UP_CALLS + 1) * period)
    if trainer.graphed is not None and trainer.graphed.refused:
        raise RuntimeError(f"the step cannot be recorded: {trainer.graphed.refused}")
    chunk = period * (1 if device.type == "cpu" else 50)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < budget:
        trainer.advance(chunk)
        count += chunk
    elapsed = time.perf_counter() - start
    grown = (memory(device) - before) / 2**20 / seeds
    return Row(seeds, mode, first_call, 1e3 * elapsed / count, grown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="K = 1 and 4, eager only, 2 s each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithm", default="diffusion_ql", choices=sorted(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all of the device")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    of_device = [name for name in MODES if on_gpu or name in ("eager", "compiled", "mixed")]
    stacks, modes, budget = tuple(arguments.stacks), arguments.modes or of_device, 10.0
    if unusable := [name for name in modes if name not in of_device]:
        parser.error(f"--modes {' '.join(unusable)}: only with --device cuda")
    if arguments.quick:
        stacks, modes, budget = (1, 4), ["eager"], 2.0
    print(
        f"{arguments.algorithm}, published size, torch {torch.__version__}, {arguments.device}, "
        f"{arguments.threads} thread(s)"
    )
    gflop, rate = matrix_floor(arguments.algorithm, arguments.device, arguments.threads)
    print(
        f"floor: {gflop:.3f} GFLOP of matrix products a step and seed, at {rate:.0f} GFLOP/s "
        f"(float32, 256 x 256 x 256): {1e3 * gflop / rate:.1f} ms"
    )
    print(
        f"{'seeds':>5} {'mode':>12} {'first s':>8} {'ms/step':>8} {'seeds x steps/s':>16}", end=""
    )
    print(f" {'vs K=1':>7} {'MiB/seed':>9}")
    context = multiprocessing.get_context("spawn")
    for mode in modes:
        single = None
        for seeds in stacks:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(
                    measure,
                    arguments.algorithm,
                    seeds,
                    mode,
                    arguments.device,
                    arguments.threads,
                    budget,
                ).result()
            single = single or row
            print(
                f"{row.seeds:>5} {row.mode:>12} {row.first_call_s:>8.1f} {row.ms_per_step:>8.1f} "
                f"{row.seed_steps_per_s:>16.1f} "
                f"{row.seed_steps_per_s / single.seed_steps_per_s:>6.2f}x {row.mib_per_seed:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
