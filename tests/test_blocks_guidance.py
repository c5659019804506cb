"""Guidance against closed forms: products of Gaussians, a linear-Gaussian system, differences."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.edm import Churn, Preconditioning, stochastic_heun
from algorithms.blocks.guidance import additive, calibrated, slope, slope_and_curvature
from algorithms.blocks.rng import Rng, Stream

ALL = slice(0, 1)


def rng(step=0):
    return Rng.at_step((0,), step, Stream.TEST)


def gaussian(mean, var):
    """log N(action; mean, var) as the sampler calls it."""

    def log_density(action, window):
        return (-0.5 * (action - mean).square() / var).sum(dim=-1)

    return log_density


def denoiser_of(mean, var):
    def denoise(x, sigma):
        level = sigma.square().reshape(*sigma.shape, *(1,) * (x.dim() - sigma.dim()))
        return (var * x + level * mean) / (var + level)

    return denoise


def sample(denoiser, steps=64, count=20_000, churn=None, before_step=None, dim=1, length=1):
    sigmas = Preconditioning(sigma_data=1.0).karras_sigmas(steps)
    start = sigmas[0] * rng(0).normal(count, length, dim)
    return stochastic_heun(denoiser, start, sigmas, rng(1), churn, before_step)


@pytest.mark.parametrize("coef", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("jacobian", "mean", "var"), [("data", 0.0, 1.0), ("network", 0.0, 1.0), ("network", 0.5, 0.3)]
)
def test_guided_samples_follow_the_product_of_two_gaussians(coef, jacobian, mean, var):
    """Policy N(2, 0.5); precisions add, the policy's times coef. With and without churn."""
    guided = calibrated(denoiser_of(mean, var), gaussian(2.0, 0.5), ALL, coef, jacobian)
    drawn = sample(guided, churn=Churn() if mean else Churn(0.0))
    precision = 1.0 / var + coef / 0.5
    expected = (mean / var + 2.0 * coef / 0.5) / precision
    assert drawn.mean().item() == pytest.approx(expected, rel=0.03)
    assert drawn.var().item() == pytest.approx(1.0 / precision, rel=0.03)


def test_no_guidance_is_the_denoiser_itself_and_no_nudge():
    denoiser = denoiser_of(0.0, 1.0)
    assert calibrated(denoiser, gaussian(2.0, 0.5), ALL, 0.0) is denoiser
    assert additive(gaussian(2.0, 0.5), ALL, 0.0, 64) is None


def test_a_vanishing_exponent_is_bitwise_unguided():
    """The guided path itself, with an amount that underflows to 0."""
    denoiser = denoiser_of(0.0, 1.0)
    plain = sample(denoiser, steps=8, count=64)
    assert torch.equal(plain, sample(calibrated(denoiser, gaussian(2.0, 0.5), ALL, 1e-38), 8, 64))
    nudge = additive(gaussian(2.0, 0.5), ALL, 1e-38, 8)
    assert torch.equal(plain, sample(denoiser, 8, 64, before_step=nudge))


@pytest.mark.parametrize("jacobian", ["data", "network"])
def test_likelihood_rises_and_variance_falls_with_the_exponent(jacobian):
    likelihood, variance = [], []
    for coef in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0):
        log_density = gaussian(2.0, 0.5)
        drawn = sample(calibrated(denoiser_of(0.0, 1.0), log_density, ALL, coef, jacobian))
        likelihood.append(log_density(drawn, drawn).mean().item())
        variance.append(drawn.var().item())
    assert likelihood == sorted(likelihood)
    assert variance == sorted(variance, reverse=True)


def test_gradient_and_curvature_match_finite_differences_of_a_policy_that_is_not_gaussian():
    """log cosh of a tanh action whose target depends on the observation, in float64."""
    window = rng(2).normal(4, 3, 5).double()
    actions = slice(2, 4)

    def log_density(action, whole):
        return -torch.cosh(torch.tanh(action) - whole[..., :2]).log().sum(dim=-1)

    g, c = slope_and_curvature(log_density, window, actions)
    assert torch.equal(g, slope(log_density, window, actions))
    for entry in range(2):
        step = torch.zeros(2).double()
        step[entry] = 1e-4
        above = log_density(window[..., actions] + step, window)
        below = log_density(window[..., actions] - step, window)
        middle = log_density(window[..., actions], window)
        torch.testing.assert_close(g[..., entry], (above - below) / 2e-4, rtol=1e-5, atol=1e-8)
        second = (above - 2.0 * middle + below) / 1e-8
        torch.testing.assert_close(c[..., entry], (-second).clamp(min=0), rtol=1e-3, atol=1e-5)


def test_guidance_moves_only_actions_in_the_step_it_is_applied():
    window, actions = rng(3).normal(4, 8, 5), slice(2, 4)
    others = [0, 1, 4]
    sigma = torch.full((1, 1, 1, 1), 0.7)
    denoiser = denoiser_of(0.0, 1.0)
    guided = calibrated(denoiser, gaussian(2.0, 0.5), actions, 1.0)(window, sigma)
    nudged = additive(gaussian(2.0, 0.5), actions, 1.0, 16)(3, window, sigma)
    for found, plain in ((guided, denoiser(window, sigma)), (nudged, window)):
        assert torch.equal(found[..., others], plain[..., others])
        assert (found[..., actions] != plain[..., actions]).all()


