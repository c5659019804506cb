"""Evaluation speed: K policies x N environments in one call, against one environment at a time.

    python benchmarks/evaluation.py [--env Hopper-v5] [--seeds 4] [--envs 10] [--device cpu]

Diffusion-QL at its published size (3 x 256, 5 denoising steps, 50 candidates per observation).
Both sides play the same number of environment steps with the same kind of policy in this process;
the ratio is what to read. No dataset is needed: the policy's weights are untrained, which costs
the same to evaluate.
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


def stacked(
    env_id: str, num_seeds: int, num_envs: int, env_steps: int, device: str
) -> tuple[float, float]:
    """Environment steps per second of `Evaluator`, and the mean share of slots in use."""
    cut = lambda: gymnasium.make(env_id, max_episode_steps=env_steps)  # noqa: E731
    evaluator = Evaluator(cut, num_seeds, num_envs, num_envs, first_env_seed=0)
    seeds = torch.arange(num_seeds, device=device)
    policy = make_policy(evaluator.slots[0][0].env, list(range(num_seeds)), device)
    started = time.perf_counter()
    episodes, _ = evaluator.run(policy, seeds, torch.zeros_like(seeds), [True] * num_seeds)
    seconds = time.perf_counter() - started
    evaluator.close()
    lengths = np.array([[item.length for item in row] for row in episodes])
    return lengths.sum() / seconds, float(lengths.mean() / lengths.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--envs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="longest episode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.env}, Diffusion-QL 3x256, 5 denoising steps, 50 candidates, "
        f"{arguments.device}, {arguments.threads} thread(s)"
    )
    one_at_a_time(arguments.env, 0, 20, arguments.device)  # warm-up
    base = one_at_a_time(arguments.env, 0, arguments.steps, arguments.device)
    print(f"{'seeds x envs':>14} {'env steps/s':>12} {'ratio':>7} {'slots in use':>13}")
    print(f"{'1 x 1, loop':>14} {base:12.1f} {1.0:7.2f} {'':>13}")
    for seeds in sorted({1, arguments.seeds}):
        rate, used = stacked(
            arguments.env, seeds, arguments.envs, arguments.steps, arguments.device
        )
        print(f"{f'{seeds} x {arguments.envs}':>14} {rate:12.1f} {rate / base:7.2f} {used:13.0%}")


if __name__ == "__main__":
    main()
