"""Mixtures of Gaussian experts: q(a|s) = sum_z q(z|s) N(a; mean_z(s), L_z(s) L_z(s)^T).

    log q(a)      logsumexp_z (log q(a|z) + log q(z)), stable where densities under- or overflow
    log q(z|a)    log q(a|z) + log q(z) - log q(a), the responsibilities
    H(q(.|z))     A/2 log(2 pi e) + sum log diag L_z

L is a lower triangle with a positive diagonal (`full`) or a diagonal alone (`diagonal`).
C is the number of experts, A the dimension, S a number of points in each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from algorithms.api import Rng

LOG_2PI = math.log(2.0 * math.pi)
BISECTIONS = 40  # halve an interval of variances to single precision


@dataclass(frozen=True)
class Mixture:
    """One mixture for each row of each seed."""

    log_weight: Tensor  # [K, *rows, C], normalised
    mean: Tensor  # [K, *rows, C, A]
    scale: Tensor  # L: [K, *rows, C, A, A], or its diagonal [K, *rows, C, A]

    @property
    def full(self) -> bool:
        """Whether the covariances are more than a diagonal."""
        return self.scale.dim() > self.mean.dim()

    @property
    def std(self) -> Tensor:
        """The diagonal of L, [K, *rows, C, A]."""
        return torch.diagonal(self.scale, dim1=-2, dim2=-1) if self.full else self.scale

    def detach(self) -> Mixture:
        """The same numbers without gradient."""
        return Mixture(self.log_weight.detach(), self.mean.detach(), self.scale.detach())

    def expert_log_prob(self, x: Tensor) -> Tensor:
        """log q(x|z) of points [K, *rows, S, A] under every expert: [K, *rows, S, C]."""
        offset = x.unsqueeze(-3) - self.mean.unsqueeze(-2)  # [K, *rows, C, S, A]
        if self.full:
            white = torch.linalg.solve_triangular(self.scale, offset.mT, upper=False).mT
        else:
            white = offset / self.scale.unsqueeze(-2)
        constant = self.std.log().sum(dim=-1) + 0.5 * LOG_2PI * x.shape[-1]  # [K, *rows, C]
        return (-0.5 * white.square().sum(dim=-1) - constant.unsqueeze(-1)).mT

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x) of points [K, *rows, S, A]: [K, *rows, S]."""
        return torch.logsumexp(self.expert_log_prob(x) + self.log_weight.unsqueeze(-2), dim=-1)

    def log_responsibility(self, x: Tensor) -> Tensor:
        """log q(z|x) of points [K, *rows, S, A]: [K, *rows, S, C]."""
        return torch.log_softmax(self.expert_log_prob(x) + self.log_weight.unsqueeze(-2), dim=-1)

    def expert_entropy(self) -> Tensor:
        """H(q(.|z)), [K, *rows, C]."""
        size = self.mean.shape[-1]
        return 0.5 * size * (1.0 + LOG_2PI) + self.std.log().sum(dim=-1)

    def gate_entropy(self) -> Tensor:
        """Entropy of the choice of expert over its largest value, in [0, 1]: [K, *rows].

        0 for a single expert.
        """
        entropy = -(self.log_weight.exp() * self.log_weight).sum(dim=-1)
        return entropy / max(math.log(self.log_weight.shape[-1]), 1e-12)

    def reparameterised(self, noise: Tensor) -> Tensor:
        """mean_z + L_z noise, differentiable: noise [K, *rows, S, C, A] to the same shape."""
        if self.full:
            columns = noise.movedim(-3, -1)  # [K, *rows, C, A, S]
            return (self.mean.unsqueeze(-1) + self.scale @ columns).movedim(-1, -3)
        return self.mean.unsqueeze(-3) + self.scale.unsqueeze(-3) * noise

    def choose(self, uniform: Tensor) -> Tensor:
        """The expert that a number in [0, 1) draws from the gate: uniform [K, *rows] to int64."""
        edges = self.log_weight.exp().cumsum(dim=-1)
        return (uniform.unsqueeze(-1) >= edges[..., :-1]).sum(dim=-1)

    def mean_of(self, expert: Tensor) -> Tensor:
        """The means of chosen experts [K, *rows]: [K, *rows, A]."""
        return self.mean.take_along_dim(expert[..., None, None], dim=-2).squeeze(-2)

    def draw_of(self, expert: Tensor, noise: Tensor) -> Tensor:
        """A draw of the chosen experts [K, *rows] from normal noise [K, *rows, A]."""
        same = noise.unsqueeze(-2).expand_as(self.mean)  # [K, *rows, C, A]
        drawn = self.reparameterised(same.unsqueeze(-3)).squeeze(-3)
        return drawn.take_along_dim(expert[..., None, None], dim=-2).squeeze(-2)

    def without_noise(self, sigmas: Tensor, min_std: float) -> Mixture:
        """The mixture with the noise levels of its teacher's scores taken out of its covariances.

        For a Gaussian teacher N(m, S) the expert that matches its scores at the levels sigma is
        N(m, V) with 1 / v = E_sigma[1 / (s + sigma^2)] for the eigenvalues s of S, v of V. This is
        the inverse: s of each v, by bisection. It is exact for such an expert, and for a mixture as
        far as its experts do not overlap. A v below the smallest possible, E[sigma^-2]^-1, gives
        min_std^2.

        Args:
            sigmas: levels that stand for their distribution, all as likely, [L].
        """
        if self.full:
            values, vectors = torch.linalg.eigh(self.scale @ self.scale.mT)
        else:
            values, vectors = self.scale.square(), None
        low, high = torch.full_like(values, min_std**2), values.clamp(min=min_std**2)
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            inflated = (1.0 / (middle.unsqueeze(-1) + sigmas.square())).mean(dim=-1).reciprocal()
            low = torch.where(inflated < values, middle, low)
            high = torch.where(inflated < values, high, middle)
        std = (0.5 * (low + high)).sqrt()
        if vectors is None:
            return Mixture(self.log_weight, self.mean, std)
        covariance = (vectors * std.square().unsqueeze(-2)) @ vectors.mT
        return Mixture(self.log_weight, self.mean, torch.linalg.cholesky(covariance))


