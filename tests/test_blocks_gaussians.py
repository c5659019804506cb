"""Gaussian heads against closed forms, scipy and torch.distributions; bounds of actions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.gaussians import (
    DiagonalGaussian,
    TanhGaussian,
    normal_log_prob,
    tanh_normal,
)
from algorithms.blocks.rng import Rng, Stream

SEEDS = (0, 1)


def rng() -> Rng:
    return Rng.at_step(SEEDS, 0, Stream.TEST)


def test_normal_log_prob_is_that_of_scipy():
    x, mean, log_std = (rng().normal(5, 3) + i for i in range(3))
    expected = stats.norm(mean, log_std.exp()).logpdf(x).sum(axis=-1)
    np.testing.assert_allclose(normal_log_prob(x, mean, log_std), expected, rtol=1e-5)


def test_tanh_normal_is_that_of_torch_distributions():
    numbers = rng()
    mean, log_std, noise = numbers.normal(50, 3), numbers.normal(50, 3) - 1, numbers.normal(50, 3)
    action, log_prob = tanh_normal(mean, log_std, noise)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        gaussian, torch.distributions.TanhTransform(cache_size=1)
    )
    u = mean + log_std.exp() * noise
    expected = squashed.log_prob(squashed.transforms[0](u)).sum(dim=-1)  # exact by its cache
    torch.testing.assert_close(action, torch.tanh(u))
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_tanh_normal_integrates_to_one():
    mean, log_std = torch.tensor([0.4]), torch.tensor([-0.3])

    def density(action: float) -> float:
        u = math.atanh(action)
        noise = (torch.tensor([u]) - mean) / log_std.exp()
        return tanh_normal(mean, log_std, noise)[1].exp().item()

    total, _ = integrate.quad(density, -1 + 1e-9, 1 - 1e-9, epsabs=1e-5)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_a_saturated_action_has_a_finite_density_and_gradient():
    mean = torch.tensor([[30.0]], requires_grad=True)
    action, log_prob = tanh_normal(mean, torch.zeros(1, 1), torch.zeros(1, 1))
    log_prob.sum().backward()
    assert action.item() == 1.0
    # log N(u; u, 1) - (log 4 - 2 u), as the slope tends to 4 exp(-2 u)
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - math.log(4) + 60)
    assert mean.grad.item() == pytest.approx(2.0)


def test_diagonal_gaussian_has_a_squashed_mean_and_one_log_std_for_all_rows():
    head = DiagonalGaussian(rng(), (3, 16, 2), (-5.0, 2.0))
    x = 10 * rng().normal(7, 4, 3)
    mean, log_std = head(x)
    assert mean.shape == (2, 7, 4, 2)
    torch.testing.assert_close(mean, torch.tanh(head.net(x)))
    assert log_std.shape == (2, 1, 1, 2)
    assert torch.equal(log_std, torch.zeros(2, 1, 1, 2))
    head.log_std[0] = -9.0
    head.log_std[1] = 9.0
    assert head(x)[1].flatten(1).tolist() == [[-5.0, -5.0], [2.0, 2.0]]


def test_tanh_gaussian_starts_near_zero_with_log_std_minus_one():
    head = TanhGaussian(rng(), (3, 256, 256, 2))
    bound = 0.01 * math.sqrt(6 / (256 + 4))
    weight = head.net.layers[-1].weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not head.net.layers[-1].bias.any()
    mean, log_std = head(rng().normal(5, 3))
    assert mean.abs().max() < 0.01
    torch.testing.assert_close(log_std, torch.full_like(log_std, -1.0), atol=0.01, rtol=0)


def test_tanh_gaussian_scales_and_clamps_its_log_std_for_each_seed():
    head = TanhGaussian(rng(), (3, 16, 2), log_std_range=(-2.0, 2.0))
    x = rng().normal(5, 3)
    raw = head.net(x)[..., 2:]
    head.multiplier.copy_(torch.tensor([[2.0], [1e6]]))
    head.offset.copy_(torch.tensor([[0.5], [0.0]]))
    found = head(x)[1]
    torch.testing.assert_close(found[0], 2.0 * raw[0] + 0.5)
    assert set(found[1].flatten().tolist()) <= {-2.0, 2.0}


def test_bounds_stretch_clamp_and_margin_by_dimension():
    bounds = ActionBounds((-1.0, 0.0), (2.0, 0.5))
    corners = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
    expected = torch.tensor([[-1.0, 0.5], [0.5, 0.25], [2.0, 0.0]])
    torch.testing.assert_close(bounds.stretch(corners), expected)
    clamped = bounds.clamp(torch.tensor([[-9.0, 9.0]]), margin=0.1)
    torch.testing.assert_close(clamped, torch.tensor([[-0.85, 0.475]]))
    assert not bounds.state_dict()


def test_smoothing_noise_has_its_std_is_clipped_and_the_sum_stays_in_bounds():
    bounds = ActionBounds((-2.0, -1.0), (2.0, 1.0))
    action = torch.zeros(2, 20_000, 2)
    noise = bounds.smooth(action, rng(), 0.2, 0.5)
    # A normal of std 0.2 clipped at 2.5 std has std 0.2 * 0.9960...
    clipped = np.clip(stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000), -2.5, 2.5).std() * 0.2
    assert noise[..., 0].std().item() == pytest.approx(2 * clipped, rel=0.02)
    assert noise[..., 1].std().item() == pytest.approx(clipped, rel=0.02)
    assert noise[..., 0].abs().max().item() == pytest.approx(1.0)
    assert noise[..., 1].abs().max().item() == pytest.approx(0.5)
    edge = bounds.smooth(action + torch.tensor([2.0, -1.0]), rng(), 0.2, 0.5)
    assert (edge >= bounds.low).all()
    assert (edge <= bounds.high).all()
    assert (edge[..., 0] == 2.0).float().mean().item() == pytest.approx(0.5, abs=0.02)
