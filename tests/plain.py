"""One seed of our stacked networks as ordinary PyTorch modules: independent arithmetic for tests.

`torch.nn.Linear`, autograd and `torch.optim.Adam` share no code with `algorithms.blocks`, so an
update written with them and an algorithm's own must agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from algorithms.blocks.layers import MLP
from algorithms.blocks.rng import Rng, Stream


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """From one network's [in, out] and [out]."""
    layer = nn.Linear(*weight.shape)
    layer.weight.data = weight.T.clone()
    layer.bias.data = bias.clone()
    return layer


def network(mlp: MLP, seed: int, member: int | None = None, post_norm: bool = False) -> nn.Module:
    """ReLU network of one seed (and ensemble member).

    Args:
        post_norm: layer norm follows the activation instead of the linear layer.
    """

    def pick(value: Tensor) -> Tensor:
        return value[seed] if member is None else value[seed, member]

    parts: list[nn.Module] = []
    for i, layer in enumerate(mlp.layers):
        parts.append(linear(pick(layer.weight), pick(layer.bias)))
        if i < len(mlp.layers) - 1:
            norm = []
            if len(mlp.norms):
                norm = [nn.LayerNorm(layer.weight.shape[-1], eps=mlp.norms[i].eps)]
            parts += [nn.ReLU(), *norm] if post_norm else [*norm, nn.ReLU()]
    return nn.Sequential(*parts)


def assert_same_network(
    mlp: MLP, seed: int, plain: nn.Module, member: int | None = None, tolerance: float = 2e-6
) -> None:
    """Weights and biases agree; Adam's first steps are +-lr, so tolerance is far below it."""
    linears = [part for part in plain if isinstance(part, nn.Linear)]  # type: ignore[attr-defined]
    for layer, other in zip(mlp.layers, linears, strict=True):
        weight, bias = layer.weight[seed], layer.bias[seed]
        if member is not None:
            weight, bias = weight[member], bias[member]
        torch.testing.assert_close(weight, other.weight.data.T, atol=tolerance, rtol=0)
        torch.testing.assert_close(bias, other.bias.data, atol=tolerance, rtol=0)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each optimizer on a loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def move(target: nn.Module, online: nn.Module, tau: float) -> None:
    with torch.no_grad():
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.copy_((1 - tau) * old + tau * new)


def rng_of(seeds: tuple[int, ...], step: int = 0, stream: Stream = Stream.TRAIN) -> Rng:
    return Rng.at_step(seeds, step, stream)


def weights(module: nn.Module) -> Tensor:
    """All parameters of every seed, [K, P]."""
    return torch.cat([p.flatten(1) for p in module.parameters()], dim=1).clone()


def moved_by(action: Callable[[], object], *modules: nn.Module) -> list[bool]:
    """Whether each module's parameters changed while `action` ran."""
    before = [weights(module) for module in modules]
    with torch.no_grad():
        action()
    return [
        not torch.equal(old, weights(module)) for old, module in zip(before, modules, strict=True)
    ]
