"""Discrete-time diffusion (Ho et al., 2020): schedules, noise loss, reverse sampler.

Index t = 0 is the least noisy level; a chain has `denoise_steps` levels. With alpha_bar the running
product of alpha = 1 - beta:

    forward    noisy = sqrt(alpha_bar[t]) clean + sqrt(1 - alpha_bar[t]) noise
    denoised   clean_pred = sqrt(1 / alpha_bar[t]) noisy - sqrt(1 / alpha_bar[t] - 1) noise_pred
    posterior  mean = clean_coef[t] clean_pred + noisy_coef[t] noisy, variance posterior_var[t]

Two samplers: `Diffusion.sample` (Diffusion-QL: the clean prediction is clipped, posterior variance)
and `Diffusion.sample_clipping_iterates` (IDQL: the iterate is clipped, variance beta).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from algorithms.api import Rng
from algorithms.blocks.layers import MLP, sinusoidal_embedding

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy [K, *rows, A], t broadcastable to [K, *rows], obs [K, *rows, O]) -> noise_pred."""


def vp_betas(denoise_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Tensor:
    """Variance-preserving SDE discretised as in Xiao et al. (2022), float64 [denoise_steps].

    alpha_t = exp(-beta_min / T - (beta_max - beta_min) (2 t - 1) / (2 T**2)), t = 1 ... T, so that
    the last alpha_bar is exp(-(beta_min + beta_max) / 2) whatever T is.
    """
    t = torch.arange(1, denoise_steps + 1, dtype=torch.float64)
    growth = 0.5 * (beta_max - beta_min) * (2.0 * t - 1.0) / denoise_steps**2
    return 1.0 - torch.exp(-beta_min / denoise_steps - growth)


def linear_betas(denoise_steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Evenly spaced betas, float64 [denoise_steps]; not rescaled for chains other than 1000."""
    return torch.linspace(start, end, denoise_steps, dtype=torch.float64)


def scaled_linear_betas(denoise_steps: int) -> Tensor:
    """Evenly spaced betas times 1000 / T: about the same last alpha_bar whatever T is (EDP's).

    Raises:
        ValueError: for 20 steps or fewer, where betas would reach 1.
    """
    if denoise_steps <= 20:
        raise ValueError(
            f"denoise_steps is {denoise_steps}; the schedule linear_scaled needs more than 20"
        )
    scale = 1000.0 / denoise_steps
    return linear_betas(denoise_steps, scale * 1e-4, scale * 2e-2)


def cosine_betas(denoise_steps: int, offset: float = 0.008) -> Tensor:
    """Cosine schedule (Nichol and Dhariwal, 2021), float64 [denoise_steps], clipped to 0.999.

    Written as in Diffusion-QL's code: T + 1 points spread over [0, T + 1] and divided by T + 1.
    That looks one off from the paper's t / T but is the same grid, 0, 1 / T, ..., 1.
    """
    grid = torch.linspace(0, denoise_steps + 1, denoise_steps + 1, dtype=torch.float64)
    angle = (grid / (denoise_steps + 1) + offset) / (1.0 + offset) * (math.pi / 2.0)
    alpha_bars = torch.cos(angle).square()
    return (1.0 - alpha_bars[1:] / alpha_bars[:-1]).clamp(0.0, 0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "vp": vp_betas,
    "linear": linear_betas,
    "linear_scaled": scaled_linear_betas,
    "cosine": cosine_betas,
}


class Diffusion(nn.Module):
    """A noise schedule with the operations that need only its constants.

    The constants are buffers outside the state dict: they follow from the config.

    Args:
        schedule: a name in `SCHEDULES`.
        denoise_steps: length of the chain.
    Raises:
        ValueError: for an unknown schedule or a chain shorter than 1.
    """

    betas: Tensor
    alphas: Tensor
    alpha_bars: Tensor
    noisy_scale: Tensor  # sqrt(1 / alpha_bar)
    noise_scale: Tensor  # sqrt(1 / alpha_bar - 1)
    clean_coef: Tensor
    noisy_coef: Tensor
    posterior_var: Tensor
    step_scale: Tensor  # sqrt(1 / alpha)
    step_noise: Tensor  # beta / sqrt(1 - alpha_bar)

    def __init__(self, schedule: str, denoise_steps: int) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
        if denoise_steps < 1:
            raise ValueError(f"denoise_steps is {denoise_steps}; expected at least 1")
        self.denoise_steps = denoise_steps
        betas = SCHEDULES[schedule](denoise_steps)
        alphas = 1.0 - betas
        alpha_bars = torch.cumprod(alphas, dim=0)
        previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bars[:-1]))
        constants = {
            "betas": betas,
            "alphas": alphas,
            "alpha_bars": alpha_bars,
            "noisy_scale": torch.sqrt(1.0 / alpha_bars),
            "noise_scale": torch.sqrt(1.0 / alpha_bars - 1.0),
            "clean_coef": betas * torch.sqrt(previous) / (1.0 - alpha_bars),
            "noisy_coef": (1.0 - previous) * torch.sqrt(alphas) / (1.0 - alpha_bars),
            "posterior_var": betas * (1.0 - previous) / (1.0 - alpha_bars),
            "step_scale": torch.sqrt(1.0 / alphas),
            "step_noise": betas / torch.sqrt(1.0 - alpha_bars),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    @property
    def sigmas(self) -> Tensor:
        """Each level as added noise, sqrt(1 / alpha_bar - 1), ascending: [denoise_steps].

        noisy / sqrt(alpha_bar) is clean + sigma noise, as in `blocks.edm`.
        """
        return self.noise_scale

    def add_noise(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The forward process at level t: [K, *rows, A], t [K, *rows]."""
        alpha_bar = self.alpha_bars[t].unsqueeze(-1)
        return alpha_bar.sqrt() * clean + (1.0 - alpha_bar).sqrt() * noise

    def noise_loss(self, denoiser: Denoiser, clean: Tensor, obs: Tensor, rng: Rng) -> Tensor:
        """Squared error of the predicted noise, mean over batch and dimensions: [K]."""
        return self.noise_errors(denoiser, clean, obs, rng).flatten(1).mean(dim=1)

    def noise_errors(self, denoiser: Denoiser, clean: Tensor, obs: Tensor, rng: Rng) -> Tensor:
        """Squared error of the predicted noise, entry by entry: [K, *rows, A].

        One level per sample, uniform; draws two numbers' sites (levels, noise).
        """
        t = rng.integers(self.denoise_steps, *clean.shape[1:-1])  # [K, *rows]
        noise = rng.normal(*clean.shape[1:])
        noise_pred = denoiser(self.add_noise(clean, t, noise), t, obs)
        return (noise - noise_pred).square()

    def denoise(self, noisy: Tensor, t: int, noise_pred: Tensor) -> Tensor:
        """The clean value a noise prediction at level t stands for."""
        return self.noisy_scale[t] * noisy - self.noise_scale[t] * noise_pred

    def sample(
        self, denoiser: Denoiser, obs: Tensor, low: Tensor, high: Tensor, rng: Rng
    ) -> Tensor:
        """One sample per row by ancestral sampling, clipped at every level: [K, *rows, A].

        Gradients flow through the whole chain and through the clipping (zero where it saturates).
        The noise of all levels is one draw, led by the rows: acting rows are separate episodes.

        Args:
            obs: conditions, [K, *rows, O].
            low, high: bounds of the clean value, [A].
        """
        rows = obs.shape[1:-1]
        noise = rng.normal(*rows, self.denoise_steps, low.shape[-1])  # [K, *rows, T, A]
        x = noise[..., 0, :]
        for t in reversed(range(self.denoise_steps)):
            level = torch.full((1,) * (obs.dim() - 1), t, device=obs.device)
            clean = self.denoise(x, t, denoiser(x, level, obs)).clamp(low, high)
            x = self.clean_coef[t] * clean + self.noisy_coef[t] * x
            if t > 0:
                x = x + self.posterior_var[t].sqrt() * noise[..., self.denoise_steps - t, :]
        return x.clamp(low, high)

    def sample_clipping_iterates(
        self,
        denoiser: Denoiser,
        obs: Tensor,
        low: Tensor,
        high: Tensor,
        rng: Rng,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """One sample per row by IDQL's reverse process: [K, *rows, A].

        x <- clip((x - beta / sqrt(1 - alpha_bar) noise_pred) / sqrt(alpha) + sqrt(beta) z), with
        z = 0 at the last level. Unlike in `sample` the variance is beta, and the iterate itself is
        clipped, noise included. The noise of all levels is one draw, led by the rows.

        Args:
            obs: conditions, [K, *rows, O].
            low, high: bounds of every iterate, [A].
            noise_scale: factor on z (not on the first iterate); the authors' `ddpm_temperature`.
        """
        rows = obs.shape[1:-1]
        noise = rng.normal(*rows, self.denoise_steps, low.shape[-1])  # [K, *rows, T, A]
        x = noise[..., 0, :]
        for t in reversed(range(self.denoise_steps)):
            level = torch.full((1,) * (obs.dim() - 1), t, device=obs.device)
            x = self.step_scale[t] * (x - self.step_noise[t] * denoiser(x, level, obs))
            if t > 0:
                scale = noise_scale * self.betas[t].sqrt()
                x = x + scale * noise[..., self.denoise_steps - t, :]
            x = x.clamp(low, high)
        return x


class NoiseNet(nn.Module):
    """Diffusion-QL's noise network: MLP on [noisy action, time features, observation].

    Time features: sinusoidal embedding of dimension D -> Linear(2 D) -> Mish -> Linear(D).

    Args:
        time_dim: D.
        hidden_dims: widths of the hidden layers, Mish between them.
        cosines_first: order of the embedding; see `sinusoidal_embedding`.
    """

    def __init__(
        self,
        rng: Rng,
        obs_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...] = (256, 256, 256),
        time_dim: int = 16,
        cosines_first: bool = False,
    ) -> None:
        super().__init__()
        self.time_dim, self.cosines_first = time_dim, cosines_first
        self.time = MLP(rng, (time_dim, 2 * time_dim, time_dim), "mish")
        sizes = (action_dim + time_dim + obs_dim, *hidden_dims, action_dim)
        self.net = MLP(rng, sizes, "mish")
        self.num_seeds = rng.step.shape[0]

    def forward(self, noisy: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        waves = sinusoidal_embedding(t, self.time_dim, self.cosines_first)
        features = self.time(waves.expand(self.num_seeds, *waves.shape[1:]))
        features = features.expand(*noisy.shape[:-1], -1)
        return self.net(torch.cat((noisy, features, obs), dim=-1))
