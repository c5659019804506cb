"""Denoising error as a detector: closed forms, published orders, exceedance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from algorithms.blocks.denoising_error import (
    EDM,
    Levels,
    ScoreNet,
    denoiser_of,
    level_errors,
    mean_error,
    percentile,
)
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng, Stream
from analysis.detection import auroc

N = 20_000


def numbers(step: int = 0, seeds: tuple[int, ...] = (0,)) -> Rng:
    return Rng.at_step(seeds, step, Stream.TEST)


def gaussian_denoiser(std: float, mean: float = 0.0):
    """E[x | noisy] of N(mean, std^2 I)."""

    def denoise(noisy, sigma):
        sigma = sigma.unsqueeze(-1)
        return (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)

    return denoise


def mixture_denoiser(centres: torch.Tensor, std: float):
    """E[x | noisy] of equal parts of N(centre, std^2 I)."""

    def denoise(noisy, sigma):
        sigma = sigma.unsqueeze(-1)
        total = std**2 + sigma**2
        offset = noisy.unsqueeze(-2) - centres
        weight = torch.softmax(-offset.square().sum(-1) / (2 * total), dim=-1)
        each = (std**2 * noisy.unsqueeze(-2) + sigma.unsqueeze(-1) ** 2 * centres) / (
            total.unsqueeze(-1)
        )
        return (weight.unsqueeze(-1) * each).sum(dim=-2)

    return denoise


def score(denoiser, clean: torch.Tensor, levels: Levels, step: int) -> np.ndarray:
    sigma, noise = levels.draw(numbers(step), *clean.shape[1:])
    return mean_error(level_errors(denoiser, clean, sigma, noise))[0].numpy()


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("distance", [0.0, 0.7])
def test_expected_squared_error_of_a_gaussian_is_the_closed_form(sigma, distance):
    std, dim = 0.3, 4
    clean = torch.zeros(1, N, dim)
    clean[..., 0] = 0.2 + distance
    clean[..., 1:] = 0.2
    given, noise = Levels(fixed=(sigma,)).draw(numbers(), N, dim)
    errors = level_errors(gaussian_denoiser(std, 0.2), clean, given, noise)
    expected = (sigma**4 * distance**2 + std**4 * sigma**2 * dim) / (std**2 + sigma**2) ** 2
    assert errors.square().mean().item() == pytest.approx(expected, rel=0.02)


# AUROC of N(0, std^2 I) against uniform actions; columns: one random level, ten, then fixed ones.
COLUMNS = (Levels(1), Levels(10), *(Levels(fixed=(s,)) for s in (0.05, 0.2, 0.5, 5.0)))
TABLE = {
    (0.1, 2): (0.974, 0.984, 0.922, 0.981, 0.984, 0.984),
    (0.1, 3): (0.988, 0.997, 0.962, 0.996, 0.997, 0.997),
    (0.1, 6): (0.992, 1.0, 0.995, 1.0, 1.0, 1.0),
    (0.3, 2): (0.739, 0.846, 0.518, 0.671, 0.811, 0.859),
    (0.3, 3): (0.771, 0.893, 0.519, 0.708, 0.863, 0.908),
    (0.3, 6): (0.808, 0.955, 0.532, 0.785, 0.939, 0.971),
}


@pytest.mark.parametrize(("std", "dim"), TABLE)
def test_auroc_of_a_wide_policy_and_its_order_over_levels(std, dim):
    inside = std * numbers(1).normal(N, dim)
    outside = 2.0 * numbers(2).uniform(N, dim) - 1.0
    denoiser = gaussian_denoiser(std)
    found = [
        auroc(score(denoiser, inside, levels, 3), score(denoiser, outside, levels, 4))
        for levels in COLUMNS
    ]
    assert found == pytest.approx(TABLE[std, dim], abs=0.012)
    one, ten, *fixed = found
    assert ten > one
    assert fixed[0] < fixed[1] < fixed[2] + 1e-3, "one mode: large levels separate better"
    assert fixed[2] < fixed[3] + 1e-3


@pytest.mark.parametrize("dim", [2, 3])
def test_many_modes_want_small_levels(dim):
    """The reverse of one mode: at large levels the error is the distance to the mean action."""
    centres = 1.6 * numbers(5).uniform(8, dim)[0] - 0.8
    pick = numbers(6).integers(8, 4000)[0]
    inside = (centres[pick] + 0.05 * numbers(7).normal(4000, dim)[0]).unsqueeze(0)
    outside = 2.0 * numbers(8).uniform(4000, dim) - 1.0
    denoiser = mixture_denoiser(centres, 0.05)
    small, large, one, ten = (
        auroc(score(denoiser, inside, levels, 9), score(denoiser, outside, levels, 10))
        for levels in (COLUMNS[2], COLUMNS[5], COLUMNS[0], COLUMNS[1])
    )
    assert small > 0.85
    assert small > large + 0.1
    assert ten > one


def test_stratified_errors_are_one_on_average_over_the_data_at_every_level():
    levels = Levels(fixed=(0.05, 0.5, 5.0))
    inside = 0.3 * numbers(1).normal(N, 3)
    errors = level_errors(gaussian_denoiser(0.3), inside, *levels.draw(numbers(2), N, 3))
    scale = errors.mean(dim=1)
    assert scale.shape == (1, 3)
    again = level_errors(gaussian_denoiser(0.3), inside, *levels.draw(numbers(3), N, 3))
    assert mean_error(again, scale).mean().item() == pytest.approx(1.0, abs=0.01)
    assert (again / scale).mean(dim=1).flatten().tolist() == pytest.approx([1.0] * 3, abs=0.02)


@pytest.mark.parametrize("percent", [80.0, 99.0])
def test_the_expected_share_of_the_data_exceeds_its_threshold_on_fresh_noise(percent):
    inside = 0.3 * numbers(1).normal(N, 3)
    first = torch.tensor(score(gaussian_denoiser(0.3), inside, Levels(1), 2)).unsqueeze(0)
    again = torch.tensor(score(gaussian_denoiser(0.3), inside, Levels(1), 3))
    share = 100.0 * (again > percentile(first, percent)).float().mean().item()
    noise = 3.0 * (percent * (100.0 - percent) / N * 2.0) ** 0.5  # of both shares
    assert share == pytest.approx(100.0 - percent, abs=max(0.3, noise))


def test_percentiles_are_numpys_for_each_seed():
    values = numbers(0, (1, 2)).normal(101)
    found = percentile(values, 87.3)
    assert found.numpy() == pytest.approx(np.percentile(values.numpy(), 87.3, axis=1), abs=1e-6)
    with pytest.raises(ValueError, match="from 0 to 100"):
        percentile(values, 101.0)
    with pytest.raises(ValueError, match="expected positive"):
        Levels(0)


def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it():
    more, fewer = (Levels(3).draw(numbers(), rows, 2) for rows in (7, 4))
    for many, few in zip(more, fewer, strict=True):
        assert torch.equal(many[:, :4], few)


def test_the_network_knows_condition_and_level_and_has_the_published_size():
    net = ScoreNet(numbers(), 3, 11)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(0.21e6, rel=0.03)
    clean, obs = numbers(1).normal(5, 3), numbers(2).normal(5, 11)
    one = denoiser_of(net, obs)(clean, torch.full((1, 5), 0.5))
    assert not torch.equal(one, denoiser_of(net, obs + 1.0)(clean, torch.full((1, 5), 0.5)))
    assert not torch.equal(one, denoiser_of(net, obs)(clean, torch.full((1, 5), 0.6)))
    several = denoiser_of(net, obs)(
        clean.unsqueeze(2).expand(-1, -1, 4, -1), torch.full((1, 5, 4), 0.5)
    )
    assert several[:, :, 2].numpy() == pytest.approx(one.numpy(), abs=1e-6)


@pytest.mark.slow
def test_a_trained_network_matches_the_closed_form_on_a_grid():
    std, dim = 0.3, 2
    net = ScoreNet(numbers(), dim, hidden_dim=64)
    optim = Adam(net, 2e-3)
    for step in range(1500):
        rng = Rng.at_step((0,), step, Stream.TRAIN)
        clean = std * rng.normal(512, dim)
        sigma, noise = EDM.log_logistic(rng.uniform(512)), rng.normal(512, dim)

        def loss(model, clean=clean, sigma=sigma, noise=noise):
            return EDM.errors(model, clean, sigma, noise).mean(dim=(1, 2)), {}

        grads, _ = gradients(net, loss)
        optim.step(net, grads, torch.tensor([1.0 if step < 1000 else 0.1]))
    for sigma in (0.2, 0.5, 2.0):
        for distance in (0.0, 0.3, 0.6):
            clean = torch.zeros(1, 4000, dim)
            clean[..., 0] = distance
            draws = Levels(fixed=(sigma,)).draw(numbers(3), 4000, dim)
            found = level_errors(denoiser_of(net), clean, *draws).square().mean().item()
            exact = (sigma**4 * distance**2 + std**4 * sigma**2 * dim) / (std**2 + sigma**2) ** 2
            assert found == pytest.approx(exact, rel=0.12), (sigma, distance)
