"""What a learner draws: borders, real successors, transforms in closed form, statistics."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.api import Batch, Dataset
from algorithms.blocks.windows import window_starts
from harness.datasets import DatasetError, DataSpec, load
from harness.datasets.buffers import TransitionDataset, _ends_by_length
from harness.datasets.data_spec import held_out_episodes
from harness.datasets.layout import Leaf
from harness.datasets.minari import RawDataset

REAL = Path(__file__).parents[2] / "shared" / "data" / "minari"
needs_real_data = pytest.mark.skipif(
    not (REAL / "surrogate").is_dir(), reason="the reference datasets are not on this machine"
)
FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


class Draws:
    """An `Rng` for tests: K seeds, each with a generator of its own."""

    def __init__(self, seeds: int = 2) -> None:
        self.generators = [torch.Generator().manual_seed(s) for s in range(seeds)]
        self.step = torch.zeros(seeds, dtype=torch.int64)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.generators])

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])


class Everything(Draws):
    """Returns 0, 1, 2, ... instead of random numbers: a batch of every possible draw."""

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        self.high = high
        count = int(np.prod(shape))
        return (torch.arange(count) % high).view(1, *shape)


def raw_of(
    lengths: list[int], ends: str, rewards: np.ndarray | None = None, **more: Any
) -> RawDataset:
    """Observation rows (episode, time), so that a border shows in the numbers.

    Args:
        ends: one letter per episode: T terminated, L time limit, B both.
    """
    total = sum(lengths)
    obs = np.concatenate(
        [np.stack([np.full(n + 1, e), np.arange(n + 1)], 1) for e, n in enumerate(lengths)]
    )
    terminated, truncated = np.zeros(total, bool), np.zeros(total, bool)
    last = np.cumsum(lengths) - 1
    terminated[last] = [letter in "TB" for letter in ends]
    truncated[last] = [letter in "LB" for letter in ends]
    rng = np.random.default_rng(0)
    return RawDataset(
        id="tiny/a-v0",
        digest="0" * 64,
        obs=obs.astype(np.float32),
        action=rng.uniform(-1, 1, (total, 1)).astype(np.float32),
        reward=rng.normal(size=total) if rewards is None else np.asarray(rewards, np.float64),
        terminated=terminated,
        truncated=truncated,
        lengths=np.asarray(lengths),
        action_low=np.full(1, -1.0, np.float32),
        action_high=np.full(1, 1.0, np.float32),
        leaves=(Leaf((), (2,)),),
        metadata={},
        **more,
    )


def brute_force(raw: RawDataset, drop: bool) -> list[tuple[float, ...]]:
    """Every transition as (obs, next_obs, action, reward, terminated, truncated), by a loop."""
    rows, step, row = [], 0, 0
    for length in raw.lengths:
        for t in range(length):
            flags = (float(raw.terminated[step]), float(raw.truncated[step]))
            if not (drop and flags[1]):
                rows.append(
                    (
                        *raw.obs[row + t].tolist(),
                        *raw.obs[row + t + 1].tolist(),
                        *raw.action[step].tolist(),
                        float(np.float32(raw.reward[step])),
                        *flags,
                    )
                )
            step += 1
        row += length + 1
    return rows


def rows_of(batch: Batch) -> list[tuple[float, ...]]:
    columns = [
        batch.obs,
        batch.next_obs,
        batch.action,
        *(getattr(batch, n).unsqueeze(-1) for n in ("reward", "terminated", "truncated")),
    ]
    return [tuple(row) for row in torch.cat(columns, -1)[0].tolist()]


episodes = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from("TLB")), min_size=1, max_size=6
).filter(lambda es: any(n > 1 or end == "T" for n, end in es))


@given(episodes, st.sampled_from(["drop", "keep"]))
@settings(max_examples=60, deadline=None)
def test_transitions_are_exactly_those_of_a_loop_over_episodes(
    shape: list[tuple[int, str]], last: str
) -> None:
    raw = raw_of([n for n, _ in shape], "".join(e for _, e in shape))
    dataset = TransitionDataset.from_raw(raw, DataSpec(truncated_last_step=last))
    expected = brute_force(raw, last == "drop")
    assert dataset.spec.num_steps == len(expected)
    assert rows_of(dataset.transitions(Everything(1), len(expected))) == expected


@given(episodes, st.sampled_from(["drop", "keep"]))
@settings(max_examples=60, deadline=None)
def test_next_actions_are_those_of_a_loop_and_zero_where_an_episode_ends(
    shape: list[tuple[int, str]], last: str
) -> None:
    raw = raw_of([n for n, _ in shape], "".join(e for _, e in shape))
    dataset = TransitionDataset.from_raw(raw, DataSpec(truncated_last_step=last))
    expected, step = [], 0
    for length in raw.lengths:
        for t in range(length):
            if not (last == "drop" and raw.truncated[step]):
                after = raw.action[step + 1].tolist() if t + 1 < length else [0.0]
                expected.append(after)
            step += 1
    batch = dataset.transitions(Everything(1), len(expected), next_action=True)
    assert batch.next_action is not None
    assert batch.next_action[0].tolist() == expected
    assert dataset.transitions(Everything(1), 1).next_action is None


def test_mixed_batches_hold_next_actions_only_if_the_synthetic_rows_do() -> None:
    raw = raw_of([4, 3], "TL")
    real = TransitionDataset.from_raw(raw, DataSpec())
    rows = real.transitions(Everything(1), 5, next_action=True)
    mixed = real.mixed(rows, 0.5).transitions(Everything(1), 4, next_action=True)
    assert mixed.next_action is not None
    assert torch.equal(mixed.next_action[0, :2], real.next_action[:2])
    assert torch.equal(mixed.next_action[0, 2:], real.next_action[:2])
    bare = real.transitions(Everything(1), 5)
    with pytest.raises(ValueError, match="next actions were asked for"):
        real.mixed(bare, 0.5).transitions(Everything(1), 4, next_action=True)
    assert real.mixed(rows, 0.5).transitions(Everything(1), 4).next_action is None


@given(episodes, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_pieces_by_length_are_those_of_a_loop(shape: list[tuple[int, str]], limit: int) -> None:
    raw = raw_of([n for n, _ in shape], "".join(e for _, e in shape))
    expected, count = [], 0
    for i, ended in enumerate(raw.terminated):
        count += 1
        if ended or count == limit:
            expected.append(i)
            count = 0
    assert _ends_by_length(raw.terminated, limit).tolist() == expected


def test_trajectory_range_is_of_what_can_be_drawn_of_each_episode() -> None:
    """Episode returns 1 + 2, 4 and 1 (its last step of 100 is dropped): the range is 3."""
    raw = raw_of([2, 1, 2], "TTL", np.array([1.0, 2.0, 4.0, 1.0, 100.0]))
    dataset = TransitionDataset.from_raw(raw, DataSpec(reward="trajectory_range"))
    expected = np.array([1.0, 2.0, 4.0, 1.0]) * 1000.0 / 3.0
    assert dataset.reward.numpy() == pytest.approx(expected, rel=1e-6)
    # CORL splits the same steps at terminations: the open piece (1) does not count, 4 - 3.
    corl = TransitionDataset.from_raw(raw, DataSpec(reward="corl_locomotion"))
    assert corl.reward.numpy() == pytest.approx(np.array([1.0, 2.0, 4.0, 1.0]) * 1000.0, rel=1e-6)


@given(episodes, st.integers(1, 6), st.sampled_from(["drop", "keep"]))
@settings(max_examples=60, deadline=None)
def test_segments_are_exactly_the_windows_inside_episodes(
    shape: list[tuple[int, str]], length: int, last: str
) -> None:
    raw = raw_of([n for n, _ in shape], "".join(e for _, e in shape))
    dataset = TransitionDataset.from_raw(raw, DataSpec(truncated_last_step=last))
    rows = brute_force(raw, last == "drop")
    expected = sorted(
        tuple(rows[i : i + length])
        for i in range(len(rows) - length + 1)
        if rows[i][0] == rows[i + length - 1][0]  # same episode
    )
    rng = Everything(1)
    if not expected:
        with pytest.raises(ValueError, match="longest episode"):
            dataset.segments(rng, 1, length)
        return
    batch = dataset.segments(rng, len(expected), length)
    assert rng.high == len(expected)  # uniform: each window is one draw
    windows = [
        Batch(**{name: getattr(batch, name)[:, i] for name in FIELDS}) for i in range(len(expected))
    ]
    assert sorted(tuple(rows_of(window)) for window in windows) == expected


@given(episodes, st.integers(1, 6), st.integers(1, 4), st.sampled_from(["drop", "keep"]))
@settings(max_examples=60, deadline=None)
def test_segments_with_a_stride_are_uniform_over_the_chosen_windows(
    shape: list[tuple[int, str]], length: int, stride: int, last: str
) -> None:
    raw = raw_of([n for n, _ in shape], "".join(e for _, e in shape))
    dataset = TransitionDataset.from_raw(raw, DataSpec(truncated_last_step=last))
    rows = brute_force(raw, last == "drop")
    lengths = np.unique([row[0] for row in rows], return_counts=True)[1]
    ends = dataset.terminated.numpy(), dataset.truncated.numpy()
    starts = window_starts(lengths, *ends, length, stride)
    rng = Everything(1)
    if not len(starts):
        with pytest.raises(ValueError, match=r"longest episode|ends in a truncated step"):
            dataset.segments(rng, 1, length, stride)
        return
    batch = dataset.segments(rng, len(starts), length, stride)
    assert rng.high == len(starts)
    for i, start in enumerate(starts):
        window = Batch(**{name: getattr(batch, name)[:, i] for name in FIELDS})
        assert tuple(rows_of(window)) == tuple(rows[start : start + length])


def test_the_next_observation_across_a_time_limit_is_the_real_one() -> None:
    raw = raw_of([3, 2], "LT")
    dataset = TransitionDataset.from_raw(raw, DataSpec(truncated_last_step="keep"))
    last = 2
    assert (dataset.truncated[last], dataset.terminated[last]) == (1.0, 0.0)
    assert dataset.next_obs[last].tolist() == [0.0, 3.0]
    assert (dataset.truncated[4], dataset.terminated[4]) == (0.0, 1.0)


def test_a_last_step_already_missing_is_not_dropped_twice() -> None:
    raw = raw_of([3, 2], "LT", last_step_dropped=True)
    assert TransitionDataset.from_raw(raw, DataSpec()).spec.num_steps == 5


REWARDS = np.array([0.0, 1.0, 4.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", REWARDS),
        ("cql_antmaze", (REWARDS - 0.5) * 4),
        ("iql_antmaze", REWARDS - 1),
        ("antmaze", (REWARDS - 0.25) * 2),
        ("corl_antmaze", REWARDS * 10 - 5),
        ("min_max", 2 * (REWARDS - REWARDS.min()) / (REWARDS.max() - REWARDS.min()) - 1),
        ("times_100", REWARDS * 100),
        # returns 5, 4 and 1; split by terminations alone the last does not count
        ("corl_locomotion", REWARDS * 1000.0 / (5.0 - 4.0)),
        # mean 10/6; unbiased variance (26 - 6 (10/6)^2) / 5 = 28/15
        ("normalize", (REWARDS - 10 / 6) / np.sqrt(28 / 15)),
        # terminations after rows 2 and 4: returns 5 and 4; the open end does not count
        ("iql_locomotion", REWARDS * 1000.0 / (5.0 - 4.0)),
        # returns 5, 4 and 1: the open end counts
        ("trajectory_range", REWARDS * 1000.0 / (5.0 - 1.0)),
    ],
)
def test_reward_transforms_have_their_closed_form(name: str, expected: np.ndarray) -> None:
    raw = raw_of([3, 2, 1], "TTL", REWARDS)
    dataset = TransitionDataset.from_raw(raw, DataSpec(reward=name, truncated_last_step="keep"))
    np.testing.assert_allclose(dataset.reward.numpy(), expected, rtol=1e-6)


def test_iql_locomotion_splits_on_terminations_only() -> None:
    # The time limit after row 1 does not end a trajectory: returns are 0+1+4+2 = 7 and 3.
    raw = raw_of([2, 2, 2], "LTT", REWARDS)
    dataset = TransitionDataset.from_raw(
        raw, DataSpec(reward="iql_locomotion", truncated_last_step="keep")
    )
    np.testing.assert_allclose(dataset.reward.numpy(), REWARDS * 1000 / (7 - 3), rtol=1e-6)


def test_transforms_are_fitted_on_what_can_be_drawn() -> None:
    raw = raw_of([3, 3], "LT", REWARDS)
    dataset = TransitionDataset.from_raw(raw, DataSpec(reward="normalize"))
    kept = REWARDS[[0, 1, 3, 4, 5]]
    expected = (kept - kept.mean()) / kept.std(ddof=1)
    np.testing.assert_allclose(dataset.reward.numpy(), expected, rtol=1e-6)
    assert dataset.spec.statistics.reward_mean == pytest.approx(0.0, abs=1e-12)
    assert dataset.spec.statistics.reward_std == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "rewards", "ends", "message"),
    [
        ("iql_locomotion", REWARDS, "LLL", "there are 0"),
        ("iql_locomotion", np.ones(6), "TTT", "range 0"),
        ("trajectory_range", np.ones(6), "TTT", "range 0"),
        ("trajectory_range", np.ones(6), "LTL", "range 0"),
        ("corl_locomotion", REWARDS, "LLL", "there are 0"),
        ("normalize", np.ones(6), "TTT", "standard deviation, which is 0"),
    ],
)
def test_an_undefined_transform_is_refused(
    name: str, rewards: np.ndarray, ends: str, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        TransitionDataset.from_raw(
            raw_of([2, 2, 2], ends, rewards), DataSpec(reward=name, truncated_last_step="keep")
        )


def test_dropping_every_reward_with_the_last_steps_is_refused() -> None:
    raw = raw_of([2, 3], "LL", np.array([0, 1.0, 0, 0, 1.0]))
    with pytest.raises(DatasetError, match="'keep'"):
        TransitionDataset.from_raw(raw, DataSpec())
    TransitionDataset.from_raw(raw, DataSpec(truncated_last_step="keep"))
    # A dataset without any reward signal is a different matter.
    TransitionDataset.from_raw(raw_of([2, 3], "LL", np.zeros(5)), DataSpec())


def test_a_dataset_of_single_truncated_steps_has_nothing_to_draw() -> None:
    with pytest.raises(DatasetError, match="no transition is left"):
        TransitionDataset.from_raw(raw_of([1, 1], "LL"), DataSpec())


def test_the_best_episodes_are_kept_by_discounted_return_in_data_order() -> None:
    rewards = np.array([0.0, 0.0, 9.0, 1.0, 1.0, 5.0])
    raw = raw_of([3, 2, 1], "TTT", rewards)
    discounted = TransitionDataset.from_raw(raw, DataSpec(top_fraction=0.67, discount=0.5))
    # 9 / 4 = 2.25, 1.5 and 5: the first and the last
    assert discounted.obs[:, 0].tolist() == [0.0, 0.0, 0.0, 2.0]
    assert (discounted.spec.num_episodes, discounted.spec.num_steps) == (2, 4)
    assert (
        TransitionDataset.from_raw(raw, DataSpec(top_fraction=0.01)).obs[:, 0].tolist() == [0] * 3
    )


@pytest.mark.parametrize("discount", [1.0, 0.99])
def test_ten_percent_cloning_keeps_what_corls_loop_over_trajectories_keeps(discount) -> None:
    """Restarted at every termination; the count is rounded down, at least one."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 40, size=57).tolist()
    raw = raw_of(lengths, "T" * 57, generator.normal(size=sum(lengths)))
    returns, ids, total, scale, rows = [], [], 0.0, 1.0, []
    for i, (reward, ended) in enumerate(zip(raw.reward, raw.terminated, strict=True)):
        total, scale = total + scale * reward, scale * discount
        rows.append(i)
        if ended:
            returns.append(total)
            ids.append(rows)
            total, scale, rows = 0.0, 1.0, []
    best = np.argsort(returns)[::-1][: max(1, int(0.1 * len(returns)))]
    expected = sorted(i for e in best for i in ids[e])
    kept = TransitionDataset.from_raw(raw, DataSpec(top_fraction=0.1, discount=discount))
    assert torch.equal(kept.action, torch.from_numpy(raw.action[expected]))


