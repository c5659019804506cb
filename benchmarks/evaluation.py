"""Evaluation speed: K policies x N environments in one call, against one environment at a time.

    python benchmarks/evaluation.py [--env Hopper-v5] [--seeds 4] [--envs 10] [--compile]

Diffusion-QL at its published size (3 x 256, 5 denoising steps, 50 candidates per observation).
All sides take turns in this process with the same kind of policy; the ratio of the medians is what
to read, and "first" is an evaluation that compiles. No dataset is needed: the policy's weights are
untrained, which costs the same to evaluate.
"""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np
import torch

from algorithms.api import DatasetSpec, Statistics
from algorithms.blocks.rng import Rng, Stream
from algorithms.diffusion_ql import Config, DiffusionQL
from harness.evaluate import Evaluator


def make_policy(env: gymnasium.Env, seeds: list[int], device: str) -> DiffusionQL:
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    spec = DatasetSpec(
        id="benchmark",
        digest="",
        obs_dim=obs_dim,
        action_dim=action_dim,
        action_low=tuple(env.action_space.low.tolist()),
        action_high=tuple(env.action_space.high.tolist()),
        num_steps=1,
        num_episodes=1,
        statistics=Statistics((0.0,) * obs_dim, (1.0,) * obs_dim, 0.0, 1.0, 0.0, 1.0),
    )
    return DiffusionQL(Config(), spec, seeds).to(device)


def one_at_a_time(env_id: str, seed: int, env_steps: int, device: str) -> float:
    """Environment steps per second of the usual loop: one environment, one observation a call."""
    env = gymnasium.make(env_id)
    policy = make_policy(env, [seed], device)
    seeds = torch.tensor([seed], device=device)
    obs, _ = env.reset(seed=0)
    started = time.perf_counter()
    for env_step in range(env_steps):
        rng = Rng(seeds, torch.zeros_like(seeds), Stream.EVALUATION, env_step)
        with torch.no_grad():
            batch = torch.as_tensor(obs, dtype=torch.float32, device=device).view(1, 1, -1)
            action = policy.act(batch, rng)[0, 0].cpu().numpy()
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    seconds = time.perf_counter() - started
    env.close()
    return env_steps / seconds


class Stacked:
    """`Evaluator` on untrained policies, evaluated again and again."""

    def __init__(
        self,
        env_id: str,
        num_seeds: int,
        num_envs: int,
        env_steps: int,
        device: str,
        compiled: bool,
    ) -> None:
        cut = lambda: gymnasium.make(env_id, max_episode_steps=env_steps)  # noqa: E731
        self.evaluator = Evaluator(cut, num_seeds, num_envs, num_envs, 0, compiled)
        self.seeds = torch.arange(num_seeds, device=device)
        self.policy = make_policy(self.evaluator.slots[0][0].env, list(range(num_seeds)), device)

    def evaluate(self) -> tuple[float, float, float]:
        """Environment steps per second, the mean share of slots in use, and the seconds."""
        started = time.perf_counter()
        alive = [True] * len(self.seeds)
        episodes, _ = self.evaluator.run(
            self.policy, self.seeds, torch.zeros_like(self.seeds), alive
        )
        seconds = time.perf_counter() - started
        lengths = np.array([[item.length for item in row] for row in episodes])
        return lengths.sum() / seconds, float(lengths.mean() / lengths.max()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--envs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="longest episode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also with the call compiled")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; medians are shown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.env}, Diffusion-QL 3x256, 5 denoising steps, 50 candidates, "
        f"{arguments.device}, {arguments.threads} thread(s)"
    )
    modes = (False, True) if arguments.compile else (False,)
    contestants = {
        f"{seeds} x {arguments.envs}{', compiled' if mode else ''}": Stacked(
            arguments.env, seeds, arguments.envs, arguments.steps, arguments.device, mode
        )
        for seeds in sorted({1, arguments.seeds})
        for mode in modes
    }
    one_at_a_time(arguments.env, 0, 20, arguments.device)  # warm-up
    first = {name: each.evaluate()[2] for name, each in contestants.items()}  # compiles
    base, rates, used = [], {name: [] for name in contestants}, {}
    for _ in range(arguments.repeats):
        base.append(one_at_a_time(arguments.env, 0, arguments.steps, arguments.device))
        for name, each in contestants.items():
            rate, used[name], _ = each.evaluate()
            rates[name].append(rate)
    middle = float(np.median(base))
    print(
        f"{'seeds x envs':>18} {'env steps/s':>12} {'ratio':>7} {'slots in use':>13} {'first':>8}"
    )
    print(f"{'1 x 1, loop':>18} {middle:12.1f} {1.0:7.2f}")
    for name, values in rates.items():
        rate = float(np.median(values))
        ratio = f"{rate:12.1f} {rate / middle:7.2f}"
        print(f"{name:>18} {ratio} {used[name]:13.0%} {first[name]:6.1f} s")


if __name__ == "__main__":
    main()
