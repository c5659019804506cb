"""Temporal U-Net over windows of steps, for K seeds at once (Policy-Guided Diffusion's code).

Encoder: blocks of width f, 2 f, 4 f, ... with two convolutions of kernel 3 each, halving the
length between them; decoder: nearest upsampling, a convolution of kernel 2, the encoder's output
of that length beside it, two convolutions of kernel 3; last a convolution of kernel 1. GroupNorm of
8 groups and ReLU after each convolution but the last. The time embedding enters after the first
convolution of every block.

A convolution is a matrix product of `Linear` on neighbouring rows laid side by side: one product
for all seeds, whose results do not depend on the stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.api import Rng
from algorithms.blocks.layers import MLP, Linear, constant, sinusoidal_embedding

GROUPS = 8
NORM_EPS = 1e-6  # Flax's


class Convolution(nn.Module):
    """1-D convolution that keeps the length: [K, B, L, in] -> [K, B, L, out].

    Zeros are padded on both sides, for an even kernel one more after the end than before the start.
    """

    def __init__(self, rng: Rng, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.linear = Linear(rng, kernel * in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == 1:
            return self.linear(x)
        before = (self.kernel - 1) // 2
        padded = functional.pad(x, (0, 0, before, self.kernel - 1 - before))
        length = x.shape[2]
        neighbours = [padded[:, :, i : i + length] for i in range(self.kernel)]
        return self.linear(torch.cat(neighbours, dim=-1))


class GroupNorm(nn.Module):
    """Normalisation over the length and each of 8 groups of channels, with scale and shift."""

    def __init__(self, rng: Rng, dim: int) -> None:
        super().__init__()
        if dim % GROUPS:
            raise ValueError(f"{dim} channels; expected a multiple of {GROUPS}, one per group")
        shape = (rng.step.shape[0], 1, 1, dim)
        self.weight = constant(torch.ones(shape, device=rng.step.device))  # [K, 1, 1, C]
        self.bias = constant(torch.zeros(shape, device=rng.step.device))

    def forward(self, x: Tensor) -> Tensor:
        # Groups as rows of `layer_norm`: twice as fast on a CPU as their means and variances.
        groups = x.unflatten(-1, (GROUPS, -1)).transpose(2, 3).flatten(3)  # [K, B, G, L C / G]
        normalized = functional.layer_norm(groups, groups.shape[-1:], eps=NORM_EPS)
        normalized = normalized.unflatten(-1, (x.shape[2], -1)).transpose(2, 3).flatten(3)
        return normalized * self.weight + self.bias


class Layer(nn.Module):
    """Convolution, optionally plus the time condition, GroupNorm, ReLU."""

    def __init__(
        self, rng: Rng, in_dim: int, out_dim: int, kernel: int = 3, cond_dim: int | None = None
    ) -> None:
        super().__init__()
        self.convolution = Convolution(rng, in_dim, out_dim, kernel)
        self.condition = None if cond_dim is None else Linear(rng, cond_dim, out_dim)
        self.norm = GroupNorm(rng, out_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Args: condition: [K, B, cond_dim]."""
        x = self.convolution(x)
        if self.condition is not None:
            x = x + self.condition(condition).unsqueeze(2)
        return torch.relu(self.norm(x))


class UNet(nn.Module):
    """Windows [K, B, L, D] and one level for each, [K, B] or [1, 1] for all, to [K, B, L, D].

    A level may have more dimensions, of size 1, as the samplers of `blocks.edm` give it.

    Args:
        width: f, a multiple of 16.
        num_blocks: lengths must be multiples of 2 ** (num_blocks - 1).
    Raises:
        ValueError: for another width or length.
    """

    def __init__(self, rng: Rng, dim: int, width: int, num_blocks: int = 3) -> None:
        super().__init__()
        if width % 16 or width < 16 or num_blocks < 1:
            raise ValueError(
                f"U-Net of width {width} and {num_blocks} blocks; expected a multiple of 16 and at "
                "least one block"
            )
        self.width = width
        self.shrink = 2 ** (num_blocks - 1)
        self.embedding = MLP(rng, (width // 4, width, width), "silu")
        widths = [width * 2**i for i in range(num_blocks)]
        self.encoder: Any = nn.ModuleList()
        self.decoder: Any = nn.ModuleList()
        before = dim
        for wide in widths:
            down = (Layer(rng, before, wide, cond_dim=width), Layer(rng, wide, wide))
            self.encoder.append(nn.ModuleList(down))
            before = wide
        for wide in reversed(widths[:-1]):
            up = (
                Layer(rng, 2 * wide, wide, kernel=2, cond_dim=width),
                Layer(rng, 2 * wide, wide),
                Layer(rng, wide, wide),
            )
            self.decoder.append(nn.ModuleList(up))
        self.last = Convolution(rng, width, dim, kernel=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] % self.shrink:
            raise ValueError(
                f"windows have shape {tuple(x.shape)}; expected [K, B, L, D] with a length that is "
                f"a multiple of {self.shrink}"
            )
        # Also where all windows share a level: products of a single row depend on the stack.
        level = level.reshape(level.shape[:2]).expand(x.shape[:2])
        embedded = sinusoidal_embedding(level, self.width // 4)
        condition = functional.silu(self.embedding(embedded))  # [K, B, width]
        skips: list[Tensor] = []
        for block in self.encoder:
            if skips:
                x = x.unflatten(2, (-1, 2)).amax(dim=3)  # the larger of each pair of steps
            for layer in block:
                x = layer(x, condition)
            skips.append(x)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = block[0](x.repeat_interleave(2, dim=2), condition)
            x = block[1](torch.cat((x, skip), dim=-1), condition)
            x = block[2](x, condition)
        return self.last(x)
