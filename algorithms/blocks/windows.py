"""Windows of consecutive steps: where they may start, and how they become vectors and come back.

A row of a window is [obs, action, reward, terminated], every entry standardised, the action first
mapped by arctanh so that a decoded action is always inside its bounds. L rows decode to L - 1
transitions: the next observation of a row is the observation of the following one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from algorithms.api import Batch, DatasetSpec
from algorithms.blocks.bounds import ActionBounds

ACTION_LIMIT = 0.999  # unit actions are clamped to it before arctanh


def window_starts(
    lengths: Sequence[int] | np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    length: int,
    stride: int,
) -> np.ndarray:
    """First rows of the windows that policy-guided diffusion's code trains on, ascending: int64.

    Of the windows inside one episode: every `stride`-th, every episode's first, every one that
    ends in a terminal; but none that ends in a truncated step.

    Args:
        lengths: transitions of each episode, in order.
        terminated, truncated: 0 or 1 for each transition, [S].
    Raises:
        ValueError: if `stride` or `length` is below 1.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length is {length} and stride {stride}; expected at least 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # [S], first row of one's episode
    row = np.arange(len(first))
    fits = row - first + length <= np.repeat(lengths, lengths)
    valid = row[fits]
    last = valid + length - 1
    chosen = np.arange(len(valid)) % stride == 0
    chosen |= (valid == first[valid]) | (terminated[last] > 0)
    return valid[chosen & ~(truncated[last] > 0)]


class WindowCoder(nn.Module):
    """Segments of a dataset as standardised rows [K, B, L, D], D = O + A + 2, and back.

    Args:
        mean, std: of the rows of `features`, [K, D]; an entry that never varies has std 1.
        final_row: what the last row holds. `step`: a step like the others (the code), whose action,
            reward and termination are not decoded, so that no decoded transition terminates where
            the data do. `next_obs`: the observation after the last transition and nothing else
            (its other entries are 0, their mean).
    Raises:
        ValueError: for another `final_row`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: DatasetSpec, mean: Tensor, std: Tensor, final_row: str = "step"
    ) -> None:
        super().__init__()
        if final_row not in ("step", "next_obs"):
            raise ValueError(f"final_row is {final_row!r}; expected step or next_obs")
        self.final_row = final_row
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        self.obs_dim, self.action_dim = spec.obs_dim, spec.action_dim
        self.width = spec.obs_dim + spec.action_dim + 2
        self.actions = slice(spec.obs_dim, spec.obs_dim + spec.action_dim)
        self.register_buffer("mean", mean[:, None, None], persistent=False)  # [K, 1, 1, D]
        self.register_buffer("std", std[:, None, None], persistent=False)

    def steps(self, length: int) -> int:
        """How many steps of the data a window of `length` rows is made of."""
        return length if self.final_row == "step" else length - 1

    def encode(self, segment: Batch) -> Tensor:
        """[K, B, steps(L), ...] -> [K, B, L, D]."""
        rows = (features(segment, self.bounds) - self.mean) / self.std
        if self.final_row == "step":
            return rows
        next_obs = (segment.next_obs[:, :, -1:] - self.of_obs(self.mean)) / self.of_obs(self.std)
        empty = torch.zeros_like(rows[:, :, -1:, self.obs_dim :])
        return torch.cat((rows, torch.cat((next_obs, empty), dim=-1)), dim=2)

    def decode(self, rows: Tensor) -> Batch:
        """[K, M, L, D] -> transitions [K, M, L - 1, ...]; a window's last one is truncated."""
        obs, reward = self.obs(rows), rows * self.std + self.mean
        terminated = (reward[:, :, :-1, -1] > 0.5).float()
        truncated = torch.zeros_like(terminated)
        truncated[:, :, -1] = 1.0 - terminated[:, :, -1]
        return Batch(
            obs=obs[:, :, :-1],
            action=self.action(rows[..., self.actions])[:, :, :-1],
            reward=reward[:, :, :-1, -2],
            next_obs=obs[:, :, 1:],
            terminated=terminated,
            truncated=truncated,
        )

    def obs(self, rows: Tensor) -> Tensor:
        """Observations in their own units, [K, M, L, O]."""
        return self.of_obs(rows) * self.of_obs(self.std) + self.of_obs(self.mean)

    def action(self, encoded: Tensor) -> Tensor:
        """Actions in their own units, strictly inside the bounds: [K, M, L, A] to the same."""
        free = encoded * self.std[..., self.actions] + self.mean[..., self.actions]
        return self.bounds.stretch(torch.tanh(free))

    def of_obs(self, rows: Tensor) -> Tensor:
        return rows[..., : self.obs_dim]

    def has_action(self, length: int) -> Tensor:
        """1 for the rows that hold an action, [L]."""
        held = torch.ones(length, device=self.mean.device)
        held[self.steps(length) :] = 0.0
        return held


def features(batch: Batch, bounds: ActionBounds) -> Tensor:
    """[obs, arctanh of the unit action, reward, terminated]: [K, *rows, D]."""
    unit = ((batch.action - bounds.middle) / bounds.reach).clamp(-ACTION_LIMIT, ACTION_LIMIT)
    scalars = torch.stack((batch.reward, batch.terminated), dim=-1)
    return torch.cat((batch.obs, torch.atanh(unit), scalars), dim=-1)