def positive(raw: Tensor, at_zero: float, least: float) -> Tensor:
    """softplus moved so that 0 gives `at_zero`, and above `least` everywhere."""
    shift = math.log(math.expm1(at_zero - least))
    return functional.softplus(raw + shift) + least


def scale_size(size: int, full: bool) -> int:
    """How many numbers `scale_of` makes an L of: A (A + 1) / 2, or A."""
    return size * (size + 1) // 2 if full else size


def scale_of(raw: Tensor, size: int, full: bool, initial_std: float, min_std: float) -> Tensor:
    """L from unconstrained numbers [..., scale_size]: [..., A, A], or its diagonal [..., A].

    The diagonal is `positive` of the first A numbers; the others are below it as they are.
    """
    std = positive(raw[..., :size], initial_std, min_std)
    if not full:
        return std
    # Every place of the matrix takes its number; those above the diagonal take a zero at the end.
    place = torch.full((size, size), scale_size(size, True))
    place[torch.arange(size), torch.arange(size)] = torch.arange(size)
    below = torch.tril_indices(size, size, -1)
    place[below[0], below[1]] = torch.arange(size, scale_size(size, True))
    padded = torch.cat((std, raw[..., size:], torch.zeros_like(raw[..., :1])), dim=-1)
    return padded[..., place.flatten().to(raw.device)].unflatten(-1, (size, size))


def spread_means(
    points: Tensor, count: int, rng: Rng, starts: int = 10, rounds: int = 20
) -> Tensor:
    """Means of `count` clusters of the points [K, N, A]: [K, count, A].

    The best of several k-means (smallest mean squared distance), each from a greedy k-means++ start
    (Arthur and Vassilvitskii, 2007). A single one often gives two clusters one centre, which
    training does not mend.

    Args:
        rounds: of each k-means; a centre without points stays.
    """
    best, lowest = None, None
    for _ in range(starts):
        means = _far_points(points, count, rng)
        for _ in range(rounds):
            nearest = _squared_distance(points, means).argmin(dim=-1)  # [K, N]
            means = torch.stack(
                [_mean_where(points, nearest == c, means[:, c]) for c in range(count)], dim=1
            )
        left = _squared_distance(points, means).amin(dim=-1).mean(dim=1)[:, None, None]
        if best is None or lowest is None:
            best, lowest = means, left
        else:
            best = torch.where(left < lowest, means, best)
            lowest = torch.minimum(left, lowest)
    assert best is not None
    return best


def _far_points(points: Tensor, count: int, rng: Rng) -> Tensor:
    """`count` of the points, far from each other: [K, count, A].

    Each after the first is the best of 2 + log(count), drawn with a probability proportional to the
    squared distance from the nearest one so far.
    """
    number, trials = points.shape[1], 2 + int(math.log(count))
    chosen = [points.take_along_dim(rng.integers(number, 1).unsqueeze(-1), dim=1)]
    nearest = _squared_distance(points, chosen[0]).squeeze(-1)  # [K, N]
    for _ in range(count - 1):
        edges = nearest.double().cumsum(dim=1).unsqueeze(1)  # [K, 1, N]
        target = rng.uniform(trials).double().unsqueeze(-1) * edges[..., -1:]
        index = (edges <= target).sum(dim=-1).clamp(max=number - 1)  # [K, trials]
        drawn = points.take_along_dim(index.unsqueeze(-1), dim=1)  # [K, trials, A]
        left = torch.minimum(_squared_distance(points, drawn), nearest.unsqueeze(-1))
        best = left.sum(dim=1).argmin(dim=1)[:, None, None]  # [K, 1, 1]
        nearest = left.take_along_dim(best, dim=2).squeeze(-1)
        chosen.append(drawn.take_along_dim(best, dim=1))
    return torch.cat(chosen, dim=1)


def _squared_distance(points: Tensor, centres: Tensor) -> Tensor:
    """[K, N, A], [K, C, A] -> [K, N, C]; one centre at a time, for N may be large."""
    return torch.stack(
        [(points - centre.unsqueeze(1)).square().sum(dim=-1) for centre in centres.unbind(dim=1)],
        dim=-1,
    )


def _mean_where(points: Tensor, mask: Tensor, otherwise: Tensor) -> Tensor:
    """Mean of the points in the mask, or `otherwise` where there are none: [K, A]."""
    count = mask.sum(dim=1, keepdim=True)
    total = (points * mask.unsqueeze(-1)).sum(dim=1)
    return torch.where(count > 0, total / count.clamp(min=1), otherwise)
