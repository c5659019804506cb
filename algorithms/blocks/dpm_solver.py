"""DPM-Solver (Lu et al., 2022, arXiv:2206.00927): a discrete-time chain in a few evaluations.

The probability-flow ODE in lambda = log(alpha / sigma), with alpha = sqrt(alpha_bar) and
sigma = sqrt(1 - alpha_bar), has a linear part that is solved exactly; the noise prediction is
expanded in h, the step in lambda. Time runs from 1 (level N - 1 of the chain) to 1 / N (level 0),
log alpha piecewise linear between the levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from algorithms.api import Rng
from algorithms.blocks.ddpm import Denoiser


@dataclass(frozen=True)
class Instant:
    """A point in time with what the chain is there."""

    level: float  # index of the chain's level, fractional
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """lambda."""
        return math.log(self.alpha / self.sigma)


class DpmSolver:
    """The singlestep solver of order three ("DPM-Solver-fast"), evenly spaced in time.

    `evaluations` are spent on steps of order three; what is left over by steps of order two and one
    at the end (15: four of order three, one of two, one of one).

    Args:
        alpha_bars: of the chain, [N].
        evaluations: of the noise network for one sample.
    Raises:
        ValueError: for fewer evaluations than three, or more than the chain has levels.
    """

    def __init__(self, alpha_bars: Tensor, evaluations: int = 15) -> None:
        self.log_alphas = (0.5 * alpha_bars.double().log()).tolist()
        chain = len(self.log_alphas)
        if not 3 <= evaluations <= chain:
            raise ValueError(
                f"{evaluations} evaluations of a chain of {chain} levels; expected between 3 and "
                "the length of the chain"
            )
        times = torch.linspace(1.0, 1.0 / chain, evaluations + 1, dtype=torch.float64).tolist()
        orders = orders_of(evaluations)
        ends = [sum(orders[:i]) for i in range(len(orders) + 1)]
        # A step of order p starts at its first instant and looks at p - 1 more, evenly spaced.
        self.steps = [
            [self.instant(a + (b - a) * i / order) for i in range(order + 1)]
            for order, (a, b) in zip(orders, pairwise(times[end] for end in ends), strict=True)
        ]

    def instant(self, time: float) -> Instant:
        """The chain at a time in [1 / N, 1]."""
        position = min(max(time * len(self.log_alphas) - 1.0, 0.0), len(self.log_alphas) - 1.0)
        below = min(int(position), len(self.log_alphas) - 2)
        share = position - below
        log_alpha = (1.0 - share) * self.log_alphas[below] + share * self.log_alphas[below + 1]
        return Instant(position, math.exp(log_alpha), math.sqrt(-math.expm1(2.0 * log_alpha)))

    def sample(
        self, denoiser: Denoiser, obs: Tensor, low: Tensor, high: Tensor, rng: Rng
    ) -> Tensor:
        """One sample per row: [K, *rows, A]. One draw, led by the rows, is all that is random.

        Every noise prediction is moved to where its clean value lies within the bounds, and so is
        the result, which is still at level 0 of the chain.

        Args:
            obs: conditions, [K, *rows, O].
            low, high: bounds of the clean value, [A].
        """
        x = rng.normal(*obs.shape[1:-1], low.shape[-1])

        def noise_at(x: Tensor, at: Instant) -> Tensor:
            level = torch.full((1,) * (obs.dim() - 1), at.level, device=obs.device)
            # The bounds are those of the level below, as in EDP's code.
            alpha = math.exp(self.log_alphas[int(at.level)])
            sigma = math.sqrt(1.0 - alpha**2)
            noise = denoiser(x, level, obs)
            return noise.clamp((x - alpha * high) / sigma, (x - alpha * low) / sigma)

        for step in self.steps:
            x = solve(noise_at, x, step)
        return x.clamp(low, high)


def orders_of(evaluations: int) -> list[int]:
    """Orders of the steps that spend so many evaluations, 3 the highest."""
    whole, left = divmod(evaluations, 3)
    if left == 0:
        return [3] * (whole - 1) + [2, 1]
    return [3] * whole + [left]


def solve(noise_at: Callable[[Tensor, Instant], Tensor], x: Tensor, step: list[Instant]) -> Tensor:
    """One step from the first instant to the last; the order is the number of evaluations.

    Args:
        noise_at: (x, instant) -> noise prediction.
        step: order + 1 instants, evenly spaced in time.
    """
    start, *inner, end = step
    h = end.half_log_snr - start.half_log_snr
    first = noise_at(x, start)
    change = torch.zeros_like(x)  # of the noise prediction, at the last inner instant
    for i, at in enumerate(inner):
        r = (at.half_log_snr - start.half_log_snr) / h
        middle = at.alpha / start.alpha * x - at.sigma * math.expm1(r * h) * first
        if i == 1:  # the second inner instant uses the slope found at the first
            previous = (inner[0].half_log_snr - start.half_log_snr) / h
            curvature = math.expm1(r * h) / (r * h) - 1.0
            middle = middle - r / previous * at.sigma * curvature * change
        change = noise_at(middle, at) - first
    straight = end.alpha / start.alpha * x - end.sigma * math.expm1(h) * first
    if not inner:
        return straight
    r = (inner[-1].half_log_snr - start.half_log_snr) / h
    if len(inner) == 1:
        return straight - 0.5 / r * end.sigma * math.expm1(h) * change
    return straight - 1.0 / r * end.sigma * (math.expm1(h) / h - 1.0) * change
