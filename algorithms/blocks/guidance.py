"""Sampling from p(x) pi(a | s)^coef, given a denoiser of p and the log density of pi.

x is a window [K, M, L, D]; `actions` is the slice of its entries that are actions. Two ways:

    calibrated   the denoised window is moved by sigma^2 times the gradient of the log of
                 E[pi^coef | noisy], with a Gaussian for what the noisy window leaves open;
                 `coef` is the exponent
    additive     Policy-Guided Diffusion's code: before each step the noisy action is moved by
                 coef times a schedule times the gradient of log pi. What a coefficient means
                 depends on the number of steps, the window's length and its action dimension

With D the denoised window, g the gradient of log pi there and c its curvature (both over actions
only), J = dD / dx and V = sigma^2 J the covariance of clean given noisy, the calibrated move is

    D' = D + sigma^2 J^T [coef g / (1 + coef c V)]

which is exact where data and policy are Gaussians that do not mix action entries: then
g = (m - D) / S_p and c = 1 / S_p, and samples follow the product of the densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from algorithms.blocks.edm import SigmaDenoiser

LogDensity = Callable[[Tensor, Tensor], Tensor]
"""(actions [K, M, L, A], the window they are part of [K, M, L, D]) -> log pi, [K, M, L].

Both as the sampler sees them (normalised); only the first is differentiated.
"""


def slope(log_density: LogDensity, x: Tensor, actions: slice) -> Tensor:
    """Gradient of the summed log density by the actions, the rest held: [K, M, L, A]."""
    fixed = x.detach()
    return grad(lambda action: log_density(action, fixed).sum())(fixed[..., actions])


def slope_and_curvature(
    log_density: LogDensity, x: Tensor, actions: slice
) -> tuple[Tensor, Tensor]:
    """The gradient and minus the second derivative, at least 0, of each action entry.

    The second is minus the row sums of the Hessian: its diagonal where entries do not mix.
    """
    fixed = x.detach()
    action = fixed[..., actions]
    gradient = grad(lambda a: log_density(a, fixed).sum())
    found = jvp(gradient, (action,), (torch.ones_like(action),))
    return found[0], (-found[1]).clamp(min=0.0)


def calibrated(
    denoiser: SigmaDenoiser,
    log_density: LogDensity,
    actions: slice,
    coef: float,
    jacobian: str = "data",
    sigma_data: float = 1.0,
) -> SigmaDenoiser:
    """A denoiser of p(x) pi(a | s)^coef.

    Args:
        coef: the exponent; 0 returns `denoiser` itself.
        jacobian: J. `data`: that of independent entries of standard deviation `sigma_data`, which
            standardised data have; moves actions only. `network`: the denoiser's own, at the price
            of its backward pass; moves whatever goes with the actions, and V is taken along g.
    Raises:
        ValueError: for another `jacobian`.
    """
    if jacobian not in ("data", "network"):
        raise ValueError(f"jacobian is {jacobian!r}; expected data or network")
    if coef == 0.0:
        return denoiser

    def by_data(noisy: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoiser(noisy, sigma)
        g, c = slope_and_curvature(log_density, denoised, actions)
        left = sigma.square() * (sigma_data**2 / (sigma_data**2 + sigma.square()))  # V
        left = left.reshape(*left.shape, *(1,) * (noisy.dim() - left.dim()))
        return _moved(denoised, actions, left * coef * g / (1.0 + coef * c * left))

    def by_network(noisy: Tensor, sigma: Tensor) -> Tensor:
        found = vjp(lambda x: denoiser(x, sigma), noisy)
        denoised, pull_back = found[0], found[1]
        g, c = slope_and_curvature(log_density, denoised, actions)
        (pulled,) = pull_back(_moved(torch.zeros_like(denoised), actions, g))  # J^T g
        level = sigma.square().reshape(*sigma.shape, *(1,) * (noisy.dim() - sigma.dim()))
        square = _per_window(g.square()).clamp(min=torch.finfo(g.dtype).tiny)
        left = level * (_per_window(g * pulled[..., actions]) / square).clamp(0.0, 1.0)
        along = _per_window(c * g.square()) / square
        return denoised + level * coef * pulled / (1.0 + coef * along * left)

    return by_data if jacobian == "data" else by_network


def additive(
    log_density: LogDensity,
    actions: slice,
    coef: float,
    steps: int,
    cosine_coef: float = 0.3,
    normalize: bool = False,
    denoiser: SigmaDenoiser | None = None,
) -> Callable[[int, Tensor, Tensor], Tensor] | None:
    """The code's nudge as a `before_step` of `edm.stochastic_heun`; None for coef 0.

    Step i of N moves by coef ((1 - i / N) + cosine_coef sin(pi (i + 1) / N)), the last by 0.

    Args:
        normalize: divide g by its norm over the whole window (and add 1e-8 afterwards, as there).
        denoiser: evaluate g at the denoised window instead of the noisy one.
    """
    if coef == 0.0:
        return None

    def before_step(i: int, x: Tensor, sigma: Tensor) -> Tensor:
        if i >= steps - 1:
            return x
        g = slope(log_density, x if denoiser is None else denoiser(x, sigma), actions)
        if normalize:
            g = g / _per_window(g.square()).sqrt() + 1e-8
        amount = coef * ((1.0 - i / steps) + cosine_coef * math.sin(math.pi * (i + 1) / steps))
        return _moved(x, actions, amount * g)

    return before_step


def _moved(x: Tensor, actions: slice, shift: Tensor) -> Tensor:
    start, stop = actions.start, actions.stop
    return torch.cat((x[..., :start], x[..., actions] + shift, x[..., stop:]), dim=-1)


def _per_window(values: Tensor) -> Tensor:
    """Sum over steps and entries, [K, M, L, A] -> [K, M, 1, 1]."""
    return values.sum(dim=(-2, -1), keepdim=True)
