"""Gradients, Adam and schedules against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.layers import MLP
from algorithms.blocks.optim import Adam, cosine_decay, global_norm, gradients
from algorithms.blocks.rng import Rng, Stream

SEEDS = (0, 1, 2)


def make(seeds=SEEDS):
    rng = Rng.at_step(seeds, 0, Stream.INITIALISATION)
    net = MLP(rng, (3, 8, 2))
    rng = Rng.at_step(seeds, 0, Stream.TEST)
    return net, rng.normal(20, 3), rng.normal(20, 2)


def squared_error(net, x, y):
    def loss(candidate):
        per_seed = (candidate(x) - y).square().mean(dim=(1, 2))
        return per_seed, {"loss": per_seed}

    return gradients(net, loss)


def torch_twin(net, k):
    """Seed k as ordinary PyTorch modules."""
    layers = []
    for layer in net.layers:
        linear = torch.nn.Linear(*layer.weight.shape[1:])
        linear.weight.data.copy_(layer.weight[k].T)
        linear.bias.data.copy_(layer.bias[k])
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_each_seed_follows_torch_adam_with_clipping(clip_norm, weight_decay):
    net, x, y = make()
    twins = [torch_twin(net, k) for k in range(3)]
    optimizers = [
        torch.optim.Adam(t.parameters(), lr=1e-2, weight_decay=weight_decay) for t in twins
    ]
    adam = Adam(net, 1e-2, weight_decay=weight_decay, clip_norm=clip_norm)
    for _ in range(30):
        grads, metrics = squared_error(net, x, y)
        norm = adam.step(net, grads)
        for k, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = (twin(x[k]) - y[k]).square().mean()
            loss.backward()
            expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm or math.inf)
            optimizer.step()
            torch.testing.assert_close(metrics["loss"][k], loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm[k], expected, rtol=1e-4, atol=1e-6)
    for k, twin in enumerate(twins):
        for mine, theirs in zip(net.layers, twin[::2], strict=True):
            torch.testing.assert_close(mine.weight[k].T, theirs.weight, rtol=0, atol=2e-5)


def test_first_step_equals_torch_to_seven_digits():
    net, x, y = make()
    twin = torch_twin(net, 1)
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-4)
    (twin(x[1]) - y[1]).square().mean().backward()
    optimizer.step()
    adam = Adam(net, 3e-4)
    adam.step(net, squared_error(net, x, y)[0])
    torch.testing.assert_close(net.layers[0].weight[1].T, twin[0].weight, rtol=1e-7, atol=1e-7)


def test_only_the_seed_above_the_norm_is_clipped():
    net, x, y = make()
    grads, _ = squared_error(net, x, y * torch.tensor([1.0, 1e3, 1.0])[:, None, None])
    free, _, _ = make()
    clipped = Adam(net, 1e-3, clip_norm=20.0)
    unclipped = Adam(free, 1e-3)
    clipped.step(net, grads)
    unclipped.step(free, grads)
    moment = clipped.get_buffer("mean/layers/0/weight") / unclipped.get_buffer(
        "mean/layers/0/weight"
    )
    norm = global_norm(grads)
    assert torch.equal(moment[[0, 2]], torch.ones_like(moment[[0, 2]]))
    torch.testing.assert_close(moment[1].mean(), 20.0 / (norm[1] + 1e-6), rtol=1e-5, atol=0)


def test_global_norm_is_the_length_of_all_gradients_together():
    grads = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[0.0, 4.0], [1.0, 0.0]])}
    assert global_norm(grads).tolist() == [5.0, 1.0]


def test_lr_scale_scales_each_seeds_step():
    net, x, y = make()
    other, _, _ = make()
    before = net.layers[0].weight.clone()
    grads, _ = squared_error(net, x, y)
    Adam(net, 1e-3).step(net, grads)
    Adam(other, 1e-3).step(other, grads, lr_scale=torch.tensor([1.0, 0.5, 0.0]))
    full, scaled = net.layers[0].weight - before, other.layers[0].weight - before
    torch.testing.assert_close(scaled[1], full[1] / 2, rtol=1e-3, atol=1e-7)
    assert torch.equal(scaled[2], torch.zeros_like(scaled[2]))


def test_nan_in_one_seed_leaves_the_others_untouched():
    net, x, y = make()
    healthy, _, _ = make()
    grads, _ = squared_error(net, x, y)
    sick = {name: grad.clone() for name, grad in grads.items()}
    for grad in sick.values():
        grad[1] = float("nan")
    Adam(net, 1e-3, clip_norm=1.0).step(net, sick)
    Adam(healthy, 1e-3, clip_norm=1.0).step(healthy, grads)
    assert net.layers[0].weight[1].isnan().all()
    assert torch.equal(net.layers[0].weight[[0, 2]], healthy.layers[0].weight[[0, 2]])


def test_cosine_decay_falls_from_one_to_zero():
    factor = cosine_decay(torch.tensor([0, 25, 50, 100, 200]), 100)
    expected = torch.tensor([1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0, 0.0])
    torch.testing.assert_close(factor, expected)


def test_clip_norm_zero_is_refused():
    with pytest.raises(ValueError, match="clip_norm is 0"):
        Adam(make()[0], 1e-3, clip_norm=0)
