"""Layers for K seeds at once: weights are [K, in, out], or [K, E, in, out] for ensembles.

Inputs are [K, *rows, in], or [K, E, *rows, in] for ensembles (an E of 1 broadcasts); `rows` is one
or more dimensions. No parameter requires grad: gradients come from `blocks.optim.gradients`.
Initial values are drawn from an `Rng`, so a seed's network does not depend on the stack.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.api import Rng
from algorithms.blocks.products import matmul

M = TypeVar("M", bound=nn.Module)
Activation = Callable[[Tensor], Tensor]
MIXED_MIN_WIDTH = 64  # narrower products are cheap, and their operands are not rounded


def mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x)) (Misra, 2020), with one exponential and one division.

    tanh(log(1 + e)) = n / (n + 2) for e = exp(x), n = e (e + 2). Within 7e-7 of the exact value, as
    `functional.mish` is, but compiled several times faster on a CPU, where it is a large part of
    a step.
    """
    e = torch.exp(x.clamp(max=20.0))  # above 20 the factor is 1 in float32, and e**2 is finite
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "mish": mish,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def constant(value: Tensor) -> nn.Parameter:
    """A parameter that is updated in place and never asks autograd for a gradient."""
    return nn.Parameter(value.contiguous(), requires_grad=False)


def frozen_copy(module: M) -> M:
    """A copy with its own storage, for targets and averages."""
    return copy.deepcopy(module)


