"""Bounds of the actions, which may differ by dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from algorithms.api import Rng


class ActionBounds(nn.Module):
    """The box [low, high] in D dimensions, and the map from [-1, 1] onto it.

    Formulas with `max_action` in papers and codes assume low = -high; here `reach`, half the width,
    takes its place. The constants are buffers outside the state dict: they follow from the dataset.
    """

    low: Tensor
    high: Tensor
    middle: Tensor
    reach: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        below, above = torch.tensor(low), torch.tensor(high)
        constants = {
            "low": below,
            "high": above,
            "middle": (above + below) / 2.0,
            "reach": (above - below) / 2.0,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def stretch(self, unit: Tensor) -> Tensor:
        """The action a point of [-1, 1] stands for, [..., D]."""
        return self.clamp(self.middle + self.reach * unit)

    def unit(self, action: Tensor) -> Tensor:
        """The point of [-1, 1] that `stretch` maps onto an action, [..., D]."""
        return (action - self.middle) / self.reach

    def clamp(self, action: Tensor, margin: float = 0.0) -> Tensor:
        """`action` moved into the box, at least `margin` times the reach away from its sides."""
        inside = margin * self.reach
        return torch.clamp(action, self.low + inside, self.high - inside)

    def smooth(self, action: Tensor, rng: Rng, std: float, clip: float) -> Tensor:
        """TD3's smoothed action: plus clipped Gaussian noise, clamped; both in units of reach."""
        noise = (std * rng.normal(*action.shape[1:])).clamp(-clip, clip)
        return self.clamp(action + self.reach * noise)