def test_processes_can_map_one_copy_of_the_data() -> None:
    raw = raw_of([3, 2], "TF", np.arange(5.0))
    data = TransitionDataset.from_raw(raw, DataSpec())
    buffers: list[pickle.PickleBuffer] = []
    blob = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    held = [np.frombuffer(bytes(buffer.raw()), np.uint8) for buffer in buffers]
    mapped = pickle.loads(blob, buffers=held)
    assert mapped.spec == data.spec
    assert np.array_equal(mapped.lengths, data.lengths)
    for name in (*FIELDS, "next_action"):
        found = getattr(mapped, name)
        assert torch.equal(found, getattr(data, name))
        assert any(np.shares_memory(found.numpy(), memory) for memory in held)
    draw = [kind.segments(Everything(), 2, 2) for kind in (data, mapped)]
    assert torch.equal(draw[0].obs, draw[1].obs)


def test_held_out_episodes_are_the_rest_and_leave_no_trace_in_what_is_learned_from() -> None:
    raw = raw_of([2] * 10, "T" * 10, np.arange(20.0))
    data = DataSpec(held_out=0.3, reward="normalize")
    kept, others = (TransitionDataset.from_raw(raw, data, held_out=held) for held in (False, True))
    episodes = [set(part.obs[:, 0].tolist()) for part in (kept, others)]
    assert (len(episodes[0]), len(episodes[1])) == (7, 3)
    assert episodes[0] | episodes[1] == set(range(10))
    assert kept.reward.mean().abs() < 1e-6  # the transform is of these alone
    assert kept.spec.statistics.obs_mean[0] == np.mean(list(episodes[0]))
    scale = (others.reward[1] - others.reward[0]) / (kept.reward[1] - kept.reward[0])
    assert scale == pytest.approx(1.0)
    best = TransitionDataset.from_raw(raw, DataSpec(held_out=0.3, top_fraction=0.5))
    assert set(best.obs[:, 0].tolist()) == set(sorted(episodes[0])[-3:])
    with pytest.raises(DatasetError, match="no episode is held out"):
        TransitionDataset.from_raw(raw, DataSpec(), held_out=True)
    with pytest.raises(DatasetError, match="at least 2 are needed"):
        TransitionDataset.from_raw(raw_of([2], "T"), data)


