"""Learned positive numbers: soft actor-critic's temperature, Lagrange multipliers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Metrics, Rng
from algorithms.blocks.layers import constant

MULTIPLIER_MAX = 1e6


class LogScalar(nn.Module):
    """A number per seed that is learned as its logarithm: [K].

    Args:
        start: the logarithm at first.
    """

    def __init__(self, rng: Rng, start: float) -> None:
        super().__init__()
        log = torch.full_like(rng.step, start, dtype=torch.float32)
        self.log = constant(log.unsqueeze(1))  # [K, 1]

    def forward(self) -> Tensor:
        """The logarithm, so that a loss of it has a gradient however small or large the number."""
        return self.log.squeeze(1)

    def value(self) -> Tensor:
        return positive(self())


def positive(log: Tensor) -> Tensor:
    """The number, at most `MULTIPLIER_MAX`."""
    return log.exp().clamp(max=MULTIPLIER_MAX)


def entropy_loss(coef: Any, log_pi: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """-log(entropy_coef) (mean log pi + target entropy), [K] (Haarnoja et al., 2018b).

    Its step raises the coefficient where the policy's entropy is below the target.

    Args:
        coef: a `LogScalar`, or its stand-in.
        log_pi: mean log density of the policy's actions, [K].
    """
    log = coef()
    per_seed = -log * (log_pi + target_entropy)
    return per_seed, {"entropy_coef": positive(log)}