def test_the_nudge_follows_the_codes_schedule_and_leaves_the_last_step_alone():
    window, sigma = rng(4).normal(3, 4, 2), torch.ones(1, 1, 1, 1)
    actions = slice(1, 2)
    g = slope(gaussian(2.0, 0.5), window, actions)
    torch.testing.assert_close(g, (2.0 - window[..., actions]) / 0.5)
    for i in (0, 5):
        moved = additive(gaussian(2.0, 0.5), actions, 0.1, 10)(i, window, sigma)
        amount = 0.1 * (1.0 - i / 10 + 0.3 * math.sin(math.pi * (i + 1) / 10))
        torch.testing.assert_close(moved[..., actions] - window[..., actions], amount * g)
    unit = additive(gaussian(2.0, 0.5), actions, 1.0, 10, 0.0, True)(0, window, sigma)
    length = (unit - window).square().sum(dim=(-2, -1)).sqrt()
    torch.testing.assert_close(length, torch.ones(1, 3))
    at = additive(gaussian(2.0, 0.5), actions, 1.0, 10, 0.0, False, denoiser_of(0.0, 1.0))
    denoised = at(0, window, sigma)[..., actions] - window[..., actions]
    torch.testing.assert_close(denoised, (2.0 - 0.5 * window[..., actions]) / 0.5)
    assert additive(gaussian(2.0, 0.5), actions, 1.0, 10)(9, window, sigma) is window


@pytest.mark.parametrize(("coef", "mean", "var"), [(0.003, 0.28, 0.79), (0.03, 1.52, 0.10)])
def test_the_nudge_has_the_effect_the_reference_found(coef, mean, var):
    """Behaviour N(0, 1), policy N(2, 0.5), 256 steps with the code's churn."""
    nudge = additive(gaussian(2.0, 0.5), ALL, coef, 256)
    drawn = sample(denoiser_of(0.0, 1.0), 256, 4000, before_step=nudge)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.1)
    assert drawn.var().item() == pytest.approx(var, abs=0.06)


class LinearSystem:
    """Windows (s0, a0, s1, a1, s2) of s' = 0.9 s + 0.5 a + w; a ~ N(0.3 s, 0.4), w ~ N(0, 0.1).

    Zero-mean Gaussians: the joint precision is a sum of one term for each factor.
    """

    NOISE, BEHAVIOUR = 0.1, 0.4

    def __init__(self):
        self.precision = self.factor([1.0, 0, 0, 0, 0], 1.0)
        for t in (0, 2):
            self.precision += self.factor(self.at({t: -0.3, t + 1: 1.0}), self.BEHAVIOUR)
            self.precision += self.factor(self.residual(t), self.NOISE)

    @staticmethod
    def at(entries):
        return [entries.get(i, 0.0) for i in range(5)]

    def residual(self, t):
        return self.at({t: -0.9, t + 1: -0.5, t + 2: 1.0})

    @staticmethod
    def factor(row, variance):
        row = torch.tensor(row, dtype=torch.float64)
        return torch.outer(row, row) / variance

    def denoiser(self):
        covariance = torch.linalg.inv(self.precision)

        def denoise(x, sigma):
            level = float(sigma.flatten()[0]) ** 2
            gain = covariance @ torch.linalg.inv(covariance + level * torch.eye(5).double())
            return x @ gain.T.to(x.dtype)

        return denoise


@pytest.mark.parametrize("jacobian", ["data", "network"])
def test_guidance_leaves_the_dynamics_of_a_linear_gaussian_system_alone(jacobian):
    """Target N(1 - 0.5 s, 0.2) for both actions; s' - 0.9 s - 0.5 a must stay N(0, 0.1)."""
    system = LinearSystem()
    order = [0, 2, 4, 1, 3]  # states first, so that the actions are one slice
    inverse = torch.argsort(torch.tensor(order))
    denoise = system.denoiser()

    def reordered(x, sigma):
        return denoise(x[..., inverse], sigma)[..., order]

    def log_density(action, window):
        mean = 1.0 - 0.5 * window[..., :2]
        return (-0.5 * (action - mean).square() / 0.2).sum(dim=-1)

    drawn = {}
    for coef in (0.0, 1.0):
        guided = calibrated(reordered, log_density, slice(3, 5), coef, jacobian)
        drawn[coef] = sample(guided, 128, 4000, dim=5)[..., inverse].reshape(-1, 5).double()
    for x in drawn.values():
        for t in (0, 2):
            residual = x @ torch.tensor(system.residual(t), dtype=torch.float64)
            assert residual.mean().item() == pytest.approx(0.0, abs=0.2 * system.NOISE**0.5)
            assert residual.var().item() == pytest.approx(system.NOISE, rel=0.12)
    gap = {coef: (x[:, 1] - 1.0 + 0.5 * x[:, 0]).square().mean() for coef, x in drawn.items()}
    assert gap[1.0] < 0.5 * gap[0.0], "and the actions are the target's"


def test_an_unknown_jacobian_is_refused():
    with pytest.raises(ValueError, match="expected data or network"):
        calibrated(denoiser_of(0.0, 1.0), gaussian(0.0, 1.0), ALL, 1.0, "exact")
