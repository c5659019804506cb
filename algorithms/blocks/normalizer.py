"""Observation statistics as part of a learner, so that a saved policy is complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """(x - mean) / (std + eps) for x [K, *rows, D].

    Args:
        mean, std: D statistics, the same for all K seeds (they are kept per seed so that seeds can
            be taken out of a checkpoint and stacked anew).
        eps: added to the standard deviation; 1e-3 in the TD3+BC and CORL codes.
    Raises:
        ValueError: if `mean` and `std` differ in length.
    """

    def __init__(
        self, num_seeds: int, mean: Sequence[float], std: Sequence[float], eps: float = 1e-3
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"{len(mean)} means but {len(std)} standard deviations")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer(
            "mean", torch.tensor([list(mean)] * num_seeds, dtype=torch.float32)
        )  # [K, D]
        self.register_buffer("std", torch.tensor([list(std)] * num_seeds, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.mean.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
        return (x - self.mean.view(shape)) / (self.std.view(shape) + self.eps)

    def inverse(self, x: Tensor) -> Tensor:
        """The x whose normalised value is given."""
        shape = (self.mean.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
        return x * (self.std.view(shape) + self.eps) + self.mean.view(shape)
