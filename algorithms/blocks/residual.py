"""Residual noise network of IDQL (Hansen-Estruch et al., 2023) and Flax's initial values.

The authors' code is in Flax, whose defaults differ from PyTorch's: biases start at zero, weights
as named where they are drawn, and layer norms add 1e-6 to the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from algorithms.api import Rng
from algorithms.blocks.layers import ACTIVATIONS, MLP, LayerNorm, Linear, constant, dropout

M = TypeVar("M", bound=nn.Module)
Initializer = Callable[[Rng, tuple[int, ...]], Tensor]
"""(rng, (*lead, in, out)) -> weights [K, *lead, in, out]."""

FLAX_NORM_EPS = 1e-6


def xavier_uniform(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    """Uniform in +-sqrt(6 / (in + out)) (Glorot and Bengio, 2010): [K, *shape]."""
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return (2.0 * rng.uniform(*shape) - 1.0) * bound


def lecun_normal(rng: Rng, shape: tuple[int, ...]) -> Tensor:
    """Normal of variance 1 / in, cut at two standard deviations of the uncut one: [K, *shape].

    Flax's default for dense layers: the cut is compensated, so that the variance is 1 / in after
    it. Drawn by inverting the distribution function, one uniform each.
    """
    tail = 0.5 * math.erfc(2.0 / math.sqrt(2.0))  # below -2
    density = math.exp(-2.0) / math.sqrt(2.0 * math.pi)  # at 2
    std_of_cut = math.sqrt(1.0 - 4.0 * density / (1.0 - 2.0 * tail))
    normal = torch.special.ndtri(tail + (1.0 - 2.0 * tail) * rng.uniform(*shape))
    return normal / (std_of_cut * math.sqrt(shape[-2]))


def redraw(module: M, rng: Rng, initializer: Initializer) -> M:
    """`module`, with the weights of every `Linear` in it drawn anew and their biases zero."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.weight.copy_(initializer(rng, tuple(layer.weight.shape[1:])))
            layer.bias.zero_()
    return module


class FourierFeatures(nn.Module):
    """Cosines, then sines, of 2 pi w t with learnable frequencies w: t -> [K, *rows, dim].

    Frequencies start as N(0, 0.2**2). `t` is the raw level, any shape that broadcasts to
    [K, *rows]; the result keeps its singleton rows.

    Raises:
        ValueError: if `dim` is odd or below 2.
    """

    def __init__(self, rng: Rng, dim: int, std: float = 0.2) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"time features of dimension {dim}; expected an even number from 2")
        self.frequency = constant(std * rng.normal(dim // 2))  # [K, dim / 2]

    def forward(self, t: Tensor) -> Tensor:
        frequency = self.frequency.view(-1, *(1,) * (t.dim() - 1), self.frequency.shape[-1])
        angle = 2.0 * math.pi * t.float().unsqueeze(-1) * frequency
        return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


class ResidualBlock(nn.Module):
    """x + Linear(activation(Linear(LayerNorm(dropout(x))))): [K, *rows, dim] to the same.

    Dropout comes before the normalisation, as in the authors' code, and only with `rng`.

    Args:
        expansion: width of the inner layer over `dim`.
    """

    def __init__(
        self, rng: Rng, dim: int, activation: str, dropout_rate: float, expansion: int = 4
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(rng, dim, eps=FLAX_NORM_EPS)
        self.widen = redraw(Linear(rng, dim, expansion * dim), rng, lecun_normal)
        self.narrow = redraw(Linear(rng, expansion * dim, dim), rng, lecun_normal)
        self.activation, self.dropout_rate = activation, dropout_rate

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        dropped = x if rng is None or not self.dropout_rate else dropout(x, self.dropout_rate, rng)
        return x + self.narrow(ACTIVATIONS[self.activation](self.widen(self.norm(dropped))))


class ResidualMLP(nn.Module):
    """Linear, residual blocks, activation, Linear: [K, *rows, in_dim] -> [K, *rows, out_dim].

    Raises:
        ValueError: for an unknown activation or a dropout rate outside [0, 1).
    """

    def __init__(
        self,
        rng: Rng,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 256,
        num_blocks: int = 3,
        activation: str = "mish",
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate is {dropout_rate}; expected a number in [0, 1)")
        self.first = redraw(Linear(rng, in_dim, hidden_dim), rng, xavier_uniform)
        self.blocks = nn.ModuleList(
            ResidualBlock(rng, hidden_dim, activation, dropout_rate) for _ in range(num_blocks)
        )
        self.last = redraw(Linear(rng, hidden_dim, out_dim), rng, xavier_uniform)
        self.activation = activation

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, rng)
        return self.last(ACTIVATIONS[self.activation](x))


class ResidualNoiseNet(nn.Module):
    """IDQL's noise network: `ResidualMLP` on [noisy action, observation, time condition].

    Time condition: Fourier features of dimension D -> Linear(cond_dim) -> activation ->
    Linear(cond_dim). A level that all rows share (as while sampling) is embedded once per seed.

    Args:
        time_dim: D.
    """

    def __init__(
        self,
        rng: Rng,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        num_blocks: int = 3,
        activation: str = "mish",
        dropout_rate: float = 0.1,
        time_dim: int = 64,
        cond_dim: int = 128,
    ) -> None:
        super().__init__()
        self.features = FourierFeatures(rng, time_dim)
        self.condition = MLP(rng, (time_dim, cond_dim, cond_dim), activation)
        redraw(self.condition, rng, xavier_uniform)
        in_dim = action_dim + obs_dim + cond_dim
        self.net = ResidualMLP(
            rng, in_dim, action_dim, hidden_dim, num_blocks, activation, dropout_rate
        )

    def forward(self, noisy: Tensor, t: Tensor, obs: Tensor, rng: Rng | None = None) -> Tensor:
        """Predicted noise [K, *rows, A]; dropout is applied to calls that pass `rng`."""
        condition = self.condition(self.features(t)).expand(*noisy.shape[:-1], -1)
        return self.net(torch.cat((noisy, obs, condition), dim=-1), rng)
