"""The diffusion block against the published constants and the posterior of a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.ddpm import (
    Diffusion,
    NoiseNet,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    vp_betas,
)
from algorithms.blocks.rng import Rng, Stream

# Diffusion-QL's VP schedule for five steps, computed from the formula by hand.
TABLE = {
    "alphas": (0.804125, 0.541182, 0.364219, 0.245122, 0.164969),
    "betas": (0.195875, 0.458818, 0.635781, 0.754878, 0.835031),
    "alpha_bars": (0.804125, 0.435178, 0.158500, 0.038852, 0.006409),
    "noisy_scale": (1.115162, 1.515886, 2.511801, 5.073343, 12.490895),
    "noise_scale": (0.493545, 1.139259, 2.304158, 4.973812, 12.450802),
    "clean_coef": (1.000000, 0.728435, 0.498410, 0.312681, 0.165654),
    "noisy_coef": (0.000000, 0.255116, 0.405078, 0.433466, 0.392901),
    "posterior_var": (0.0, 0.159114, 0.426742, 0.660907, 0.807766),
}
LOW, HIGH = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])


def rng(step=0, seeds=(0, 1)):
    return Rng.at_step(seeds, step, Stream.TEST)


@pytest.mark.parametrize("name", TABLE)
def test_vp_constants_equal_the_table(name):
    values = getattr(Diffusion("vp", 5), name)
    # Half a unit in the sixth decimal; the large ones carry float32 rounding.
    torch.testing.assert_close(values, torch.tensor(TABLE[name]), atol=6e-7, rtol=1e-7)


@pytest.mark.parametrize("denoise_steps", [1, 5, 50])
def test_vp_ends_at_the_same_noise_whatever_the_length(denoise_steps):
    last = torch.cumprod(1 - vp_betas(denoise_steps), 0)[-1]
    assert last.item() == pytest.approx(math.exp(-5.05))


def test_linear_schedule_spans_its_ends():
    betas = linear_betas(1000)
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((1e-4, 2e-2))


def test_scaled_linear_schedule_has_about_the_same_total_noise_at_any_length():
    assert torch.equal(scaled_linear_betas(1000), linear_betas(1000))
    betas = scaled_linear_betas(100)
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((1e-3, 0.2))
    assert betas.sum().item() == pytest.approx(linear_betas(1000).sum().item())
    with pytest.raises(ValueError, match="linear_scaled needs more than 20"):
        scaled_linear_betas(20)


def test_cosine_schedule_follows_the_papers_grid():
    steps, offset = 8, 0.008

    def alpha_bar(t):
        return math.cos((t / steps + offset) / (1 + offset) * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t + 1) / alpha_bar(t), 0.999) for t in range(steps)]
    torch.testing.assert_close(cosine_betas(steps), torch.tensor(expected, dtype=torch.float64))


def test_add_noise_mixes_by_level():
    diffusion = Diffusion("vp", 5)
    clean, noise = torch.ones(1, 2, 1), torch.full((1, 2, 1), 2.0)
    noisy = diffusion.add_noise(clean, torch.tensor([[0, 4]]), noise)
    expected = [
        math.sqrt(0.804125) + 2 * math.sqrt(0.195875),
        math.sqrt(0.006409) + 2 * math.sqrt(0.993591),
    ]
    torch.testing.assert_close(noisy.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)


def test_denoise_inverts_add_noise():
    diffusion = Diffusion("vp", 5)
    clean, noise = rng().normal(6, 2), rng(1).normal(6, 2)
    for t in range(5):
        noisy = diffusion.add_noise(clean, torch.full((2, 6), t), noise)
        torch.testing.assert_close(diffusion.denoise(noisy, t, noise), clean, atol=2e-5, rtol=0)


def test_noise_loss_of_an_oracle_is_the_mean_square_of_the_noise():
    diffusion = Diffusion("vp", 5)
    clean = torch.zeros(2, 4000, 2)

    def zero(noisy, t, obs):
        return torch.zeros_like(noisy)

    def oracle(noisy, t, obs):  # clean is 0, so the noise is known
        return noisy / (1 - diffusion.alpha_bars[t]).sqrt().unsqueeze(-1)

    obs = torch.zeros(2, 4000, 1)
    torch.testing.assert_close(
        diffusion.noise_loss(zero, clean, obs, rng()), torch.ones(2), atol=0.06, rtol=0
    )
    assert diffusion.noise_loss(oracle, clean, obs, rng()).max() < 1e-10


@pytest.mark.parametrize(("schedule", "steps"), [("vp", 5), ("vp", 50), ("cosine", 20)])
def test_chain_with_the_exact_denoiser_of_a_gaussian_has_its_closed_form(schedule, steps):
    """For clean ~ N(mean, std**2) the best denoiser is linear, so mean and variance recur."""
    diffusion = Diffusion(schedule, steps)
    mean, std = 0.3, 0.1

    def exact(noisy, t, obs):
        alpha_bar = diffusion.alpha_bars[t].unsqueeze(-1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (noisy - alpha_bar.sqrt() * mean) / variance

    sample = diffusion.sample(exact, torch.zeros(2, 20_000, 1), LOW, HIGH, rng())

    alphas = diffusion.alphas.double().tolist()
    bars = diffusion.alpha_bars.double().tolist()
    m, v = 0.0, 1.0
    for t in reversed(range(steps)):
        bar, previous = bars[t], bars[t - 1] if t else 1.0
        gain = math.sqrt(bar) * std**2 / (bar * std**2 + 1 - bar)  # E[clean | noisy], regression
        clean_coef = (1 - alphas[t]) * math.sqrt(previous) / (1 - bar)
        noisy_coef = (1 - previous) * math.sqrt(alphas[t]) / (1 - bar)
        slope = clean_coef * gain + noisy_coef
        m = slope * m + clean_coef * (mean - gain * math.sqrt(bar) * mean)
        v = slope**2 * v + (1 - alphas[t]) * (1 - previous) / (1 - bar)
    assert sample.mean().item() == pytest.approx(m, abs=0.002)
    assert sample.std().item() == pytest.approx(math.sqrt(v), rel=0.02)
    assert m == pytest.approx(mean, abs=0.01)


def test_sampler_follows_the_recurrence_written_out():
    diffusion = Diffusion("vp", 5)

    def denoiser(noisy, t, obs):
        return 0.3 * noisy + 0.05 * t.unsqueeze(-1)

    obs = torch.zeros(2, 6, 1)
    noise = rng().normal(6, 5, 2)  # levels behind rows
    x = noise[..., 0, :]
    for t in (4, 3, 2, 1, 0):
        clean = TABLE["noisy_scale"][t] * x - TABLE["noise_scale"][t] * (0.3 * x + 0.05 * t)
        x = TABLE["clean_coef"][t] * clean.clamp(-1, 1) + TABLE["noisy_coef"][t] * x
        if t:
            x = x + math.sqrt(TABLE["posterior_var"][t]) * noise[..., 5 - t, :]
    torch.testing.assert_close(
        diffusion.sample(denoiser, obs, LOW, HIGH, rng()), x.clamp(-1, 1), atol=1e-4, rtol=0
    )


def test_gradient_flows_through_the_whole_chain():
    diffusion = Diffusion("vp", 5)

    def value(scale):
        def denoiser(noisy, t, obs):
            return scale[t.flatten()[0]] * noisy

        obs = torch.zeros(2, 50, 1)
        return diffusion.sample(denoiser, obs, LOW, HIGH, rng()).sum()

    scale = torch.full((5,), 0.9, requires_grad=True)
    value(scale).backward()
    assert (scale.grad != 0).all()


def test_clipping_stops_the_gradient_where_it_saturates():
    diffusion = Diffusion("vp", 1)
    shift = torch.tensor(100.0, requires_grad=True)
    obs = torch.zeros(2, 50, 1)
    sample = diffusion.sample(lambda x, t, o: x + shift, obs, LOW, HIGH, rng())
    sample.sum().backward()
    assert (sample == -1).all()
    assert shift.grad.item() == 0.0


def test_noise_net_accepts_levels_per_row_or_shared():
    net = NoiseNet(Rng.at_step((0, 1), 0, Stream.INITIALISATION), 3, 2, (16, 16))
    noisy, obs = rng().normal(4, 2), rng(1).normal(4, 3)
    shared = net(noisy, torch.full((1, 1), 3), obs)
    torch.testing.assert_close(shared, net(noisy, torch.full((2, 4), 3), obs))
    assert not torch.equal(shared, net(noisy, torch.full((2, 4), 2), obs))


def test_published_network_has_the_published_size():
    net = NoiseNet(Rng.at_step((0,), 0, Stream.INITIALISATION), 17, 6)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1.44e5, rel=0.01)


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match="unknown schedule 'sine'; known: vp, linear, linear_scaled, cosine"
    ):
        Diffusion("sine", 5)
    with pytest.raises(ValueError, match="denoise_steps is 0"):
        Diffusion("vp", 0)
