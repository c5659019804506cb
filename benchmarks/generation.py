"""Cost of generated data: windows per second of the sampler, and its share of an agent's training.

    python benchmarks/generation.py [--width 32] [--windows 256] [--seeds 1]

The sampler is timed on `--windows` windows of 32 steps with hopper's dimensions and 32 Heun steps,
unguided and guided, in the same process as steps of the agent. What is shown for a set of 2048 and
for the share follows from both rates. Weights are untrained, which costs the same.
CPU only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from algorithms.api import StageInput, Train
from algorithms.blocks.rng import Rng, Stream
from algorithms.policy_guided import Config, PolicyGuided, WindowDiffusion
from algorithms.testing import Case, TinyDataset

SET = 2048  # windows
REFRESH_EVERY = 20_000  # agent steps between two sets, as in experiments/policy_guided.yaml
AGENT_STEPS = 100


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds = tuple(range(arguments.seeds))
    dataset = TinyDataset(obs_dim=11, action_dim=3, num_episodes=20, episode_length=50)
    config = Config(width=arguments.width, num_windows=arguments.windows)
    row = torch.ones(len(seeds), 16)
    inputs = {"scale": StageInput(None, {"mean": 0.0 * row, "std": row})}
    model = WindowDiffusion(config, dataset.spec, seeds, inputs)
    inputs["diffusion"] = StageInput(config, model.state_dict())
    agent = PolicyGuided(config, dataset.spec, seeds, inputs)
    agent.refresh_every = 0  # steps only
    rng = lambda: Rng.at_step(seeds, 1, Stream.MAKE)  # noqa: E731
    stage = Train("agent", PolicyGuided, config, AGENT_STEPS)
    case = Case(stage, dataset, seeds=seeds, steps=AGENT_STEPS)
    case.train(agent)
    step = seconds_of(lambda: case.train(agent)) / AGENT_STEPS
    print(f"U-Net of width {arguments.width}, {len(seeds)} seed(s), {arguments.threads} thread(s)")
    print(f"{'':>9} {'windows/s':>10} {'s for 2048':>11} {'share of training':>18}")
    for name, coef in (("unguided", 0.0), ("guided", 1.0)):
        with torch.no_grad():
            seconds = seconds_of(lambda coef=coef: agent.generate(dataset, rng(), coef))
        rate = arguments.windows * len(seeds) / seconds
        whole = SET * len(seeds) / rate
        share = whole / (whole + REFRESH_EVERY * step)
        print(f"{name:>9} {rate:10.1f} {whole:11.1f} {share:18.0%}")


if __name__ == "__main__":
    main()
