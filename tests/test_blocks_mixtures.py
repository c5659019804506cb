"""Mixtures of Gaussians against torch's own distributions, grids and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from algorithms.blocks.mixtures import Mixture, positive, scale_of, scale_size, spread_means
from algorithms.blocks.rng import Rng, Stream

KINDS = pytest.mark.parametrize("full", [True, False], ids=["full", "diagonal"])


def draws(*shape: int, seeds=(0, 1), kind="normal") -> torch.Tensor:
    return getattr(Rng.at_step(seeds, 0, Stream.TEST), kind)(*shape)


def mixture(full: bool, rows: int = 3, count: int = 4, size: int = 2, std: float = 0.5) -> Mixture:
    """One mixture for each of 2 seeds and `rows` rows."""
    rng = Rng.at_step((0, 1), 0, Stream.TEST)
    raw = 0.3 * rng.normal(rows, count, scale_size(size, full))
    return Mixture(
        torch.log_softmax(rng.normal(rows, count), dim=-1),
        rng.normal(rows, count, size),
        scale_of(raw, size, full, std, 1e-4),
    )


def torchs(found: Mixture) -> MixtureSameFamily:
    experts = (
        MultivariateNormal(found.mean, scale_tril=found.scale)
        if found.full
        else Independent(Normal(found.mean, found.scale), 1)
    )
    return MixtureSameFamily(Categorical(logits=found.log_weight), experts)


@KINDS
def test_densities_responsibilities_and_entropies_are_torchs(full):
    found = mixture(full)
    theirs = torchs(found)
    x = draws(3, 5, 2)  # [K, rows, S, A]
    by_point = x.movedim(2, 0)
    torch.testing.assert_close(found.log_prob(x), theirs.log_prob(by_point).movedim(0, 2))
    experts = theirs.component_distribution
    log_prob = torch.stack([experts.log_prob(p.unsqueeze(-2)) for p in by_point], dim=2)
    torch.testing.assert_close(found.expert_log_prob(x), log_prob)
    torch.testing.assert_close(found.expert_entropy(), experts.entropy())
    share = found.log_responsibility(x).exp()
    torch.testing.assert_close(share.sum(dim=-1), torch.ones(2, 3, 5))
    joint = (log_prob + found.log_weight.unsqueeze(-2)).exp()
    torch.testing.assert_close(share, joint / joint.sum(dim=-1, keepdim=True))


@KINDS
def test_the_density_integrates_to_one(full):
    found = mixture(full, rows=1)
    axis = torch.linspace(-8, 8, 401)
    grid = torch.cartesian_prod(axis, axis).expand(2, 1, -1, 2)
    total = found.log_prob(grid).exp().sum(dim=-1) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones(2, 1), atol=1e-4, rtol=0)


@KINDS
def test_densities_in_28_dimensions_neither_overflow_nor_underflow(full):
    """exp(log q) is beyond single precision on both sides here."""
    size = 28
    scale = torch.full((1, 1, 2, size), 1e-3)
    means = torch.zeros(1, 1, 2, size)
    means[..., 1, :] = 1.0
    found = Mixture(
        torch.full((1, 1, 2), math.log(0.5)), means, torch.diag_embed(scale) if full else scale
    )
    x = torch.stack((means[..., 0, :], 0.4 * means[..., 1, :]), dim=2)
    log_prob = found.log_prob(x)[0, 0]
    peak = math.log(0.5) - size * math.log(1e-3 * math.sqrt(2 * math.pi))
    assert log_prob[0].item() == pytest.approx(peak, rel=1e-5)
    assert log_prob[0] > 100
    assert -3e6 < log_prob[1].item() < -1e6
    share = found.log_responsibility(x).exp()[0, 0]
    torch.testing.assert_close(share, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


@KINDS
def test_scales_are_what_the_numbers_say(full):
    size = 3
    raw = torch.zeros(scale_size(size, full))
    scale = scale_of(raw, size, full, 0.7, 1e-4)
    expected = torch.full((size,), 0.7)
    torch.testing.assert_close(scale, torch.diag(expected) if full else expected)
    if full:
        raw[size:] = torch.tensor([1.0, 2.0, 3.0])
        below = scale_of(raw, size, full, 0.7, 1e-4)
        assert below[1, 0] == 1.0
        assert below[2, :2].tolist() == [2.0, 3.0]
        assert (below.triu(1) == 0).all()
    assert positive(torch.tensor(-50.0), 1.0, 1e-4).item() == pytest.approx(1e-4)


@KINDS
def test_draws_have_the_gates_shares_and_the_experts_moments(full):
    found = mixture(full, rows=1)
    count = 40_000
    many = Mixture(*(part.expand(-1, count, *part.shape[2:]) for part in vars(found).values()))
    rng = Rng.at_step((0, 1), 1, Stream.TEST)
    expert = many.choose(rng.uniform(count))
    drawn = many.draw_of(expert, rng.normal(count, 2))
    for k in range(2):
        share = torch.bincount(expert[k], minlength=4) / count
        torch.testing.assert_close(share, found.log_weight[k, 0].exp(), atol=0.01, rtol=0)
        for z in range(4):
            part = drawn[k][expert[k] == z]
            scale = found.scale[k, 0, z] if full else torch.diag(found.scale[k, 0, z])
            torch.testing.assert_close(part.mean(0), found.mean[k, 0, z], atol=0.05, rtol=0)
            torch.testing.assert_close(part.T.cov(), scale @ scale.T, atol=0.05, rtol=0)
    torch.testing.assert_close(many.mean_of(expert)[1, 7], found.mean[1, 0, expert[1, 7]])


@KINDS
def test_a_sample_moves_with_its_expert(full):
    found = mixture(full, rows=2)
    noise = draws(2, 3, 4, 2)  # [K, rows, S, C, A]
    x = found.reparameterised(noise)
    for k, row, s, z in ((0, 0, 0, 0), (1, 1, 2, 3)):
        scale = found.scale[k, row, z] if full else torch.diag(found.scale[k, row, z])
        expected = found.mean[k, row, z] + scale @ noise[k, row, s, z]
        torch.testing.assert_close(x[k, row, s, z], expected)


@KINDS
def test_the_noise_of_the_scores_is_taken_out_again(full):
    """V^-1 = E[(S + sigma^2)^-1] is inverted: S comes back, also rotated."""
    sigmas = torch.linspace(0.2, 0.5, 64)
    covariance = (
        torch.tensor([[0.3, 0.1], [0.1, 0.2]]) if full else torch.diag(torch.tensor([0.3, 0.02]))
    )
    inflated = torch.linalg.inv(
        torch.stack([torch.linalg.inv(covariance + s**2 * torch.eye(2)) for s in sigmas]).mean(0)
    )
    scale = torch.linalg.cholesky(inflated) if full else torch.diagonal(inflated).sqrt()
    found = Mixture(
        torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 2), scale.view(1, 1, 1, *scale.shape)
    )
    back = found.without_noise(sigmas, 1e-4).scale[0, 0, 0]
    back = back @ back.T if full else torch.diag(back.square())
    torch.testing.assert_close(back, covariance, atol=1e-5, rtol=1e-4)
    narrow = Mixture(found.log_weight, found.mean, 0.1 * found.scale)  # below the least possible
    least = narrow.without_noise(sigmas, 1e-3).std
    torch.testing.assert_close(least, torch.full_like(least, 1e-3), atol=2e-4, rtol=0)


def test_the_gates_entropy_is_over_its_largest_value():
    scale = torch.ones(1, 3, 4, 2)
    weight = torch.tensor([[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = Mixture((weight + 1e-30).log().unsqueeze(0), scale, scale)
    torch.testing.assert_close(found.gate_entropy(), torch.tensor([[1.0, 0.5, 0.0]]))
    one = Mixture(torch.zeros(1, 3, 1), scale[:, :, :1], scale[:, :, :1])
    assert (one.gate_entropy() == 0).all()


def test_spread_means_are_the_means_of_far_clusters():
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])
    seeds = tuple(range(20))
    points = centres.repeat_interleave(50, dim=0) + 0.1 * draws(200, 2, seeds=seeds)
    found = spread_means(points, 4, Rng.at_step(seeds, 0, Stream.INITIALISATION))
    assert found.shape == (20, 4, 2)
    expected = points.unflatten(1, (4, 50)).mean(dim=2)  # [K, 4, A]
    gaps = (found.unsqueeze(2) - expected.unsqueeze(1)).norm(dim=-1)
    assert gaps.amin(dim=1).max() < 1e-5, "every cluster has a centre, which is its mean"
    start = spread_means(points, 4, Rng.at_step(seeds, 0, Stream.INITIALISATION), 1, rounds=0)
    assert (start.unsqueeze(2) - points.unsqueeze(1)).norm(dim=-1).amin(dim=-1).max() == 0
    same = spread_means(torch.ones(2, 5, 2), 3, Rng.at_step((0, 1), 0, Stream.TEST))
    assert (same == 1).all()  # no distance to choose by


def test_every_mode_of_a_ring_whose_neighbours_overlap_has_a_centre():
    """Radius 2, standard deviation 0.5: neighbours are three standard deviations apart."""
    seeds = tuple(range(50))
    angle = torch.arange(8) * (math.pi / 4)
    modes = 2.0 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    points = modes.repeat(125, 1) + 0.5 * draws(1000, 2, seeds=seeds)
    found = spread_means(points, 8, Rng.at_step(seeds, 0, Stream.INITIALISATION))
    reached = (found.unsqueeze(2) - modes).norm(dim=-1).amin(dim=1)  # [K, 8]
    assert (reached < 0.6).all(dim=1).float().mean() > 0.9
