"""Speed of DOSER's agent, beside soft actor-critic with four critics and the release's own sampler.

    python benchmarks/doser.py [--quick] [--device cpu] [--stacks 1 4]

Published size on data of Hopper's shape (11 observations, 3 actions), models untrained: what they
answer does not change what they cost. All rows come from one run on one machine, so that ratios can
be read:

    floor      soft actor-critic with four critics: the agent's update without detector and penalty
    uniform    detector and uniform penalty
    cached     the whole algorithm, candidates made beforehand, every row classified
    flagged    the same, only 64 OOD rows classified (`ood_rows`)
    sampled    candidates sampled in the step for 64 OOD rows (15 Heun steps)
    release    candidates for all rows by the code's 100 steps

GFLOP are matrix products of a step and seed, counted. Ratios are to the floor of the same mode and
stack; `release` is timed eager only, as 100 calls of its network compile for minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from algorithms import doser
from algorithms.api import Batch, Metrics, phase_of
from algorithms.blocks import products
from algorithms.blocks.critics import polyak_update, squared_td_error
from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import COLUMNS, TinyDataset, cases

CASES: dict[str, dict[str, Any]] = {
    "floor": {"treatment": "uniform"},
    "uniform": {"treatment": "uniform"},
    "cached": {},
    "flagged": {"ood_rows": 64},
    "sampled": {"candidates": "sampled", "ood_rows": 64},
    "release": {"candidates": "sampled", "sampler": "release", "sampler_steps": 100},
}


class SAC(doser.DOSER):
    """The agent's soft actor-critic alone."""

    def update(self, batch: Batch, rng: Rng, phase: int) -> Metrics:
        obs, next_obs = self.normalizer(batch.obs), self.normalizer(batch.next_obs)
        rows, dim = batch.action.shape[1:]
        noise, actor_noise, target_noise = rng.normal(rows, 3, dim).unbind(dim=2)
        metrics = self.update_entropy(obs, noise)
        if phase == self.period - 1:
            metrics |= self.update_actor(obs, actor_noise)
        target = self.q_target(batch, next_obs, target_noise)
        action = self.bounds.unit(batch.action)

        def loss(critic: Any) -> tuple[Tensor, Metrics]:
            td_error = squared_td_error(critic(obs, action), target)
            return td_error, {"td_error": td_error}

        grads, found = gradients(self.critic, loss)
        self.critic_optim.step(self.critic, grads)
        if phase == self.period - 1:
            polyak_update(self.target_critic, self.critic, self.config.tau)
            polyak_update(self.target_actor, self.actor, self.config.tau)
        return metrics | found


class DeviceDataset(TinyDataset):
    """TinyDataset with its columns on a device."""

    def __init__(self, device: torch.device, num_episodes: int) -> None:
        super().__init__(obs_dim=11, action_dim=3, num_episodes=num_episodes)
        for name in (*COLUMNS, "next_action"):
            setattr(self, name, getattr(self, name).to(device))


@dataclass(frozen=True)
class Row:
    case: str
    mode: str
    seeds: int
    gflop: float  # of a step and seed
    ms_per_step: float  # of the stack

    @property
    def per_seed(self) -> float:
        """Agent steps per second of each seed, all seeds of the stack advancing together."""
        return 1e3 / self.ms_per_step

    @property
    def seed_steps(self) -> float:
        return self.seeds * self.per_seed


def build(case: str, seeds: int, device: torch.device) -> tuple[Any, DeviceDataset]:
    """An agent on a device, its models trained for three tiny steps."""
    config = replace(doser.Config(**CASES[case]), diffusion_batch_size=32, dynamics_batch_size=32)
    on_host = DeviceDataset(torch.device("cpu"), 20)
    *_, stage = cases(doser.recipe, config, on_host, tuple(range(seeds)))
    if case == "floor":
        stage = replace(stage, stage=replace(stage.stage, learner=SAC))
    return stage.build().to(device), DeviceDataset(device, 20)


def measure(case: str, seeds: int, mode: str, device: torch.device, budget: float) -> Row:
    """Times whole periods for about `budget` seconds, after two that are not counted."""
    learner, dataset = build(case, seeds, device)
    seed_tensor = torch.arange(seeds, device=device)

    def step(number: Tensor, phase: tuple[int, ...]) -> Metrics:
        rng = Rng(seed_tensor, number, Stream.TRAIN)
        return learner.update(learner.sample(dataset, rng), rng, *phase)

    def run(compute: Any, number: int) -> None:
        compute(torch.full_like(seed_tensor, number), phase_of(learner, number))

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    period = learner.period
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            for number in range(period):
                run(step, number)
        gflop = counter.get_total_flops() / period / seeds / 1e9
        compiled = mode == "compiled"
        compute = products.compiled(step, fullgraph=True, dynamic=False) if compiled else step
        for number in range(2 * period):
            run(compute, number)
        synchronize()
        count, start = 0, time.perf_counter()
        while count < period or time.perf_counter() - start < budget:
            for number in range(period):
                run(compute, number)
            synchronize()
            count += period
    return Row(case, mode, seeds, gflop, 1e3 * (time.perf_counter() - start) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, eager, 2 s a row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    arguments = parser.parse_args()
    stacks, modes, budget = arguments.stacks, arguments.modes, 10.0
    if arguments.quick:
        stacks, modes, budget = [1], ["eager"], 2.0
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(
        f"torch {torch.__version__}, {device}, {arguments.threads} thread(s), batch 256, width 256"
    )
    print(f"{'case':>8} {'mode':>9} {'seeds':>5} {'GFLOP':>8} {'ms/step':>9} ", end="")
    print(f"{'steps/s each':>13} {'seeds x steps/s':>16} {'of the floor':>13}")
    for mode in modes:
        for seeds in stacks:
            floor = None
            for case in ("floor", *(name for name in arguments.cases if name != "floor")):
                if case == "release" and mode == "compiled":
                    continue
                row = measure(case, seeds, mode, device, budget)
                floor = floor or row
                print(
                    f"{case:>8} {mode:>9} {seeds:>5} {row.gflop:>8.2f} {row.ms_per_step:>9.1f} "
                    f"{row.per_seed:>13.1f} {row.seed_steps:>16.1f} "
                    f"{floor.ms_per_step / row.ms_per_step:>12.3f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
