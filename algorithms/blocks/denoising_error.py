"""How far a denoiser moves a point that is given with noise: a score of being out of its data.

    E(x) = | x - D(x + sigma noise; sigma) |_2, averaged over noise levels     (DOSER, Eq. 6 and 7)

For data N(m, s^2 I_d) and their exact denoiser, E[E^2 | x] is

    (sigma^4 |x - m|^2 + s^4 sigma^2 d) / (s^2 + sigma^2)^2

so a level far below s measures the noise and one far above it the distance to the mean: one random
level is a weak detector. The stratified one takes fixed levels, and divides the error at each by
its mean over the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from algorithms.api import Rng
from algorithms.blocks.edm import Preconditioning, SigmaDenoiser
from algorithms.blocks.layers import MLP, Linear, sinusoidal_embedding

EDM = Preconditioning()  # sigma_data 0.5, levels from 0.002 to 80


class ScoreNet(nn.Module):
    """DOSER's network F of an EDM denoiser: MLP on [scaled noisy data, condition, level features].

    Level features: sinusoidal embedding of dimension D -> Linear(2 D) -> Mish -> Linear(D). The
    first layer has no activation, as in the authors' code.

    Args:
        dim: of the data.
        cond_dim: of the condition, 0 for none.
    """

    def __init__(
        self, rng: Rng, dim: int, cond_dim: int = 0, hidden_dim: int = 256, time_dim: int = 16
    ) -> None:
        super().__init__()
        self.dim, self.time_dim, self.num_seeds = dim, time_dim, rng.step.shape[0]
        self.time = MLP(rng, (time_dim, 2 * time_dim, time_dim), "mish")
        self.first = Linear(rng, dim + cond_dim + time_dim, hidden_dim)
        self.net = MLP(rng, (hidden_dim,) * 4 + (dim,), "mish")

    def forward(self, scaled: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """[K, *rows, dim], levels that broadcast to [K, *rows], [K, *rows, cond_dim] -> first."""
        waves = sinusoidal_embedding(level, self.time_dim)
        features = self.time(waves.expand(self.num_seeds, *waves.shape[1:]))
        features = features.expand(*scaled.shape[:-1], -1)
        parts = (scaled, features) if condition is None else (scaled, condition, features)
        return self.net(self.first(torch.cat(parts, dim=-1)))


def denoiser_of(net: ScoreNet, condition: Tensor | None = None) -> SigmaDenoiser:
    """D(x; sigma), or D(x; sigma, condition): x [K, *rows, *more, dim], condition [K, *rows, c]."""

    def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
        given = condition
        if given is not None:
            more = noisy.dim() - given.dim()
            given = given.reshape(*given.shape[:-1], *(1,) * more, given.shape[-1])
            given = given.expand(*noisy.shape[:-1], -1)
        return EDM.denoise(lambda scaled, level: net(scaled, level, given), noisy, sigma)

    return denoise


class Levels:
    """The noise a score is computed with: `levels` random draws, or one at each fixed level.

    Args:
        levels: draws that are averaged, each with a level of the training density of its own.
        fixed: the levels of the stratified score instead.
    Raises:
        ValueError: for less than one level, or one that is not positive.
    """

    def __init__(self, levels: int = 1, fixed: Sequence[float] = ()) -> None:
        if levels < 1 or any(not sigma > 0.0 for sigma in fixed):
            raise ValueError(f"{levels} random and fixed levels {list(fixed)}; expected positive")
        self.fixed = tuple(fixed)
        self.count = len(self.fixed) or levels

    def draw(self, rng: Rng, rows: int, dim: int) -> tuple[Tensor, Tensor]:
        """Levels [K, rows, L] and standard normal noise [K, rows, L, dim]."""
        noise = rng.normal(rows, self.count, dim)
        if not self.fixed:
            return EDM.log_logistic(rng.uniform(rows, self.count)), noise
        return noise.new_tensor(self.fixed).expand(*noise.shape[:-1]), noise


def level_errors(denoiser: SigmaDenoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """E at each level: clean [K, *rows, D], sigma [K, *rows, L], noise [K, *rows, L, D] -> sigma's.

    Nothing here depends on the other rows.
    """
    noisy = clean.unsqueeze(-2) + sigma.unsqueeze(-1) * noise
    return (denoiser(noisy, sigma) - clean.unsqueeze(-2)).norm(dim=-1)


def mean_error(errors: Tensor, scale: Tensor | None = None) -> Tensor:
    """Average over levels: [K, *rows, L] -> [K, *rows].

    Args:
        scale: mean error of the data at each level, [K, L], by which they are divided first.
    """
    if scale is not None:
        errors = errors / scale.view(scale.shape[0], *(1,) * (errors.dim() - 2), -1)
    return errors.mean(dim=-1)


def percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile of each seed's values, interpolated linearly: [K, S] -> [K].

    Raises:
        ValueError: unless 0 <= percent <= 100.
    """
    if not 0.0 <= percent <= 100.0:
        raise ValueError(f"percentile {percent}; expected a number from 0 to 100")
    # One seed at a time: `quantile` takes at most 2**24 numbers.
    return torch.stack([torch.quantile(row, percent / 100.0) for row in values])
