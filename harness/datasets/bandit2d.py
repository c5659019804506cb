"""Two 2-D toys as datasets of one-step episodes: Diffusion-QL's bandit and VDD's ring of modes."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.datasets.catalog import BANDIT_ANCHORS, BANDIT_SOURCE
from harness.datasets.minari import RawDataset
from harness.datasets.writing import write_dataset

DATASET_ID = "generated/bandit2d-v0"
RING_ID = "generated/ring2d-v0"
ACTION_STD = 0.05
REWARD_STD = 0.5


def make_bandit2d(
    seed: int = 0, steps: int = 10_000, dataset_id: str = DATASET_ID, overwrite: bool = False
) -> RawDataset:
    """Writes the bandit's data: a quarter of the steps at each corner, corner by corner.

    Actions are corner + N(0, 0.05^2), clipped to [-1, 1]; rewards N(mean of the corner, 0.5^2);
    the state is always (0, 0); every episode is one terminated step.

    Raises:
        ValueError: if `steps` is not a positive multiple of 4.
        DatasetError: if the id is taken.
    """
    from harness.environments import BANDIT_ID, Bandit2D

    if steps < 4 or steps % 4:
        raise ValueError(f"steps is {steps}; expected a positive multiple of 4 (one per corner)")
    rng = np.random.default_rng(seed)
    corner = np.repeat(np.arange(4), steps // 4)
    action = Bandit2D.CORNERS[corner] + ACTION_STD * rng.standard_normal((steps, 2))
    action = np.clip(action, -1.0, 1.0).astype(np.float32)
    reward = Bandit2D.MEANS[corner] + REWARD_STD * rng.standard_normal(steps)
    return write_dataset(
        dataset_id,
        _one_step_episodes(action, reward),
        overwrite=overwrite,
        extra_metadata={"harness_ref_source": BANDIT_SOURCE, "harness_seed": seed},
        env=BANDIT_ID,
        algorithm_name="four Gaussians at the corners",
        description=(
            "2-D bandit of Diffusion-QL (arXiv 2208.06193, Fig. 1): equal parts of four corners, "
            f"action std {ACTION_STD}, reward std {REWARD_STD}."
        ),
        ref_min_score=BANDIT_ANCHORS[0],
        ref_max_score=BANDIT_ANCHORS[1],
    )


def make_ring2d(
    seed: int = 0, steps: int = 8_000, dataset_id: str = RING_ID, overwrite: bool = False
) -> RawDataset:
    """Writes draws of eight Gaussians on a ring, mode by mode; no rewards to learn from.

    Actions are centre + N(0, 0.5^2), clipped to [-4, 4], with centres at radius 2; the reward is
    the environment's; the state is always (0, 0); every episode is one terminated step.

    Raises:
        ValueError: if `steps` is not a positive multiple of 8.
        DatasetError: if the id is taken.
    """
    from harness.environments import RING_ID as ENV_ID
    from harness.environments import Ring2D

    modes = len(Ring2D.CENTRES)
    if steps < modes or steps % modes:
        raise ValueError(f"steps is {steps}; expected a positive multiple of {modes} (the modes)")
    rng = np.random.default_rng(seed)
    centre = Ring2D.CENTRES[np.repeat(np.arange(modes), steps // modes)]
    action = centre + Ring2D.STD * rng.standard_normal((steps, 2))
    action = np.clip(action, -Ring2D.BOUND, Ring2D.BOUND).astype(np.float32)
    reward = (Ring2D.distance(action) <= Ring2D.SUPPORT_RADIUS).astype(np.float64)
    return write_dataset(
        dataset_id,
        _one_step_episodes(action, reward),
        overwrite=overwrite,
        extra_metadata={"harness_seed": seed},
        env=ENV_ID,
        algorithm_name="eight Gaussians on a ring",
        description=(
            "2-D toy of VDD (arXiv 2406.12538): eight Gaussians of std 0.5 at radius 2, in equal "
            "parts."
        ),
    )


def _one_step_episodes(action: np.ndarray, reward: np.ndarray) -> list[Any]:
    """Episodes of one terminated step at the state (0, 0)."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    obs = np.zeros((2, 2), np.float32)
    ended, not_ended = np.ones(1, bool), np.zeros(1, bool)
    return [
        EpisodeBuffer(
            observations=obs,
            actions=action[i : i + 1],
            rewards=reward[i : i + 1],
            terminations=ended,
            truncations=not_ended,
        )
        for i in range(len(action))
    ]
