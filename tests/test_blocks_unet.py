"""The temporal U-Net against PyTorch's own layers and the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from algorithms.blocks.rng import Rng, Stream
from algorithms.blocks.unet import GROUPS, Convolution, GroupNorm, UNet


def rng(seeds=(0,)):
    return Rng.at_step(seeds, 0, Stream.TEST)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_convolution_is_pytorchs_with_zeros_around(kernel):
    layer = Convolution(rng((3, 5)), 4, 6, kernel)
    x = rng((1, 2)).normal(5, 8, 4)
    for k in range(2):
        weight = layer.linear.weight[k].view(kernel, 4, 6).permute(2, 1, 0)
        padded = functional.pad(x[k].mT, ((kernel - 1) // 2, kernel // 2))
        expected = functional.conv1d(padded, weight, layer.linear.bias[k]).mT
        torch.testing.assert_close(layer(x)[k], expected, rtol=1e-5, atol=1e-6)


def test_group_norm_is_pytorchs():
    x = 3.0 + 2.0 * rng((1, 2)).normal(5, 6, 16)
    layer = GroupNorm(rng((3, 5)), 16)
    layer.weight.copy_(rng((7, 8)).normal(1, 1, 16))
    layer.bias.copy_(rng((9, 10)).normal(1, 1, 16))
    for k in range(2):
        weight, bias = layer.weight[k].flatten(), layer.bias[k].flatten()
        expected = functional.group_norm(x[k].mT, GROUPS, weight, bias, eps=1e-6).mT
        torch.testing.assert_close(layer(x)[k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "millions"), [(64, 0.70), (128, 2.80), (256, 11.14)])
def test_the_number_of_parameters_is_the_official_networks(width, millions):
    network = UNet(rng(), 25, width)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_seeds_and_windows_do_not_see_each_other_and_the_level_matters():
    network = UNet(rng((0, 1)), 5, 16)
    x, level = rng((4, 4)).normal(3, 8, 5), torch.tensor([[0.1, 0.2, 0.3]] * 2)
    out = network(x, level)
    assert out.shape == x.shape
    assert not torch.equal(out[0], out[1])
    changed = x.clone()
    changed[0, 1] += 1.0
    again = network(changed, level)
    assert torch.equal(again[1], out[1])
    assert torch.equal(again[0, [0, 2]], out[0, [0, 2]])
    assert not torch.equal(network(x, level + 1.0), out)
    common = network(x, torch.full((1, 1, 1), 0.2))
    torch.testing.assert_close(common[:, 1], out[:, 1])


def test_a_step_at_the_end_reaches_the_prediction_at_the_start():
    network = UNet(rng(), 5, 16)
    x = rng().normal(1, 8, 5)
    changed = x.clone()
    changed[:, :, -1] += 1.0
    level = torch.zeros(1, 1)
    assert not torch.equal(network(x, level)[:, :, 0], network(changed, level)[:, :, 0])


def test_widths_and_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="width 24"):
        UNet(rng(), 5, 24)
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(rng(), 5, 16)(torch.zeros(1, 2, 6, 5), torch.zeros(1, 1))
