"""Gradients and Adam for K seeds at once, free of host synchronisation.

Losses reduce to [K] and their sum is differentiated once. A seed's parameters appear only in its
own term, so gradients separate by seed; Adam is element-wise and clipping is per seed, so a seed
that goes nan cannot touch the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from algorithms.api import Metrics

Gradients = dict[str, Tensor]


def gradients(
    module: nn.Module, loss: Callable[[Callable[..., Any]], tuple[Tensor, Metrics]]
) -> tuple[Gradients, Metrics]:
    """Gradient of every seed's own loss with respect to the parameters of `module`.

    Args:
        loss: called with a stand-in that is called like `module` but whose parameters are being
            differentiated; `module` itself stays a constant. Returns the loss of each seed [K]
            and metrics, which are detached.
    Returns:
        Gradients by parameter name, and the metrics of `loss`.
    """
    parameters: dict[str, Tensor] = dict(module.named_parameters())

    def total(candidate: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, candidate, args, kwargs)

        per_seed, metrics = loss(stand_in)
        return per_seed.sum(), metrics

    grads, (_, metrics) = grad_and_value(total, has_aux=True)(parameters)
    return grads, {name: value.detach() for name, value in metrics.items()}


def per_seed(values: Tensor, like: Tensor) -> Tensor:
    """`values` [K] shaped to broadcast against `like` [K, ...]."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def global_norm(grads: Mapping[str, Tensor], leading: int = 1) -> Tensor:
    """L2 norm of all of a seed's gradients together, [K].

    Args:
        leading: 2 gives the norm of each member of an ensemble, [K, E].
    """
    squares = [grad.flatten(leading).square().sum(dim=leading) for grad in grads.values()]
    # One by one: a reduction over the list would add in an order that depends on K.
    return sum(squares[1:], start=squares[0]).sqrt()


def cosine_decay(step: Tensor, total_steps: float) -> Tensor:
    """Factor on the learning rate falling from 1 to 0 over `total_steps`: (1 + cos(pi x)) / 2."""
    fraction = (step / total_steps).clamp(max=1.0)
    return 0.5 * (1.0 + torch.cos(math.pi * fraction))


class Adam(nn.Module):
    """Adam (Kingma and Ba, 2015) with moments and step counts as state led by K.

    Equal to `torch.optim.Adam` after `torch.nn.utils.clip_grad_norm_`, applied to each seed alone.

    Args:
        module: whose parameters `step` will update; only their names and shapes are used here.
        betas: decay rates of the first and second moment.
        weight_decay: L2 coefficient added to the gradient, after clipping.
        clip_norm: largest L2 norm of a seed's whole gradient; None leaves gradients as they are.
        clip_members: the norm is that of each member of an ensemble (every parameter [K, E, ...]),
            as if each had an optimizer of its own.
    """

    count: Tensor  # steps done, int64 [K]

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_members: bool = False,
    ) -> None:
        super().__init__()
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"clip_norm is {clip_norm}; expected a positive number, or None for off"
            )
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.clip_norm = weight_decay, clip_norm
        self.clip_dims = 2 if clip_members else 1
        parameters = dict(module.named_parameters())
        first = next(iter(parameters.values()))
        self.register_buffer("count", torch.zeros_like(first.flatten(1)[:, 0], dtype=torch.int64))
        self._slots = {name: name.replace(".", "/") for name in parameters}  # no dots in buffers
        for name, parameter in parameters.items():
            for moment in ("mean", "square"):
                self.register_buffer(f"{moment}/{self._slots[name]}", torch.zeros_like(parameter))

    def step(
        self, module: nn.Module, grads: Mapping[str, Tensor], lr_scale: Tensor | None = None
    ) -> Tensor:
        """Updates `module` in place and returns each seed's gradient norm before clipping, [K].

        Args:
            lr_scale: factor on the learning rate, [K].
        """
        norm = global_norm(grads, self.clip_dims)  # [K], or [K, E] by member
        self.count += 1
        # Double precision: 1 - 0.999 ** 1 keeps only four digits in single.
        count = self.count.double()
        mean_scale = 1.0 - self.betas[0] ** count
        square_scale = torch.sqrt(1.0 - self.betas[1] ** count)
        step_size = self.lr / mean_scale
        if lr_scale is not None:
            step_size = step_size * lr_scale
        step_size, square_scale = step_size.float(), square_scale.float()
        for name, parameter in module.named_parameters():
            grad = grads[name]
            if self.clip_norm is not None:
                coef = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
                grad = grad * coef.view(*coef.shape, *(1,) * (grad.dim() - coef.dim()))
            if self.weight_decay:
                grad = grad + self.weight_decay * parameter
            mean = self.get_buffer(f"mean/{self._slots[name]}")
            square = self.get_buffer(f"square/{self._slots[name]}")
            mean.lerp_(grad, 1.0 - self.betas[0])
            square.mul_(self.betas[1]).add_((1.0 - self.betas[1]) * grad.square())
            denominator = square.sqrt() / per_seed(square_scale, square) + self.eps
            parameter.sub_(per_seed(step_size, parameter) * mean / denominator)
        return norm if self.clip_dims == 1 else norm.square().sum(dim=1).sqrt()


def decay_weights(module: nn.Module, amount: Tensor) -> None:
    """Shrinks every parameter in place: parameter -= amount * parameter, amount [K].

    Before `Adam.step` and with amount = lr * weight_decay this is AdamW (Loshchilov and Hutter,
    2019): the decay is decoupled from the moments.
    """
    for parameter in module.parameters():
        parameter.sub_(per_seed(amount, parameter) * parameter)
