"""EDM's scalings, noise densities and samplers against closed forms of Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.edm import (
    Churn,
    Preconditioning,
    euler,
    euler_ancestral,
    heun,
    log_normal_sigmas,
    stochastic_heun,
)
from algorithms.blocks.rng import Rng, Stream

MEAN, STD = 0.7, 0.4


def rng(step=0, seeds=(0,)):
    return Rng.at_step(seeds, step, Stream.TEST)


def gaussian_denoiser(x, sigma):
    """E[clean | noisy] for clean ~ N(MEAN, STD^2)."""
    level = sigma.square()
    return (STD**2 * x + level * MEAN) / (STD**2 + level)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scalings_keep_the_data_at_no_noise_and_the_networks_input_at_unit_variance(sigma_data):
    edm = Preconditioning(sigma_data)
    c_skip, c_out, _ = edm.scalings(torch.zeros(1))
    assert (c_skip.item(), c_out.item()) == (pytest.approx(1.0), 0.0)
    sigma = torch.logspace(-3, 2, 20)
    _, c_out, c_in = edm.scalings(sigma)
    variance = c_in.square() * (sigma_data**2 + sigma.square())
    torch.testing.assert_close(variance, torch.ones(20))
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    torch.testing.assert_close(1.0 / c_out.square(), weight)


def test_errors_are_denoising_errors_weighted_by_one_over_c_out_squared():
    edm = Preconditioning()
    clean, noise = rng(0).normal(6, 3), rng(1).normal(6, 3)
    sigma = edm.log_logistic(rng(2).uniform(6))
    network = lambda x, c_noise: torch.sin(x) + c_noise.unsqueeze(-1)  # noqa: E731
    denoised = edm.denoise(network, clean + sigma.unsqueeze(-1) * noise, sigma)
    c_out = edm.scalings(sigma)[1].unsqueeze(-1)
    expected = (denoised - clean).square() / c_out.square()
    actual = edm.errors(network, clean, sigma, noise)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_one_level_serves_a_whole_window():
    edm = Preconditioning()
    window = rng(0).normal(4, 8, 3)
    sigma = torch.tensor([[0.1, 1.0, 2.0, 5.0]])
    network = lambda x, c_noise: x * c_noise.reshape(1, 4, 1, 1)  # noqa: E731
    denoised = edm.denoise(network, window, sigma)
    for b in range(4):
        alone = edm.denoise(lambda x, c: x * c, window[:, b], sigma[0, b])
        torch.testing.assert_close(denoised[:, b], alone)


def test_log_logistic_has_the_published_quantiles():
    """1, 5, 25, 50, 75, 95 and 99 per cent of the untruncated density at sigma_data 0.5."""
    drawn = Preconditioning().log_logistic(rng(seeds=(3,)).uniform(400_000))
    quantiles = torch.quantile(
        drawn.double(), torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]).double()
    )
    expected = torch.tensor([0.05, 0.115, 0.29, 0.50, 0.86, 2.2, 5.0]).double()
    torch.testing.assert_close(quantiles, expected, rtol=0.03, atol=0.0)
    assert drawn.min() >= 0.002
    assert drawn.max() <= 80.0


def test_log_logistic_stays_inside_a_narrow_range_and_reaches_its_ends():
    drawn = Preconditioning(0.5, 0.1, 1.0).log_logistic(torch.tensor([0.0, 0.999999]))
    torch.testing.assert_close(drawn, torch.tensor([0.1, 1.0]), rtol=1e-4, atol=0.0)


def test_log_normal_levels_are_the_exponential_of_a_shifted_normal():
    levels = log_normal_sigmas(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(levels, torch.tensor([math.exp(-1.2), 1.0]))


@pytest.mark.parametrize("schedule", ["karras_sigmas", "exponential_sigmas"])
def test_schedules_fall_from_the_largest_level_to_zero(schedule):
    sigmas = getattr(Preconditioning(), schedule)(256)
    assert sigmas.shape == (257,)
    torch.testing.assert_close(sigmas[[0, -2, -1]], torch.tensor([80.0, 0.002, 0.0]))
    assert (sigmas.diff() < 0).all()


def test_karras_levels_are_evenly_spaced_in_the_seventh_root():
    roots = Preconditioning().karras_sigmas(18)[:-1].double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (lambda x, s, r: euler(gaussian_denoiser, x, s), 256),
        (lambda x, s, r: heun(gaussian_denoiser, x, s), 64),
        (lambda x, s, r: stochastic_heun(gaussian_denoiser, x, s, r), 512),
        (lambda x, s, r: stochastic_heun(gaussian_denoiser, x, s, r, Churn(0.0)), 64),
        (lambda x, s, r: euler_ancestral(gaussian_denoiser, x, s, r), 1024),
    ],
    ids=["euler", "heun", "churn", "no churn", "ancestral"],
)
def test_every_sampler_recovers_a_gaussian(sampler, steps):
    sigmas = Preconditioning(sigma_data=1.0).karras_sigmas(steps)
    start = sigmas[0] * rng(0).normal(10_000, 1)
    drawn = sampler(start, sigmas, rng(1))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03 * STD)
    assert drawn.var().item() == pytest.approx(STD**2, rel=0.04)


def test_heun_follows_the_flow_of_a_gaussian_exactly():
    """The flow maps x at sigma to MEAN + (x - MEAN) STD / sqrt(STD^2 + sigma^2)."""
    sigmas = Preconditioning().karras_sigmas(200)
    start = 80.0 * rng().normal(50, 1)
    expected = MEAN + (start - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)
    torch.testing.assert_close(heun(gaussian_denoiser, start, sigmas), expected, rtol=0, atol=2e-3)


def test_no_churn_is_plain_heun_bit_by_bit():
    sigmas = Preconditioning().karras_sigmas(12)
    start = 80.0 * rng().normal(16, 2)
    plain = heun(gaussian_denoiser, start, sigmas)
    assert torch.equal(plain, stochastic_heun(gaussian_denoiser, start, sigmas, rng(1), Churn(0.0)))


def test_churn_is_capped_and_only_inside_its_levels():
    churn = Churn()
    assert churn.rate(1.0, 256) == pytest.approx(0.3125)
    assert churn.rate(1.0, 32) == pytest.approx(math.sqrt(2.0) - 1.0)
    assert churn.rate(60.0, 256) == churn.rate(0.01, 256) == 0.0


@pytest.mark.parametrize("values", [(0.5, 1.0, 0.1), (0.5, 0.0, 1.0), (0.0, 0.1, 1.0)])
def test_impossible_levels_are_refused(values):
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max"):
        Preconditioning(*values)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="0 denoising steps; expected at least 1"):
        Preconditioning().karras_sigmas(0)


def test_the_hook_is_called_once_before_each_step_and_its_result_is_used():
    sigmas = Preconditioning().karras_sigmas(6)
    seen = []

    def before_step(i, x, sigma):
        seen.append((i, sigma.item()))
        return torch.zeros_like(x) if i == 5 else x

    start = 80.0 * rng().normal(16, 2)
    end = stochastic_heun(gaussian_denoiser, start, sigmas, rng(1), Churn(0.0), before_step)
    assert seen == [(i, sigmas[i].item()) for i in range(6)]
    last = gaussian_denoiser(torch.zeros(1, 16, 2), sigmas[5])
    torch.testing.assert_close(end, last)


def test_predicting_from_the_unchurned_point_differs_only_where_noise_was_added():
    sigmas = Preconditioning().karras_sigmas(12)
    start = 80.0 * rng().normal(16, 2)
    for churn, same in ((Churn(0.0), True), (Churn(), False)):
        found = [
            stochastic_heun(
                gaussian_denoiser, start, sigmas, rng(1), churn, predict_from_unchurned=flag
            )
            for flag in (False, True)
        ]
        assert torch.equal(*found) == same
