"""DOSER's 1-D navigation toy as two datasets: the optimal step plus a little or much noise."""

from __future__ import annotations

import numpy as np

from harness.datasets.minari import RawDataset
from harness.datasets.writing import write_dataset

NOISE = {"expert": 0.05, "medium": 0.3}  # std of the noise on actions; ours, the paper gives none
SOURCE = "closed form: standing still, and the optimal policy, from uniform starts"
EPISODE_STEPS = 20


def dataset_id_of(kind: str) -> str:
    return f"generated/navigation1d/{kind}-v0"


def make_navigation1d(
    kind: str,
    seed: int = 0,
    steps: int = 10_000,
    dataset_id: str | None = None,
    overwrite: bool = False,
) -> RawDataset:
    """Writes episodes of 20 steps from uniform starts: a = clip(-s, -1, 1) + noise, clipped.

    Args:
        kind: expert | medium.
    Raises:
        ValueError: for another kind, or if `steps` is not a positive multiple of 20.
        DatasetError: if the id is taken.
    """
    from minari.data_collector.episode_buffer import EpisodeBuffer

    from harness.environments import NAVIGATION_ID, Navigation1D

    if kind not in NOISE:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(NOISE)}")
    if steps < EPISODE_STEPS or steps % EPISODE_STEPS:
        raise ValueError(f"steps is {steps}; expected a positive multiple of {EPISODE_STEPS}")
    rng = np.random.default_rng(seed)
    count = steps // EPISODE_STEPS
    obs = np.empty((count, EPISODE_STEPS + 1), np.float64)
    action = np.empty((count, EPISODE_STEPS), np.float64)
    obs[:, 0] = rng.uniform(-Navigation1D.REACH, Navigation1D.REACH, count)
    for t in range(EPISODE_STEPS):
        noise = NOISE[kind] * rng.standard_normal(count)
        action[:, t] = np.clip(np.clip(-obs[:, t], -1.0, 1.0) + noise, -1.0, 1.0)
        obs[:, t + 1] = Navigation1D.moved(obs[:, t], action[:, t])
    ended = np.zeros(EPISODE_STEPS, bool)
    truncated = np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1
    episodes = [
        EpisodeBuffer(
            observations=obs[i, :, None].astype(np.float32),
            actions=action[i, :, None].astype(np.float32),
            rewards=-np.abs(obs[i, 1:]),
            terminations=ended,
            truncations=truncated,
        )
        for i in range(count)
    ]
    low, high = Navigation1D.ANCHORS
    return write_dataset(
        dataset_id or dataset_id_of(kind),
        episodes,
        overwrite=overwrite,
        extra_metadata={"harness_ref_source": SOURCE, "harness_seed": seed},
        env=NAVIGATION_ID,
        algorithm_name="the optimal step plus noise",
        description=(
            "1-D navigation of DOSER (arXiv 2605.08202, Sec. 4.1), our numbers: optimal action "
            f"plus noise of std {NOISE[kind]}."
        ),
        ref_min_score=low,
        ref_max_score=high,
    )
