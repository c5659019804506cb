"""The 2-D bandit of Diffusion-QL's Figure 1 as an in-memory dataset, and how samples are judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from algorithms.api import Statistics, phase_of
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import TinyDataset

CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
REWARDS = np.array([3.0, 0.0, 1.5, 5.0])  # mean of each corner; the last is the best


def bandit_dataset(per_corner: int = 2500, seed: int = 0) -> TinyDataset:
    """Reference: 4 corners, action noise 0.05 clipped to [-1, 1], reward noise 0.5, one step."""
    generator = np.random.default_rng(seed)
    size = 4 * per_corner
    corner = np.repeat(np.arange(4), per_corner)
    action = np.clip(CORNERS[corner] + 0.05 * generator.standard_normal((size, 2)), -1.0, 1.0)
    reward = REWARDS[corner] + 0.5 * generator.standard_normal(size)
    dataset = TinyDataset(obs_dim=2, action_dim=2, num_episodes=size, episode_length=1)
    dataset.obs = dataset.next_obs = torch.zeros(size, 2)
    dataset.action = torch.tensor(action, dtype=torch.float32)
    dataset.reward = torch.tensor(reward, dtype=torch.float32)
    dataset.terminated, dataset.truncated = torch.ones(size), torch.zeros(size)
    statistics = Statistics((0.0, 0.0), (0.0, 0.0), reward.mean(), reward.std(), -2.0, 8.0)
    dataset.spec = replace(dataset.spec, id="test/bandit2d-v0", statistics=statistics)
    return dataset


def train(learner, dataset, seeds, steps: int):
    """Plain training; returns the learner."""
    tensor = torch.tensor(seeds)
    with torch.no_grad():
        for i in range(steps):
            rng = Rng(tensor, torch.full_like(tensor, i), Stream.TRAIN)
            metrics = learner.update(learner.sample(dataset, rng), rng, *phase_of(learner, i))
    return learner, metrics


def actions(learner, seeds, count: int = 1000) -> np.ndarray:
    """`count` actions of every seed, [K, count, 2]."""
    tensor = torch.tensor(seeds)
    with torch.no_grad():
        rng = Rng(tensor, torch.zeros_like(tensor), Stream.EVALUATION)
        return learner.act(torch.zeros(len(seeds), count, 2), rng).numpy()


def corner_fractions(action: np.ndarray, radius: float = 0.15) -> np.ndarray:
    """Fraction of samples within `radius` of each corner, [K, 4]."""
    distance = np.linalg.norm(action[:, :, None] - CORNERS, axis=-1)  # [K, N, 4]
    return (distance < radius).mean(axis=1)