def test_held_out_episodes_without_a_transition_are_refused() -> None:
    raw = raw_of([1, 3], "LT")
    held = held_out_episodes(2, 0.5)
    raw = raw if held[0] else raw_of([3, 1], "TL")
    TransitionDataset.from_raw(raw, DataSpec(held_out=0.5))
    with pytest.raises(DatasetError, match="every episode that is held out is one truncated step"):
        TransitionDataset.from_raw(raw, DataSpec(held_out=0.5), held_out=True)


def test_ties_and_rounding_of_the_best_fraction_are_fixed() -> None:
    raw = raw_of([1] * 100, "T" * 100, np.zeros(100))
    kept = TransitionDataset.from_raw(raw, DataSpec(top_fraction=0.29))
    assert kept.obs[:, 0].tolist() == list(range(29))  # 0.29 * 100 is 28.999...


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_statistics_are_those_of_the_drawable_transitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = raw_of([4, 3, 5], "LTL", rng.normal(size=12) * 100)
    dataset = TransitionDataset.from_raw(raw, DataSpec(reward="iql_antmaze"))
    statistics = dataset.spec.statistics
    obs = dataset.obs.double()
    np.testing.assert_allclose(statistics.obs_mean, obs.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.obs_std, obs.std(0, unbiased=False), rtol=1e-12)
    drawable = np.delete(raw.reward - 1.0, [3, 11])
    assert statistics.reward_mean == pytest.approx(drawable.mean(), rel=1e-12)
    assert statistics.reward_std == pytest.approx(drawable.std(ddof=1), rel=1e-12)
    whole = [raw.reward[a:b].sum() - (b - a) for a, b in ((0, 4), (4, 7), (7, 12))]
    assert statistics.return_min == pytest.approx(min(whole))
    assert statistics.return_max == pytest.approx(max(whole))
    assert statistics == TransitionDataset.from_raw(raw, DataSpec("iql_antmaze")).spec.statistics


