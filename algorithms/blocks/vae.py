"""Conditional variational auto-encoder of actions, as in BCQ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from algorithms.api import Rng
from algorithms.blocks.layers import MLP

LATENT_LOG_STD = (-4.0, 15.0)  # limits of the latent's log-std, after BCQ


def latent_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std**2) || N(0, 1)), entry by entry."""
    return 0.5 * (mean.square() + torch.exp(2.0 * log_std) - 1.0) - log_std


class GaussianNet(nn.Module):
    """Mean and log-std of a diagonal Gaussian, both [K, *rows, A], from one network."""

    def __init__(self, rng: Rng, sizes: Sequence[int]) -> None:
        super().__init__()
        self.net = MLP(rng, (*sizes[:-1], 2 * sizes[-1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(x).chunk(2, dim=-1)
        return mean, log_std


class VAE(nn.Module):
    """Conditional variational auto-encoder of actions; decodes to before the tanh."""

    def __init__(
        self, rng: Rng, obs_dim: int, action_dim: int, latent_dim: int, width: int
    ) -> None:
        super().__init__()
        self.encoder = GaussianNet(rng, (obs_dim + action_dim, width, width, latent_dim))
        self.decoder = MLP(rng, (obs_dim + latent_dim, width, width, action_dim))

    def forward(self, obs: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is decoded from a draw of the latent, and the latent's mean and log-std."""
        mean, log_std = self.encoder(torch.cat((obs, action), dim=-1))
        log_std = log_std.clamp(*LATENT_LOG_STD)
        return self.decode(obs, mean + torch.exp(log_std) * noise), mean, log_std

    def decode(self, obs: Tensor, latent: Tensor) -> Tensor:
        return self.decoder(torch.cat((obs, latent), dim=-1))