def outside_state(module: M) -> M:
    """The module with its parameters made buffers, and all its buffers left out of its state dict.

    For what comes from another stage's artifact: it is loaded from there every time.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer, persistent=False)
    return module


def orthogonal(normal: Tensor, gain: float = 1.0) -> Tensor:
    """(Semi-)orthogonal matrices [..., in, out] made of standard normal ones of that shape.

    Saxe et al. (2014); the sign convention of `torch.nn.init.orthogonal_`: uniform over
    orthogonal matrices.
    """
    tall = normal if normal.shape[-2] >= normal.shape[-1] else normal.mT
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    return gain * (q if normal.shape[-2] >= normal.shape[-1] else q.mT)


class Linear(nn.Module):
    """x @ weight + bias for every seed.

    Initialisation is PyTorch's default: weights and biases uniform in +-1/sqrt(in_dim). With
    `orthogonal_gain`, orthogonal weights and zero biases.

    Args:
        ensemble: number of networks E per seed, or None for one network without the E dimension.
    """

    def __init__(
        self,
        rng: Rng,
        in_dim: int,
        out_dim: int,
        ensemble: int | None = None,
        orthogonal_gain: float | None = None,
    ) -> None:
        super().__init__()
        lead = () if ensemble is None else (ensemble,)
        if orthogonal_gain is None:
            bound = 1.0 / math.sqrt(in_dim)
            weight = (2.0 * rng.uniform(*lead, in_dim, out_dim) - 1.0) * bound
            bias = (2.0 * rng.uniform(*lead, out_dim) - 1.0) * bound
        else:
            weight = orthogonal(rng.normal(*lead, in_dim, out_dim), orthogonal_gain)
            bias = torch.zeros_like(weight[..., 0, :])
        self.mixed = False  # see `set_precision`
        self.weight = constant(weight)  # [K, (E,) in, out]
        self.bias = constant(bias)  # [K, (E,) out]

    def forward(self, x: Tensor) -> Tensor:
        lead = self.weight.dim() - 2
        if x.dim() < lead + 2:
            raise ValueError(
                f"input has shape {tuple(x.shape)}; expected [K, {'E, ' * (lead - 1)}*rows, in] "
                "with at least one dimension of rows"
            )
        rows = x.shape[lead:-1]
        flat = x.flatten(lead, -2)
        if self.weight.shape[-1] == 1:
            # Matrix times vector: kernels for one seed and for several sum in another order.
            y = (flat * self.weight.mT).sum(dim=-1, keepdim=True)
        elif self.mixed:
            y = torch.matmul(flat.bfloat16(), self.weight.bfloat16()).float()
        else:
            y = matmul(flat, self.weight)
        y = y + self.bias.unsqueeze(-2)
        return y if len(rows) == 1 else y.unflatten(lead, rows)


def set_precision(module: nn.Module, precision: str) -> None:
    """Chooses how the matrix products of a module's `Linear` layers are computed.

    `tf32`: on CUDA, operands are rounded to TensorFloat-32 (10 bits of mantissa); elsewhere nothing
    changes. This one is a setting of the process, taken back by the next call with another.
    `mixed`: operands of the products, and of their gradients, are rounded to bfloat16 and summed
    in float32; results are rounded to bfloat16. Parameters, biases, activations, losses and the
    optimizer stay float32, and so do layers narrower than 64 on a side: the first layer, whose
    inputs are observations and actions, and the last, whose outputs are values and noise.

    Args:
        precision: float32 | tf32 | mixed.
    Raises:
        ValueError: for another precision.
    """
    if precision not in ("float32", "tf32", "mixed"):
        raise ValueError(f"precision is {precision!r}; expected float32, tf32 or mixed")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    for layer in module.modules():
        if isinstance(layer, Linear):
            wide = min(layer.weight.shape[-2:]) >= MIXED_MIN_WIDTH
            layer.mixed = wide and precision == "mixed"


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with a scale and a shift per seed."""

    def __init__(self, rng: Rng, dim: int, ensemble: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (rng.step.shape[0], *(() if ensemble is None else (ensemble,)), dim)
        self.weight = constant(torch.ones(shape, device=rng.step.device))  # [K, (E,) dim]
        self.bias = constant(torch.zeros(shape, device=rng.step.device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalized = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        shape = (*self.weight.shape[:-1], *(1,) * (x.dim() - self.weight.dim()), x.shape[-1])
        return normalized * self.weight.view(shape) + self.bias.view(shape)


def dropout(x: Tensor, rate: float, rng: Rng) -> Tensor:
    """x with each entry zeroed with probability `rate` and the others scaled by 1 / (1 - rate)."""
    keep = rng.uniform(*x.shape[1:]) >= rate
    return torch.where(keep, x / (1.0 - rate), 0.0)


class MLP(nn.Module):
    """Linear layers with an activation between them: sizes[0] -> ... -> sizes[-1].

    Each hidden layer is Linear, then optionally LayerNorm, then the activation, then dropout.

    Args:
        sizes: input, hidden and output widths.
        activation: a name in `ACTIVATIONS`.
        dropout_rate: applied only to calls that pass `rng`.
        output_gain: gain of the last layer if `orthogonal_gain` is given (default: the same).
    Raises:
        ValueError: for an unknown activation or fewer than two sizes.
    """

    def __init__(
        self,
        rng: Rng,
        sizes: Sequence[int],
        activation: str = "relu",
        ensemble: int | None = None,
        layer_norm: bool = False,
        dropout_rate: float = 0.0,
        orthogonal_gain: float | None = None,
        output_gain: float | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        if len(sizes) < 2:
            raise ValueError(f"sizes is {list(sizes)}; expected at least an input and an output")
        hidden = len(sizes) - 2
        gains = [orthogonal_gain] * hidden + [
            orthogonal_gain if output_gain is None else output_gain
        ]
        self.layers = nn.ModuleList(
            Linear(rng, sizes[i], sizes[i + 1], ensemble, gains[i]) for i in range(hidden + 1)
        )
        self.norms = nn.ModuleList(
            LayerNorm(rng, width, ensemble) for width in sizes[1:-1] if layer_norm
        )
        self.activation = activation
        self.dropout_rate = dropout_rate

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == len(self.layers) - 1:
                return x
            if len(self.norms) > 0:
                x = self.norms[i](x)
            x = ACTIVATIONS[self.activation](x)
            if rng is not None and self.dropout_rate > 0.0:
                x = dropout(x, self.dropout_rate, rng)
        return x


def sinusoidal_embedding(t: Tensor, dim: int, cosines_first: bool = False) -> Tensor:
    """Sines and cosines of `t` at dim / 2 frequencies from 1 down to 1e-4: [..., dim].

    Frequencies exp(-k log(10000) / (dim / 2 - 1)), k = 0 ... dim / 2 - 1 (Vaswani et al., 2017, as
    written for diffusion models), sines first, as in Diffusion-QL's code; or with dim / 2 for
    dim / 2 - 1 and cosines first, as in guided diffusion's (and EDP's).

    Args:
        t: any shape, integer or float.
    Raises:
        ValueError: if `dim` is odd or below 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(
            f"time embedding of dimension {dim}; expected an even number of at least 4"
        )
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    spacing = math.log(10000.0) / (half if cosines_first else half - 1)
    angle = t.float().unsqueeze(-1) * torch.exp(-k * spacing)
    waves = (
        (torch.cos(angle), torch.sin(angle))
        if cosines_first
        else (
            torch.sin(angle),
            torch.cos(angle),
        )
    )
    return torch.cat(waves, dim=-1)
