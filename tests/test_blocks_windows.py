"""Windows: where they start, and the way to a vector and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.blocks.rng import Rng, Stream
from algorithms.blocks.windows import WindowCoder, window_starts
from algorithms.testing import TinyDataset

# Episodes as (length, how it ends): terminal, truncated, or just the end of the data.
EPISODES = st.lists(st.tuples(st.integers(1, 9), st.sampled_from("TUE")), min_size=1, max_size=7)


@given(EPISODES, st.integers(1, 6), st.integers(1, 5))
def test_starts_follow_the_rule_and_no_window_crosses_a_border(episodes, length, stride):
    number = np.repeat(np.arange(len(episodes)), [n for n, _ in episodes])
    last = np.cumsum([n for n, _ in episodes]) - 1
    terminated, truncated = np.zeros(len(number)), np.zeros(len(number))
    terminated[last[[end == "T" for _, end in episodes]]] = 1.0
    truncated[last[[end == "U" for _, end in episodes]]] = 1.0
    inside = [i for i in range(len(number) - length + 1) if number[i] == number[i + length - 1]]
    expected = set(inside[::stride])
    expected |= {i for i in inside if i == 0 or number[i - 1] != number[i]}
    expected |= {i for i in inside if terminated[i + length - 1]}
    expected -= {i for i in inside if truncated[i + length - 1]}
    lengths = [n for n, _ in episodes]
    found = window_starts(lengths, terminated, truncated, length, stride)
    assert found.tolist() == sorted(expected)
    assert not terminated[found[:, None] + np.arange(length - 1)].any(), "terminal rows are last"


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="stride 0; expected at least 1"):
        window_starts([3], np.zeros(3), np.zeros(3), 2, 0)
    with pytest.raises(ValueError, match="expected step or next_obs"):
        coder(TinyDataset(), "both")


def coder(dataset, final_row="step"):
    width = dataset.spec.obs_dim + dataset.spec.action_dim + 2
    mean = torch.linspace(-0.5, 0.5, width).expand(2, -1)
    return WindowCoder(dataset.spec, mean, 0.5 + mean.abs(), final_row)


def segment(dataset, length):
    return dataset.segments(Rng.at_step([0, 1], 0, Stream.TEST), 40, length)


def test_a_window_of_l_steps_comes_back_as_its_first_l_minus_1_transitions():
    dataset = TinyDataset()
    dataset.spec = replace(dataset.spec, action_low=(-2.0, -1.0), action_high=(1.0, 3.0))
    dataset.action = 0.9 * dataset.action
    windows = coder(dataset)
    batch = segment(dataset, 4)
    rows = windows.encode(batch)
    assert rows.shape == (2, 40, 4, 7)
    decoded = windows.decode(rows)
    for name in ("obs", "action", "reward", "next_obs", "terminated"):
        expected = getattr(batch, name)[:, :, :-1]
        torch.testing.assert_close(getattr(decoded, name), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(decoded.next_obs[:, :, :-1], decoded.obs[:, :, 1:])
    assert decoded.truncated[:, :, -1].min() == 1.0, "a window ends without an end"
    assert torch.equal(windows.has_action(4), torch.ones(4))


def test_with_next_obs_every_step_comes_back_also_the_terminal_one():
    dataset = TinyDataset()
    windows = coder(dataset, "next_obs")
    batch = segment(dataset, windows.steps(4))
    assert batch.terminated[:, :, -1].sum() > 0
    rows = windows.encode(batch)
    assert rows.shape == (2, 40, 4, 7)
    assert not rows[:, :, -1, 3:].any(), "the last row is an observation and nothing else"
    decoded = windows.decode(rows)
    for name in ("obs", "reward", "next_obs", "terminated"):
        found, expected = getattr(decoded, name), getattr(batch, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(decoded.truncated[:, :, -1], 1.0 - batch.terminated[:, :, -1])
    assert windows.has_action(4).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_actions_survive_up_to_the_limit_and_stay_inside_beyond_it():
    dataset = TinyDataset(bound=1.0)
    windows = coder(dataset)
    batch = segment(dataset, 4)
    for value, tolerance in ((0.999, 1e-3), (1.0, 1.1e-3)):
        action = torch.full_like(batch.action, value)
        decoded = windows.decode(windows.encode(replace(batch, action=action))).action
        torch.testing.assert_close(decoded, action[:, :, :-1], rtol=0.0, atol=tolerance)
    wild = windows.decode(1e6 * torch.ones(2, 3, 4, 7)).action
    assert wild.abs().max() <= 1.0
