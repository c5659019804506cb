"""Philox against published answers; draws against their distributions and their independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from algorithms.blocks import rng as rng_module
from algorithms.blocks.rng import Rng, RowRng, Stream, philox

ONES = 0xFFFFFFFF
# Random123 (github.com/DEShawResearch/random123), tests/kat_vectors, the "philox4x32 10" lines.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def at(seed=0, step=0, stream=Stream.TEST, substep=0) -> Rng:
    return Rng(torch.tensor([seed]), torch.tensor([step]), stream, substep)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("kind", ["tensor", "int"])
def test_philox_gives_the_published_answers(counter, key, expected, kind):
    if kind == "tensor":
        counter, key = [torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key]
    words = philox(tuple(counter), tuple(key))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@given(st.sampled_from(rng_module._MULTIPLIERS), st.lists(st.integers(0, ONES), min_size=1))
def test_multiply_gives_both_words_of_the_full_product(constant, values):
    high, low = rng_module._multiply(constant, torch.tensor(values))
    assert high.tolist() == [constant * v >> 32 for v in values]
    assert low.tolist() == [constant * v & ONES for v in values]


def draws(rng: Rng) -> list[torch.Tensor]:
    return [rng.uniform(7), rng.normal(3, 5), rng.integers(1000, 4), rng.uniform()]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, ONES), min_size=1, max_size=5), st.integers(0, ONES), st.integers(0, 9)
)
def test_a_seed_draws_the_same_alone_and_in_any_stack(seeds, step, substep):
    steps = torch.full((len(seeds),), step)
    stacked = draws(Rng(torch.tensor(seeds), steps, Stream.TRAIN, substep))
    for i, seed in enumerate(seeds):
        alone = draws(at(seed, step, Stream.TRAIN, substep))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(stacked, alone, strict=True))


def test_shapes_are_led_by_the_seeds():
    rng = Rng.at_step([1, 2], 0, Stream.TEST)
    assert [tuple(d.shape) for d in draws(rng)] == [(2, 7), (2, 3, 5), (2, 4), (2,)]
    assert rng.uniform(0).shape == (2, 0)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(at().normal(100)[:, :7], at().normal(7))


@pytest.mark.slow
def test_compiled_draws_equal_eager_draws():
    def draw(seeds, step):
        rng = Rng(seeds, step, Stream.TRAIN)
        return rng.integers(2_000_000, 33), rng.uniform(50), rng.normal(333)

    torch._dynamo.reset()
    seeds, step = torch.tensor([0, 5, ONES]), torch.full((3,), 41_200)
    eager = draw(seeds, step)
    compiled = torch.compile(draw, fullgraph=True)(seeds, step)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])
    torch.testing.assert_close(eager[2], compiled[2], rtol=0, atol=2e-6)


def test_uniform_is_uniform():
    sample = at(1).uniform(200_000)[0].numpy()
    assert sample.min() >= 0.0
    assert sample.max() < 1.0
    assert stats.kstest(sample, "uniform").pvalue > 1e-3


def test_normal_is_standard_normal():
    sample = at(2).normal(200_000)[0].double().numpy()
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(sample.mean()) < 4 / 200_000**0.5
    assert abs((sample**4).mean() - 3.0) < 0.1
    assert np.abs(sample).max() < 6.7


def test_normal_is_finite_at_the_extreme_words(monkeypatch):
    words = torch.tensor([[0, ONES, 0, ONES]]), torch.tensor([[0, 0, ONES, ONES]])
    rng = at()
    monkeypatch.setattr(rng, "words", lambda count: words)
    sample = rng.normal(4)
    assert torch.isfinite(sample).all()
    assert sample[0, 0].item() == pytest.approx((2 * 32 * np.log(2)) ** 0.5, rel=1e-6)
    assert sample[0, 1].item() == 0.0


@pytest.mark.parametrize("high", [1, 2, 7, 100])
def test_integers_are_uniform_over_their_range(high):
    sample = at(3).integers(high, 100_000)[0].numpy()
    assert sample.min() == 0
    assert sample.max() == high - 1
    if high > 1:
        assert stats.chisquare(np.bincount(sample, minlength=high)).pvalue > 1e-3


@given(st.integers(0, ONES), st.integers(0, ONES), st.integers(1, 2**31))
def test_integers_scale_a_64_bit_word_exactly(first, second, high):
    rng = at()
    rng.words = lambda count: (torch.tensor([[first]]), torch.tensor([[second]]))
    assert rng.integers(high, 1).item() == ((first << 32) + second) * high >> 64


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 1}, {"seed": 2}),
        ({"step": 1}, {"step": 2}),
        ({"substep": 0}, {"substep": 1}),
        ({"stream": Stream.TRAIN}, {"stream": Stream.EVALUATION}),
        ({"seed": 1, "step": 2}, {"seed": 2, "step": 1}),
    ],
)
def test_numbers_made_elsewhere_are_independent(one, other):
    a, b = (at(**where).normal(50_000)[0].numpy() for where in (one, other))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 50_000**0.5


def test_two_calls_of_one_step_are_independent():
    rng = at()
    a, b = rng.normal(50_000)[0].numpy(), rng.normal(50_000)[0].numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 50_000**0.5
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 4 / 50_000**0.5


def test_substeps_may_be_tensors():
    assert torch.equal(at(substep=torch.tensor(3)).uniform(5), at(substep=3).uniform(5))
    assert torch.equal(at(substep=torch.tensor([3])).uniform(5), at(substep=3).uniform(5))


def row_normals(episodes, substeps, seeds=(4, 5)):
    seeds = torch.tensor(seeds)
    episode, substep = (torch.tensor([x] * len(seeds)) for x in (episodes, substeps))
    rng = RowRng(seeds, torch.full_like(seeds, 9), Stream.EVALUATION, episode, substep)
    return torch.cat([rng.normal(len(episodes), 3), rng.normal(len(episodes), 2)], dim=-1)


def test_a_rows_numbers_follow_its_episode_wherever_it_sits():
    together = row_normals([0, 1, 2], [5, 0, 7])
    assert torch.equal(row_normals([2, 0], [7, 5]), together[:, [2, 0]])
    assert torch.equal(row_normals([1], [0], seeds=(5,)), together[1:, 1:2])
    assert len(row_normals([0, 0, 1], [0, 1, 0]).flatten().unique()) == 30


def test_draws_not_led_by_the_rows_are_refused():
    seeds = torch.tensor([0])
    rng = RowRng(
        seeds, seeds, Stream.EVALUATION, torch.zeros(1, 2).long(), torch.zeros(1, 2).long()
    )
    with pytest.raises(ValueError, match="must be led by the N = 2 rows"):
        rng.normal(5, 2)


def test_wrong_arguments_are_refused():
    seeds = torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"seeds is torch\.float32; expected an int64"):
        Rng(seeds.float(), seeds, Stream.TEST)
    with pytest.raises(TypeError, match="step is int; expected an int64"):
        Rng(seeds, 3, Stream.TEST)
    with pytest.raises(ValueError, match=r"expected both to be \[K\]"):
        Rng(seeds, seeds[:1], Stream.TEST)
    with pytest.raises(ValueError, match="not all in"):
        Rng.at_step([-1], 0, Stream.TEST)
    with pytest.raises(ValueError, match="high is 0"):
        at().integers(0, 3)