def synthetic(seeds: int = 2, rows: tuple[int, ...] = (7,)) -> Batch:
    """Rows marked -1 - seed, so that their origin shows."""
    lead = (seeds, *rows)
    mark = -1.0 - torch.arange(seeds).view(-1, *[1] * len(rows)).expand(lead).float()
    return Batch(
        obs=torch.stack([mark, torch.arange(mark.numel()).view(lead).float()], -1),
        action=torch.zeros(*lead, 1),
        reward=mark,
        next_obs=torch.zeros(*lead, 2),
        terminated=torch.zeros(lead),
        truncated=torch.zeros(lead),
    )


@pytest.mark.parametrize(("fraction", "made"), [(0.0, 0), (0.9375, 15), (0.5, 8), (1.0, 16)])
def test_mixed_batches_hold_a_fixed_number_of_each_seeds_own_rows(
    fraction: float, made: int
) -> None:
    dataset: Dataset = TransitionDataset.from_raw(raw_of([3, 4], "TT"), DataSpec())
    mixed = dataset.mixed(synthetic(), fraction)
    batch = mixed.transitions(Draws(), 16)
    for seed in range(2):
        origin = batch.obs[seed, :, 0]
        assert (origin < 0).sum() == made
        assert set(origin[origin < 0].tolist()) <= {-1.0 - seed}
    assert mixed.spec == dataset.spec


