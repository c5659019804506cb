"""Learned positive numbers: soft actor-critic's temperature, Lagrange multipliers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Metrics, Rng
from algorithms.blocks.layers import constant

MULTIPLIER_MAX = 1e6


class LogScalar(nn.Module):
    """exp of a learned number per seed, at most `MULTIPLIER_MAX`: [K].

    Args:
        start: the learned number at first; the value is its exponential.
    """

    def __init__(self, rng: Rng, start: float) -> None:
        super().__init__()
        log = torch.full_like(rng.step, start, dtype=torch.float32)
        self.log = constant(log.unsqueeze(1))  # [K, 1]

    def forward(self) -> Tensor:
        return self.log.squeeze(1).exp().clamp(max=MULTIPLIER_MAX)


def entropy_loss(coef: Any, log_pi: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """-log(entropy_coef) (mean log pi + target entropy), [K] (Haarnoja et al., 2018b).

    Its step raises the coefficient where the policy's entropy is below the target.

    Args:
        coef: a `LogScalar`, or its stand-in.
        log_pi: mean log density of the policy's actions, [K].
    """
    now = coef()
    per_seed = -torch.log(now) * (log_pi + target_entropy)
    return per_seed, {"entropy_coef": now}
