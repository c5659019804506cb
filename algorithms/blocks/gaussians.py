"""Gaussian policies: one that is not squashed, one squashed by tanh, and their log densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.api import Rng
from algorithms.blocks.layers import MLP, constant


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, std**2), summed over the last dimension: [..., A] -> [...]."""
    z = (x - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(dim=-1)


def tanh_normal(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(mean + std * noise), [..., A], and its log density on (-1, 1), [...].

    The density is that of the Gaussian divided by the slope 1 - tanh(u)**2, which is computed from
    u: at 1 - 1e-9 the action itself has no digits left.
    """
    u = mean + torch.exp(log_std) * noise
    log_slope = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
    own = (-0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(dim=-1)
    return torch.tanh(u), own - log_slope.sum(dim=-1)


class DiagonalGaussian(nn.Module):
    """Mean tanh(net(x)) and a log-std per dimension that does not depend on x.

    Not squashed: only the mean is within (-1, 1). Maps [K, *rows, in] to the mean [K, *rows, A] and
    the clamped log-std, [K, 1, ..., A].

    Args:
        sizes: input, hidden and output widths.
        log_std_range: the log-std starts at 0 and is clamped to this.
        orthogonal_gain: as in `MLP`.
        dropout_rate: of hidden layers, in calls that pass `rng`.
    """

    def __init__(
        self,
        rng: Rng,
        sizes: Sequence[int],
        log_std_range: tuple[float, float],
        orthogonal_gain: float | None = None,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = MLP(rng, sizes, dropout_rate=dropout_rate, orthogonal_gain=orthogonal_gain)
        self.log_std = constant(torch.zeros(rng.step.shape[0], sizes[-1], device=rng.step.device))
        self.log_std_range = log_std_range

    def forward(self, x: Tensor, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        mean = torch.tanh(self.net(x, rng))
        shape = (self.log_std.shape[0], *(1,) * (x.dim() - 2), self.log_std.shape[-1])
        return mean, self.log_std.clamp(*self.log_std_range).view(shape)


class TanhGaussian(nn.Module):
    """Mean and log-std of a Gaussian that `tanh_normal` squashes: both [K, *rows, A].

    log-std = multiplier * net + offset, clamped; CORL's CQL trains these two scalars as well. The
    last layer starts small (Xavier, uniform) with zero biases, so that means start near 0.

    Args:
        sizes: input, hidden and output (A) widths.
        multiplier, offset: their initial values.
        output_gain: of the last layer's Xavier initialisation.
    """

    def __init__(
        self,
        rng: Rng,
        sizes: Sequence[int],
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        multiplier: float = 1.0,
        offset: float = -1.0,
        output_gain: float = 0.01,
    ) -> None:
        super().__init__()
        self.net = MLP(rng, (*sizes[:-1], 2 * sizes[-1]))
        last: Any = self.net.layers[-1]
        fan_in, fan_out = last.weight.shape[-2:]
        # The layer's own initialisation is uniform in +-1/sqrt(fan_in).
        last.weight.mul_(output_gain * math.sqrt(6.0 / (fan_in + fan_out)) * math.sqrt(fan_in))
        last.bias.zero_()
        scalar = torch.ones(rng.step.shape[0], 1, device=rng.step.device)
        self.multiplier = constant(scalar * multiplier)  # [K, 1]
        self.offset = constant(scalar * offset)
        self.log_std_range = log_std_range

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(x).chunk(2, dim=-1)
        shape = (-1, *(1,) * (x.dim() - 1))
        log_std = self.multiplier.view(shape) * log_std + self.offset.view(shape)
        return mean, log_std.clamp(*self.log_std_range)
