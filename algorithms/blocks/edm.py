"""Continuous-noise diffusion (Karras et al., 2022, "EDM"): preconditioning, levels, samplers.

Noise is added, not mixed in: noisy = clean + sigma noise. A raw network F becomes a denoiser D by

    D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)                            Eq. 7
    c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd c_in,  c_in = 1 / sqrt(sigma^2 + sd^2)

with sd the standard deviation of the data. F is regressed on (clean - c_skip noisy) / c_out, which
is the denoising error weighted by lambda(sigma) = 1 / c_out^2. The score is
(D(x; sigma) - x) / sigma^2.

Data are [K, *rows, D] or, for windows, [K, *rows, L, D]; sigma has the leading axes of its draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.api import Rng

Network = Callable[[Tensor, Tensor], Tensor]
"""(c_in noisy, ln(sigma) / 4 with sigma's shape) -> output shaped like the first."""

SigmaDenoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy, sigma broadcastable to its leading axes) -> denoised."""


@dataclass(frozen=True)
class Preconditioning:
    """The scalings of Table 1 (EDM) and the range of noise levels.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and 0 < sigma_data.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not (0.0 < self.sigma_min < self.sigma_max and self.sigma_data > 0.0):
            raise ValueError(
                f"noise levels from {self.sigma_min} to {self.sigma_max} around data of standard "
                f"deviation {self.sigma_data}; expected 0 < sigma_min < sigma_max, sigma_data > 0"
            )

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in), each with sigma's shape."""
        total = sigma.square() + self.sigma_data**2
        c_in = total.rsqrt()
        return self.sigma_data**2 / total, sigma * self.sigma_data * c_in, c_in

    def denoise(self, network: Network, noisy: Tensor, sigma: Tensor) -> Tensor:
        """D(noisy; sigma), Eq. 7."""
        c_skip, c_out, c_in = (_trailing(c, noisy) for c in self.scalings(sigma))
        return c_skip * noisy + c_out * network(c_in * noisy, sigma.log() / 4.0)

    def errors(self, network: Network, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the network's output, entry by entry: shape of `clean`.

        Equals (D(clean + sigma noise) - clean)^2 / c_out^2.
        """
        c_skip, c_out, c_in = (_trailing(c, clean) for c in self.scalings(sigma))
        noisy = clean + _trailing(sigma, clean) * noise
        target = (clean - c_skip * noisy) / c_out
        return (network(c_in * noisy, sigma.log() / 4.0) - target).square()

    def log_logistic(self, uniform: Tensor, scale: float = 0.5) -> Tensor:
        """Noise levels with log sigma logistic around log sigma_data, cut to the range.

        Drawn by inverting the distribution function; `uniform` in [0, 1) gives the shape.
        """
        location = math.log(self.sigma_data)
        lowest, highest = (
            1.0 / (1.0 + math.exp(-(math.log(sigma) - location) / scale))
            for sigma in (self.sigma_min, self.sigma_max)
        )
        inside = lowest + (highest - lowest) * uniform.double()
        drawn = torch.exp(location + scale * torch.logit(inside)).float()
        return drawn.clamp(self.sigma_min, self.sigma_max)

    def karras_sigmas(self, steps: int, rho: float = 7.0) -> Tensor:
        """Decreasing levels from sigma_max to sigma_min, then 0 (Eq. 5): float32 [steps + 1].

        Raises:
            ValueError: for fewer than one step.
        """
        _check_steps(steps)
        ramp = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1.0 / rho), self.sigma_min ** (1.0 / rho)
        return _with_zero((high + ramp * (low - high)) ** rho)

    def exponential_sigmas(self, steps: int) -> Tensor:
        """Levels evenly spaced in the logarithm, then 0: float32 [steps + 1].

        Raises:
            ValueError: for fewer than one step.
        """
        _check_steps(steps)
        high, low = math.log(self.sigma_max), math.log(self.sigma_min)
        return _with_zero(torch.linspace(high, low, steps, dtype=torch.float64).exp())


def log_normal_sigmas(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels with log sigma ~ N(mean, std^2), EDM's own training density."""
    return (mean + std * normal).exp()


def euler(denoiser: SigmaDenoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """The probability-flow ODE by Euler's rule, one denoiser call a step; the same as DDIM.

    Args:
        x: start, of standard deviation sigmas[0] (and the data's).
        sigmas: decreasing levels, [steps + 1].
    """
    for i in range(len(sigmas) - 1):
        denoised = denoiser(x, _level(sigmas[i], x))
        x = denoised + (sigmas[i + 1] / sigmas[i]) * (x - denoised)
    return x


def heun(denoiser: SigmaDenoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """The probability-flow ODE by Heun's rule (Algorithm 1): two calls a step, one in the last."""
    for i in range(len(sigmas) - 1):
        x = _heun_step(denoiser, x, sigmas[i], sigmas[i + 1], final=i == len(sigmas) - 2)
    return x


@dataclass(frozen=True)
class Churn:
    """Noise that the stochastic sampler adds back in each step (EDM, Table 5's four numbers)."""

    churn: float = 80.0  # S_churn; added in steps of at most sqrt(2) - 1 of the level
    lowest: float = 0.05  # S_tmin: only levels from here
    highest: float = 50.0  # to here (S_tmax)
    noise: float = 1.003  # S_noise: standard deviation of what is added

    def rate(self, sigma: float, steps: int) -> float:
        """gamma: by how much of itself the level is raised before a step."""
        inside = self.lowest <= sigma <= self.highest
        return min(self.churn / steps, math.sqrt(2.0) - 1.0) if inside else 0.0


def stochastic_heun(
    denoiser: SigmaDenoiser,
    x: Tensor,
    sigmas: Tensor,
    rng: Rng,
    churn: Churn | None = None,
    before_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    predict_from_unchurned: bool = False,
) -> Tensor:
    """EDM's Algorithm 2: noise is added back before each Heun step.

    The noise of all steps is one draw, led by the rows: [K, *rows, steps, D].

    Args:
        sigmas: decreasing levels on the host or the device; read once.
        before_step: (index of the step, x, its level) -> x to go on with, before noise is added.
        predict_from_unchurned: Heun's first step starts from the x without the added noise, as in
            the code of Policy-Guided Diffusion; Algorithm 2 starts from the x with it.
    """
    churn = churn or Churn()
    steps = len(sigmas) - 1
    noise = rng.normal(*x.shape[1:-1], steps, x.shape[-1])
    levels = sigmas.tolist()
    for i in range(steps):
        sigma = sigmas[i]
        if before_step is not None:
            x = before_step(i, x, _level(sigma, x))
        start = x
        rate = churn.rate(levels[i], steps)
        if rate > 0.0:
            raised = sigma * (1.0 + rate)
            added = (raised.square() - sigma.square()).sqrt() * churn.noise
            x, sigma = x + added * noise[..., i, :], raised
        predict_from = start if predict_from_unchurned else x
        x = _heun_step(denoiser, x, sigma, sigmas[i + 1], i == steps - 1, predict_from)
    return x


def euler_ancestral(denoiser: SigmaDenoiser, x: Tensor, sigmas: Tensor, rng: Rng) -> Tensor:
    """Euler's rule to a lower level, then noise up to the next one: the SDE's own posterior.

    With up^2 = next^2 (sigma^2 - next^2) / sigma^2 and down^2 = next^2 - up^2 the marginals stay
    those of the levels. The noise of all steps is one draw, led by the rows.
    """
    steps = len(sigmas) - 1
    noise = rng.normal(*x.shape[1:-1], steps, x.shape[-1])
    for i in range(steps):
        denoised = denoiser(x, _level(sigmas[i], x))
        share = (sigmas[i + 1] / sigmas[i]).square()
        down = sigmas[i + 1] * share.sqrt()
        up = sigmas[i + 1] * (1.0 - share).sqrt()
        x = denoised + (down / sigmas[i]) * (x - denoised) + up * noise[..., i, :]
    return x


def _heun_step(
    denoiser: SigmaDenoiser,
    x: Tensor,
    sigma: Tensor,
    following: Tensor,
    final: bool,
    predict_from: Tensor | None = None,
) -> Tensor:
    slope = (x - denoiser(x, _level(sigma, x))) / sigma
    euler_x = (x if predict_from is None else predict_from) + (following - sigma) * slope
    if final:  # at level 0 there is no second slope
        return euler_x
    corrected = (euler_x - denoiser(euler_x, _level(following, x))) / following
    return x + (following - sigma) * 0.5 * (slope + corrected)


def _level(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape((1,) * (x.dim() - 1))


def _trailing(values: Tensor, data: Tensor) -> Tensor:
    return values.reshape(*values.shape, *(1,) * (data.dim() - values.dim()))


def _with_zero(levels: Tensor) -> Tensor:
    return torch.cat((levels, levels.new_zeros(1))).float()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{steps} denoising steps; expected at least 1")
