"""Stacked layers against PyTorch's own, and their initial values."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.blocks.layers import (
    MLP,
    LayerNorm,
    Linear,
    dropout,
    frozen_copy,
    mish,
    orthogonal,
    set_precision,
    sinusoidal_embedding,
)
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Rng, Stream


def init(seeds=(0, 1, 2)):
    return Rng.at_step(seeds, 0, Stream.INITIALISATION)


def inputs(*shape, seeds=(0, 1, 2)):
    return Rng.at_step(seeds, 0, Stream.TEST).normal(*shape)


def test_linear_is_a_matrix_product_for_each_seed():
    layer, x = Linear(init(), 4, 5), inputs(7, 4)
    for k in range(3):
        expected = x[k] @ layer.weight[k] + layer.bias[k]
        torch.testing.assert_close(layer(x)[k], expected)


def test_mish_and_its_slope_are_the_definition():
    x = torch.cat((torch.linspace(-30.0, 30.0, 2001), torch.tensor([-1e4, 1e4])))
    exact = x.double() * torch.tanh(torch.nn.functional.softplus(x.double()))
    assert torch.allclose(mish(x).double(), exact, rtol=3e-7, atol=0.0)
    slope = torch.func.grad(lambda v: mish(v).sum())(x)
    expected = torch.func.grad(lambda v: torch.nn.functional.mish(v).sum())(x.double())
    assert torch.allclose(slope.double(), expected, rtol=0.0, atol=5e-6)


def test_mixed_precision_rounds_the_operands_of_wide_products_only():
    net, x = MLP(init(), (5, 64, 64, 2)), inputs(7, 5)
    exact = net(x)
    set_precision(net, "mixed")

    def rounded(value):
        return value.bfloat16().float()

    first, second, last = net.layers
    hidden = torch.relu(x @ first.weight + first.bias.unsqueeze(1))
    product = rounded(rounded(hidden) @ rounded(second.weight))
    hidden = torch.relu(product + second.bias.unsqueeze(1))
    expected = hidden @ last.weight + last.bias.unsqueeze(1)
    assert net(x).dtype == torch.float32
    torch.testing.assert_close(net(x), expected, rtol=0.0, atol=2e-3)  # a sum on a rounding edge
    assert 0.0 < (net(x) - exact).abs().max() < 0.05

    grads, _ = gradients(net, lambda f: (f(x).square().mean(dim=(1, 2)), {}))
    set_precision(net, "float32")
    assert torch.equal(net(x), exact)
    wanted, _ = gradients(net, lambda f: (f(x).square().mean(dim=(1, 2)), {}))
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"float16.*expected float32, tf32 or mixed"):
        set_precision(MLP(init(), (5, 64, 2)), "float16")


@pytest.mark.parametrize("rows", [7, 32, 256])
@pytest.mark.parametrize("ensemble", [None, 2])
def test_a_scalar_output_is_the_same_alone_and_stacked_to_the_last_bit(rows, ensemble):
    stacked = Linear(init((4, 9, 1)), 256, 1, ensemble)
    solo = Linear(init((9,)), 256, 1, ensemble)
    shape = (rows, 256) if ensemble is None else (1, rows, 256)
    x, own = inputs(*shape, seeds=(4, 9, 1)), inputs(*shape, seeds=(9,))
    assert torch.equal(stacked(x)[1:2], solo(own))

    def loss(net, x):
        return gradients(net, lambda f: (f(x).square().flatten(1).mean(dim=1), {}))[0]

    for name, grad in loss(stacked, x).items():
        assert torch.equal(grad[1:2], loss(solo, own)[name]), name
    if ensemble is None:
        torch.testing.assert_close(stacked(x), x @ stacked.weight + stacked.bias.unsqueeze(1))


def test_ensemble_shares_its_input_and_keeps_extra_rows():
    layer, x = Linear(init(), 4, 5, ensemble=2), inputs(6, 7, 4)
    y = layer(x.unsqueeze(1))
    assert y.shape == (3, 2, 6, 7, 5)
    expected = torch.einsum("kcbi,keio->kecbo", x, layer.weight) + layer.bias[:, :, None, None]
    torch.testing.assert_close(y, expected)


def test_linear_starts_as_torch_does():
    layer = Linear(init(), 64, 500)
    for values in (layer.weight, layer.bias):
        assert values.abs().max() <= 1 / 8
        assert values.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)
    assert not layer.weight.requires_grad


def test_a_seeds_network_does_not_depend_on_its_stack():
    stacked, solo = MLP(init((4, 9)), (3, 16, 2)), MLP(init((9,)), (3, 16, 2))
    for mine, theirs in zip(stacked.parameters(), solo.parameters(), strict=True):
        assert torch.equal(mine[1:], theirs)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (5, 5)])
def test_orthogonal_matrices_are_orthogonal_and_do_not_depend_on_the_stack(shape):
    normal = inputs(*shape)
    matrix = orthogonal(normal, gain=2.0)
    assert matrix.shape == normal.shape
    tall = matrix if shape[0] >= shape[1] else matrix.mT
    eye = torch.eye(min(shape)).expand(3, -1, -1)
    torch.testing.assert_close(tall.mT @ tall, 4.0 * eye, atol=1e-5, rtol=0)
    assert torch.equal(orthogonal(normal[1:2], gain=2.0), matrix[1:2])


@pytest.mark.parametrize("ensemble", [None, 2])
def test_layer_norm_equals_torch_for_each_seed(ensemble):
    layer = LayerNorm(init(), 6, ensemble)
    shape = (5, 6) if ensemble is None else (2, 5, 6)
    x = inputs(*shape)
    layer.weight.copy_(inputs(*layer.weight.shape[1:]))
    layer.bias.copy_(0.5 * layer.weight)
    y = layer(x)
    flat = [(k, ()) for k in range(3)] if ensemble is None else [(0, (1,)), (2, (0,))]
    for k, e in flat:
        index = (k, *e)
        expected = torch.nn.functional.layer_norm(
            x[index], (6,), layer.weight[index], layer.bias[index]
        )
        torch.testing.assert_close(y[index], expected)


def test_mlp_is_linear_norm_activation():
    mlp, x = MLP(init(), (4, 8, 8, 2), "mish", layer_norm=True), inputs(5, 4)
    y = x
    for i, layer in enumerate(mlp.layers):
        y = layer(y)
        if i < 2:
            y = torch.nn.functional.mish(mlp.norms[i](y))
    torch.testing.assert_close(mlp(x), y, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_needs_an_rng():
    x = torch.ones(3, 1000, 20)
    rng = Rng.at_step((0, 1, 2), 5, Stream.TRAIN)
    dropped = dropout(x, 0.25, rng)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    mlp = MLP(init(), (4, 8, 2), dropout_rate=0.9)
    assert torch.equal(mlp(inputs(5, 4)), mlp(inputs(5, 4)))
    assert not torch.equal(mlp(inputs(5, 4)), mlp(inputs(5, 4), rng))


def test_sinusoidal_embedding_matches_its_formula_in_both_orders():
    t = torch.tensor([0, 1, 4])
    for cosines_first, gaps in ((False, 7), (True, 8)):
        frequencies = [math.exp(-k * math.log(10000) / gaps) for k in range(8)]
        for i, value in enumerate(t.tolist()):
            sines = [math.sin(value * f) for f in frequencies]
            cosines = [math.cos(value * f) for f in frequencies]
            expected = torch.tensor(cosines + sines if cosines_first else sines + cosines)
            torch.testing.assert_close(
                sinusoidal_embedding(t, 16, cosines_first)[i], expected, atol=1e-6, rtol=0
            )


def test_bandit_time_embedding_has_frequencies_one_and_1e_4():
    waves = sinusoidal_embedding(torch.tensor([3.0]), 4)[0]
    expected = [math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4)]
    torch.testing.assert_close(waves, torch.tensor(expected), atol=1e-7, rtol=1e-6)


def test_frozen_copy_has_its_own_storage():
    mlp = MLP(init(), (4, 8, 2))
    copy = frozen_copy(mlp)
    before = copy.layers[0].weight.clone()
    mlp.layers[0].weight.zero_()
    assert torch.equal(copy.layers[0].weight, before)


def test_normalizer_standardises_and_inverts():
    normalizer = Normalizer(3, (1.0, -2.0), (2.0, 0.0), eps=1e-3)
    x = torch.tensor([3.0, -2.0]).expand(3, 4, 2)
    torch.testing.assert_close(normalizer(x)[0, 0], torch.tensor([2.0 / 2.001, 0.0]))
    torch.testing.assert_close(normalizer.inverse(normalizer(x)), x)
    assert all(value.shape[0] == 3 for value in normalizer.state_dict().values())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        MLP(init(), (4, 8, 2), "swish")
    with pytest.raises(ValueError, match="at least one dimension of rows"):
        Linear(init(), 4, 2)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="time embedding of dimension 5"):
        sinusoidal_embedding(torch.zeros(1), 5)
    with pytest.raises(ValueError, match="2 means but 1"):
        Normalizer(1, (0.0, 0.0), (1.0,))
