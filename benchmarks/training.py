"""Training speed: seeds x gradient steps per second of an algorithm, by size of the stack.

    python benchmarks/training.py [--quick] [--device cpu] [--algorithm diffusion_ql] [--tf32]

Published size (the defaults of its config) on data of Hopper's shape (11 observations, 3 actions).
For each stack size K it times the same steps eager, compiled, and compiled with products in
bfloat16; the ratio to K = 1 of the same mode is what to read. Memory is the peak while stepping
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

RECIPES = {
    module.recipe.name: module.recipe
    for module in (bc, cql, diffusion_ql, idql, iql, rebrac, td3_bc)
}


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


def matrix_floor(algorithm: str, device_name: str, threads: int, tf32: bool) -> tuple[float, float]:
    """GFLOP of matrix products in one step of one seed, and GFLOP/s of a product of its size.

    Their quotient is the least time a step can take, if all but the products were free.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
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
    algorithm: str, seeds: int, mode: str, device_name: str, threads: int, tf32: bool, budget: float
) -> Row:
    """Times steps for about `budget` seconds after two of each phase that are not counted."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    device = torch.device(device_name)
    dataset = DeviceDataset(device)
    before = memory(device)
    learner = build(algorithm, dataset, seeds, device)
    set_precision(learner, "mixed" if mode == "mixed" else "float32")
    seed_tensor = torch.arange(seeds, device=device)

    def step(step_number: torch.Tensor, phase: tuple[int, ...]) -> dict[str, torch.Tensor]:
        rng = Rng(seed_tensor, step_number, Stream.TRAIN)
        return learner.update(learner.sample(dataset, rng), rng, *phase)

    compute = torch.compile(step, fullgraph=True, dynamic=False) if mode != "eager" else step
    period = getattr(learner, "period", 1)

    def run(number: int) -> None:
        compute(torch.full_like(seed_tensor, number), phase_of(learner, number))

    with torch.no_grad():
        start = time.perf_counter()
        for number in range(period):
            run(number)
        synchronize(device)
        first_call = time.perf_counter() - start
        for number in range(period):
            run(number)
        synchronize(device)
        count, start = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - start < budget:
            run(count)
            count += 1
            if count % 10 == 0 or device.type == "cpu":
                synchronize(device)
        synchronize(device)
        elapsed = time.perf_counter() - start
    grown = (memory(device) - before) / 2**20 / seeds
    return Row(seeds, mode, first_call, 1e3 * elapsed / count, grown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="K = 1 and 4, eager only, 2 s each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithm", default="diffusion_ql", choices=sorted(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--tf32", action="store_true", help="TensorFloat-32 products on a GPU")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--modes", nargs="+", default=["eager", "compiled", "mixed"],
        choices=("eager", "compiled", "mixed"), help="mixed is compiled, products in bfloat16",
    )  # fmt: skip
    arguments = parser.parse_args()
    stacks, modes, budget = tuple(arguments.stacks), tuple(arguments.modes), 10.0
    if arguments.quick:
        stacks, modes, budget = (1, 4), ("eager",), 2.0
    print(
        f"{arguments.algorithm}, published size, torch {torch.__version__}, {arguments.device}, "
        f"{arguments.threads} thread(s), tf32 {'on' if arguments.tf32 else 'off'}"
    )
    gflop, rate = matrix_floor(
        arguments.algorithm, arguments.device, arguments.threads, arguments.tf32
    )
    print(
        f"floor: {gflop:.3f} GFLOP of matrix products a step and seed, at {rate:.0f} GFLOP/s "
        f"(float32, 256 x 256 x 256): {1e3 * gflop / rate:.1f} ms"
    )
    print(f"{'seeds':>5} {'mode':>9} {'first s':>8} {'ms/step':>8} {'seeds x steps/s':>16}", end="")
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
                    arguments.tf32,
                    budget,
                ).result()
            single = single or row
            print(
                f"{row.seeds:>5} {row.mode:>9} {row.first_call_s:>8.1f} {row.ms_per_step:>8.1f} "
                f"{row.seed_steps_per_s:>16.1f} "
                f"{row.seed_steps_per_s / single.seed_steps_per_s:>6.2f}x {row.mib_per_seed:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
