"""DPM-Solver against the closed-form flow of a Gaussian, and its order of convergence."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.ddpm import Diffusion
from algorithms.blocks.dpm_solver import DpmSolver, orders_of
from algorithms.blocks.rng import Rng, Stream

MEAN = 0.3
FAR = torch.tensor([1e6])
CHAIN = Diffusion("linear_scaled", 1000)


def rng(step=0, seeds=(0, 1)):
    return Rng.at_step(seeds, step, Stream.TEST)


def exact_denoiser(solver, std):
    """E[noise | noisy] for clean ~ N(MEAN, std^2), at fractional levels as well."""

    def denoiser(noisy, level, obs):
        at = solver.instant((level.flatten()[0].item() + 1.0) / len(solver.log_alphas))
        variance = (at.alpha * std) ** 2 + at.sigma**2
        return at.sigma * (noisy - at.alpha * MEAN) / variance

    return denoiser


def largest_error(evaluations, std=0.2):
    solver = DpmSolver(CHAIN.alpha_bars, evaluations)
    obs = torch.zeros(2, 200, 1)
    actual = solver.sample(exact_denoiser(solver, std), obs, -FAR, FAR, rng())
    first, last = solver.steps[0][0], solver.steps[-1][-1]
    start = rng().normal(200, 1)
    spread = [math.hypot(at.alpha * std, at.sigma) for at in (first, last)]
    expected = last.alpha * MEAN + (start - first.alpha * MEAN) * spread[1] / spread[0]
    return (actual - expected).abs().max().item()


def test_fifteen_evaluations_follow_the_flow_of_a_gaussian():
    """Data narrower than the noise at the last step, which is of order one, come out narrower."""
    assert largest_error(15, std=1.0) < 0.03
    assert 0.1 < largest_error(15, std=0.2) < 0.2


def test_three_times_the_evaluations_leave_a_ninth_of_the_error_or_less():
    """The last steps are of order two and one and short; between them and order three it falls."""
    assert largest_error(90) < largest_error(30) / 9.0
    assert largest_error(30) < largest_error(15)


@pytest.mark.parametrize(
    ("evaluations", "orders"),
    [(15, [3, 3, 3, 3, 2, 1]), (3, [2, 1]), (4, [3, 1]), (5, [3, 2]), (16, [3] * 5 + [1])],
)
def test_evaluations_are_all_spent_on_the_highest_orders(evaluations, orders):
    assert orders_of(evaluations) == orders
    calls = []

    def denoiser(noisy, level, obs):
        calls.append(level.item())
        return noisy

    DpmSolver(CHAIN.alpha_bars, evaluations).sample(denoiser, torch.zeros(1, 1), -FAR, FAR, rng())
    assert len(calls) == evaluations == sum(orders)
    assert calls[0] == 999.0
    assert calls == sorted(calls, reverse=True)


def test_time_one_and_one_over_n_are_the_ends_of_the_chain():
    solver = DpmSolver(CHAIN.alpha_bars)
    for time, level in ((1.0, 999), (0.001, 0), (0.5, 499)):
        at = solver.instant(time)
        assert at.level == pytest.approx(level)
        assert at.alpha**2 == pytest.approx(CHAIN.alpha_bars[level].item(), rel=1e-6)
        assert at.alpha**2 + at.sigma**2 == pytest.approx(1.0)


def test_predictions_stand_for_clean_values_within_the_bounds():
    low, high = torch.tensor([-1.0]), torch.tensor([0.5])
    solver = DpmSolver(CHAIN.alpha_bars)
    wild = solver.sample(lambda x, t, obs: -50.0 - x, torch.zeros(2, 50, 1), low, high, rng())
    torch.testing.assert_close(wild, torch.full((2, 50, 1), 0.5), atol=0.03, rtol=0)


@pytest.mark.parametrize("evaluations", [2, 1001])
def test_impossible_numbers_of_evaluations_are_refused(evaluations):
    with pytest.raises(ValueError, match="expected between 3 and the length of the chain"):
        DpmSolver(CHAIN.alpha_bars, evaluations)
