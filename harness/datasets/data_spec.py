"""The data transforms an experiment may name; part of a trial's identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

REWARD_TRANSFORMS = (
    "none",
    "normalize",
    "cql_antmaze",
    "iql_antmaze",
    "iql_locomotion",
    "antmaze",
    "corl_antmaze",
    "times_100",
    "trajectory_range",
    "corl_locomotion",
    "min_max",
)
TRUNCATED_LAST_STEP = ("drop", "keep")


@dataclass(frozen=True)
class DataSpec:
    """Which transitions a learner sees, and with which rewards.

    Attributes:
        reward: transform of the rewards, over the transitions that can be drawn (r is a reward):
            `none`; `normalize`: (r - mean) / unbiased std; `cql_antmaze`: 4 (r - 0.5);
            `iql_antmaze`: r - 1; `antmaze`: 2 (r - 0.25); `iql_locomotion`: 1000 r / (max - min)
            of the returns of trajectories split on terminations only, a trajectory left open at
            the end not counted. Definitions are those of the Diffusion-QL code (`reward_tune`).
            `min_max`: 2 (r - min) / (max - min) - 1 (EDP's code);
            `corl_antmaze`: 10 r - 5; `times_100`: 100 r; `trajectory_range`: 1000 r / (max - min)
            of the returns of the episodes, of their steps that can be drawn (codes of IQL, IDQL);
            `corl_locomotion`: the same of pieces that end at a termination or at 1000 steps, one
            left open at the end not counted. CORL reads episodes that way; without their last
            step those of 1000 have 999, so that its pieces straddle them.
        truncated_last_step: `drop` leaves out the last transition of a time-limited episode, as
            D4RL's `qlearning_dataset` does; `keep` keeps it, with its real next observation.
        top_fraction: keeps the best fraction of episodes by raw return, at least one (10 % BC:
            0.1). Ties go to the earlier episode; the data's order is kept. Episodes are the data's;
            CORL ranks pieces that end at a termination or at 1000 steps, which on Adroit join many.
        discount: of the returns `top_fraction` ranks by. 1 in all of CORL's configs of 10 % BC; the
            0.99 in its code is a default that they override, and ranks by the first 100 steps.
        held_out: share of the episodes kept from the learner, for likelihoods on data it has not
            seen; see `held_out_episodes`. `top_fraction` is of the others.
    """

    reward: str = "none"
    truncated_last_step: str = "drop"
    top_fraction: float = 1.0
    discount: float = 1.0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        for field, value, known in (
            ("reward", self.reward, REWARD_TRANSFORMS),
            ("truncated_last_step", self.truncated_last_step, TRUNCATED_LAST_STEP),
        ):
            if value not in known:
                raise ValueError(f"data.{field} is {value!r}; expected one of {', '.join(known)}")
        for field, number in (("top_fraction", self.top_fraction), ("discount", self.discount)):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"data.{field} is {number!r}; expected a number in (0, 1]")
            if not (math.isfinite(number) and 0.0 < number <= 1.0):
                raise ValueError(f"data.{field} is {number}; expected a number in (0, 1]")
        held = self.held_out
        if isinstance(held, bool) or not isinstance(held, int | float):
            raise TypeError(f"data.held_out is {held!r}; expected a number in [0, 1)")
        if not 0.0 <= held < 1.0:
            raise ValueError(f"data.held_out is {held}; expected a number in [0, 1)")


def held_out_episodes(count: int, share: float) -> np.ndarray:
    """Which of `count` episodes are held out, bool [E]: the same for all seeds and algorithms.

    At least one of them if `share` is positive, and at least one is not.

    Raises:
        ValueError: for fewer than two episodes.
    """
    if not share:
        return np.zeros(count, bool)
    if count < 2:
        raise ValueError(f"{count} episode; at least 2 are needed to hold one out")
    order = np.random.default_rng(0).permutation(count)
    return np.isin(np.arange(count), order[: min(count - 1, max(1, round(share * count)))])