def test_mixed_segments_are_windows_of_either_kind_and_never_span_two() -> None:
    dataset = TransitionDataset.from_raw(raw_of([5, 6], "TT"), DataSpec())
    mixed = dataset.mixed(synthetic(rows=(3, 4)), 0.5)
    batch = mixed.segments(Draws(), 200, 3)
    assert batch.obs.shape == (2, 200, 3, 2)
    made = batch.obs[:, 100:]
    assert (made[..., 0] < 0).all()
    step = made[..., 1]  # 4 steps per window, numbered through
    assert (step[..., 1:] - step[..., :-1] == 1).all()
    assert (step[..., 0] // 4 == step[..., -1] // 4).all()
    with pytest.raises(ValueError, match="synthetic windows have 4 steps"):
        mixed.segments(Draws(), 4, 5)
    with pytest.raises(ValueError, match="have 1 step"):
        dataset.mixed(synthetic(), 0.5).segments(Draws(), 4, 2)


def test_mixing_twice_keeps_both_kinds_of_synthetic_rows() -> None:
    dataset = TransitionDataset.from_raw(raw_of([5, 6], "TT"), DataSpec())
    old = synthetic()
    new = Batch(**{**vars(synthetic()), "reward": synthetic().reward - 10.0})
    batch = dataset.mixed(old, 0.5).mixed(new, 0.5).transitions(Draws(), 16)
    assert ((batch.reward < -10).sum(1) == 8).all()
    assert ((batch.obs[..., 0] < 0).sum(1) == 12).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    dataset = TransitionDataset.from_raw(raw_of([5], "T"), DataSpec())
    with pytest.raises(ValueError, match="fraction"):
        dataset.mixed(synthetic(), fraction)


def test_synthetic_data_of_the_wrong_shape_are_named() -> None:
    dataset = TransitionDataset.from_raw(raw_of([5], "T"), DataSpec())
    wrong = Batch(**{**vars(synthetic()), "next_obs": torch.zeros(2, 7, 3)})
    with pytest.raises(ValueError, match="next_obs"):
        dataset.mixed(wrong, 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward", "standardise"),
        ("truncated_last_step", "maybe"),
        ("top_fraction", 0.0),
        ("top_fraction", 1.5),
        ("held_out", -0.1),
        ("held_out", 1.0),
        ("discount", float("nan")),
    ],
)
def test_a_bad_data_spec_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"data.{field}"):
        DataSpec(**{field: value})


