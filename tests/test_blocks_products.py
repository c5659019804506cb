"""Products through oneDNN: the numbers of torch.matmul, seed by seed, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from algorithms.blocks import products
from algorithms.blocks.layers import MLP
from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Rng, Stream

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture(params=products.LIBRARIES)
def chosen(request, monkeypatch):
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setenv(products.VARIABLE, request.param)
    products.library.cache_clear()
    yield request.param
    monkeypatch.undo()
    products.library.cache_clear()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("lead_a", "lead_b"),
    [((), ()), ((1,), (1,)), ((3,), (3,)), ((3, 1), (3, 2)), ((1, 2), (3, 2))],
)
def test_products_are_those_of_double_precision(chosen, lead_a, lead_b):
    a, b = normal(*lead_a, 300, 70), normal(*lead_b, 70, 90, seed=1)
    assert products.MIN_WORK < 300 * 70 * 90
    with torch.no_grad():
        found = products.matmul(a, b)
        transposed = products.matmul(a.mT.contiguous().mT, b.mT.contiguous().mT)
        parts = products.matmul(torch.cat([a, a], -1)[..., :70], torch.cat([b, b], -1)[..., 90:])
        expanded = products.matmul(a[..., :1].expand_as(a), b[..., :1].expand_as(b))
    exact = a.double() @ b.double()
    assert found.dtype == torch.float32
    for value in (found, transposed, parts):
        torch.testing.assert_close(value.double(), exact, rtol=0.0, atol=1e-4)
    row = a[..., :1].double() * b[..., :1].double().sum(dim=-2, keepdim=True)
    torch.testing.assert_close(expanded.double(), row.expand_as(exact), rtol=0.0, atol=1e-3)


@needs_onednn
def test_a_product_is_the_same_alone_and_stacked_to_the_last_bit():
    a, b = normal(5, 256, 128), normal(5, 128, 96, seed=1)
    stacked = torch.ops.offline_rl_harness.product(a, b)
    for seed in range(5):
        alone = torch.ops.offline_rl_harness.product(a[seed : seed + 1], b[seed : seed + 1])
        assert torch.equal(stacked[seed : seed + 1], alone)
        assert torch.equal(stacked[seed], torch.ops.offline_rl_harness.product(a[seed], b[seed]))


def test_narrow_products_and_those_that_need_a_gradient_stay_with_torch(chosen):
    narrow, wide, weight = normal(2, 8, 128), normal(2, 256, 128), normal(2, 128, 128, seed=1)
    with torch.no_grad():
        assert torch.equal(products.matmul(narrow, weight), narrow @ weight)
    weight.requires_grad_()
    (found,) = torch.autograd.grad(products.matmul(wide, weight).sum(), weight)
    torch.testing.assert_close(found, wide.sum(dim=1).unsqueeze(-1).expand_as(found).contiguous())


@needs_onednn
def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        torch.ops.offline_rl_harness.product(normal(3, 4, 5), normal(3, 5, 6))
    assert counter.get_total_flops() == 2 * 3 * 4 * 5 * 6


def test_an_unknown_library_is_refused(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "eigen")
    products.library.cache_clear()
    with pytest.raises(ValueError, match="HARNESS_CPU_PRODUCTS is 'eigen'; expected mkl or onednn"):
        products.library()
    products.library.cache_clear()


def test_a_compiled_gradient_is_the_eager_one_and_its_products_are_the_chosen_ones(chosen):
    net = MLP(Rng.at_step((3, 8), 0, Stream.INITIALISATION), (128, 128, 128))
    x = normal(2, 128, 128)

    def step(x):
        return gradients(net, lambda f: (f(x).square().mean(dim=(1, 2)), {}))[0]

    with torch.no_grad():
        wanted = step(x)
        torch._dynamo.reset()
        compiled = products.compiled(step, fullgraph=True, dynamic=False)
        found = compiled(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(x)
    for name, value in wanted.items():
        assert value.abs().max() > 1e-4, name
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    calls = {row.key: row.count for row in profile.key_averages()}
    # Two layers forward, the weights of both and the input of the second backward.
    assert calls.get("offline_rl_harness::product", 0) == (5 if chosen == "onednn" else 0)