def test_drawing_traces_as_one_graph_with_equal_results() -> None:
    dataset = TransitionDataset.from_raw(raw_of([5, 6], "LT"), DataSpec())
    mixed = dataset.mixed(synthetic(rows=(3, 4)), 0.5)

    class Fixed(Draws):  # a tensor program, as the harness' generator is
        def integers(self, high: int, *shape: int) -> torch.Tensor:
            count = math.prod(shape)
            start = 7 * torch.arange(2).unsqueeze(-1)
            return torch.remainder(start + 3 * torch.arange(count), high).view(2, *shape)

    rng = Fixed()

    def draw() -> tuple[torch.Tensor, ...]:
        first, second = mixed.transitions(rng, 8), mixed.segments(rng, 6, 3)
        third = mixed.segments(rng, 6, 3, stride=2)
        return first.obs, first.reward, second.obs, second.next_obs, third.obs

    for eager, traced in zip(
        draw(), torch.compile(draw, fullgraph=True, backend="eager")(), strict=True
    ):
        assert torch.equal(eager, traced)


@needs_real_data
@pytest.mark.parametrize("name", ["surrogate/hopper/medium-v0", "local/door/human-v0"])
def test_real_transitions_and_windows_never_cross_an_episode(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(REAL))
    import minari

    dataset = load(name, DataSpec(truncated_last_step="drop"))
    obs, next_obs, steps = [], [], 0
    for episode in minari.load_dataset(name).iterate_episodes():
        kept = len(episode) - int(episode.truncations[-1])
        obs.append(episode.observations[:kept])
        next_obs.append(episode.observations[1 : kept + 1])
        steps += kept
    np.testing.assert_array_equal(dataset.obs, np.concatenate(obs).astype(np.float32))
    np.testing.assert_array_equal(dataset.next_obs, np.concatenate(next_obs).astype(np.float32))
    assert dataset.spec.num_steps == steps
    batch = dataset.segments(Draws(), 512, 16)
    assert torch.equal(batch.next_obs[..., :-1, :], batch.obs[..., 1:, :])
    assert not batch.terminated[..., :-1].any()
