"""Transitions as tensors on a device: what a learner draws batches from.

One copy is shared by all seeds of a stack; a batch [K, B, ...] is a gather with each seed's own
indices. Everything a compiled step calls here is plain tensor code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from algorithms.api import Batch, Dataset, DatasetSpec, Rng, Statistics
from algorithms.blocks.windows import window_starts
from harness.datasets.data_spec import DataSpec, held_out_episodes
from harness.datasets.errors import DatasetError
from harness.datasets.minari import load_raw

if TYPE_CHECKING:
    from harness.datasets.minari import RawDataset

__all__ = ["DataSpec", "MixedDataset", "TransitionDataset", "load"]

_FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
_ALL_FIELDS = (*_FIELDS, "next_action")


def load(
    dataset_id: str,
    data: DataSpec | Mapping[str, Any] | None = None,
    device: Any = "cpu",
    held_out: bool = False,
) -> TransitionDataset:
    """A stored dataset, transformed as `data` says, on `device`.

    Args:
        held_out: what `data.held_out` keeps from the learner, instead of what the learner sees.
    Raises:
        DatasetError: if it is not stored, damaged or does not fit the transforms.
    """
    data = data if isinstance(data, DataSpec) else DataSpec(**(data or {}))
    return TransitionDataset.from_raw(load_raw(dataset_id), data, held_out).to(device)


class TransitionDataset:
    """All transitions of a dataset: float32 tensors led by S, in storage order.

    Implements `algorithms.api.Dataset`. `next_obs` is the real next observation everywhere, also
    across a time limit; no transition and no segment crosses an episode border.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        obs: Tensor,  # [S, O]
        action: Tensor,  # [S, A]
        reward: Tensor,  # [S]
        next_obs: Tensor,  # [S, O]
        terminated: Tensor,  # [S], 0 or 1
        truncated: Tensor,  # [S], 0 or 1
        next_action: Tensor,  # [S, A], 0 where the episode ends
        lengths: np.ndarray,  # [E], transitions of each episode, in order
    ) -> None:
        self.spec = spec
        self.obs = obs
        self.action = action
        self.reward = reward
        self.next_obs = next_obs
        self.terminated = terminated
        self.truncated = truncated
        self.next_action = next_action
        self._lengths = np.asarray(lengths, dtype=np.int64)
        # Steps from each transition to its episode's end, itself included. Sorted by it, the
        # starts of windows of length L are the first `_num_starts(L)` entries of `_by_remaining`,
        # for every L at once and without a shape that depends on data.
        total = int(self._lengths.sum())
        if total != len(obs):
            raise ValueError(f"episode lengths sum to {total}; expected {len(obs)} transitions")
        ends = np.repeat(np.cumsum(self._lengths), self._lengths)
        remaining = ends - np.arange(total)
        order = np.argsort(-remaining, kind="stable")
        self._sorted_remaining = -remaining[order]  # ascending, for searchsorted
        self._by_remaining = torch.from_numpy(order).to(obs.device)
        self._starts: dict[tuple[int, int], Tensor] = {}  # by (length, stride), on first use

    @classmethod
    def from_raw(cls, raw: RawDataset, data: DataSpec, held_out: bool = False) -> TransitionDataset:
        """Applies `data` to validated arrays.

        Args:
            held_out: the held-out episodes, with the rewards' transform of the others.
        Raises:
            DatasetError: if no transition is left or held out, or a reward transform is undefined.
        """
        episodes, others = _episodes(raw, data)
        if held_out and not len(others):
            raise DatasetError(
                f"dataset {raw.id!r}: no episode is held out. Train with data.held_out, for "
                "example 0.1"
            )
        steps = _kept_steps(raw, data, episodes, "every episode")
        _refuse_lost_rewards(raw, data, episodes, steps)
        episode_of_step = raw.episode_of_step
        transform = _reward_transform(raw, data, steps)
        if held_out:
            episodes = others
            steps = _kept_steps(raw, data, episodes, "every episode that is held out")
        rows = steps + episode_of_step[steps]  # episode e has e extra observations before it
        reward = transform(raw.reward[steps])
        obs = raw.obs[rows]
        whole = np.isin(episode_of_step, episodes)
        borders = np.flatnonzero(np.diff(episode_of_step[whole], prepend=-1))
        returns = np.add.reduceat(transform(raw.reward[whole]), borders)
        kept_lengths = np.bincount(episode_of_step[steps], minlength=raw.num_episodes)
        kept_lengths = kept_lengths[kept_lengths > 0]
        spec = DatasetSpec(
            id=raw.id,
            digest=raw.digest,
            obs_dim=obs.shape[1],
            action_dim=raw.action.shape[1],
            action_low=tuple(raw.action_low.tolist()),
            action_high=tuple(raw.action_high.tolist()),
            num_steps=len(steps),
            num_episodes=len(kept_lengths),
            statistics=_statistics(obs, reward, returns),
        )
        return cls(
            spec,
            obs=torch.from_numpy(obs),
            action=torch.from_numpy(raw.action[steps]),
            reward=torch.from_numpy(reward.astype(np.float32)),
            next_obs=torch.from_numpy(raw.obs[rows + 1]),
            terminated=torch.from_numpy(raw.terminated[steps].astype(np.float32)),
            truncated=torch.from_numpy(raw.truncated[steps].astype(np.float32)),
            next_action=torch.from_numpy(_next_actions(raw, steps)),
            lengths=kept_lengths,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """As arrays, which pickle's protocol 5 does not copy: processes of a node can map them."""
        columns = {name: getattr(self, name).cpu().numpy() for name in _ALL_FIELDS}
        return _from_columns, (self.spec, columns, self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Transitions of each episode, in storage order: int64 [E]."""
        return self._lengths

    @property
    def device(self) -> torch.device:
        return self.obs.device

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = [getattr(self, name) for name in _ALL_FIELDS] + [self._by_remaining]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: Any) -> TransitionDataset:
        """The same dataset on another device (itself if it is there already)."""
        if torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in _ALL_FIELDS}
        return TransitionDataset(self.spec, **moved, lengths=self._lengths)

    def transitions(self, rng: Rng, batch_size: int, next_action: bool = False) -> Batch:
        """Uniform draws with replacement, independent for each seed: [K, B, ...].

        Args:
            next_action: also the next action of the data. It is known for the transition before a
                dropped last step; where an episode ends there is none, and it is zero.
        """
        index = rng.integers(self.spec.num_steps, batch_size)  # [K, B]
        return self._gather(index, _ALL_FIELDS if next_action else _FIELDS)

    def rows(self, index: Tensor, next_action: bool = False) -> Batch:
        """The transitions at `index` [K, B], in storage order: [K, B, ...]."""
        return replace(self._gather(index, _ALL_FIELDS if next_action else _FIELDS), index=index)

    def segments(self, rng: Rng, batch_size: int, length: int, stride: int | None = None) -> Batch:
        """Windows of consecutive transitions, uniform over all that fit: [K, B, L, ...].

        Args:
            stride: only the windows of `algorithms.blocks.windows.window_starts`.
        Raises:
            ValueError: if there is no such window.
        """
        if stride is None:
            choice = rng.integers(self._num_starts(length), batch_size)  # [K, B]
            start = self._by_remaining[choice]
        else:
            starts = self._strided_starts(length, stride)
            start = starts[rng.integers(starts.shape[0], batch_size)]
        return self._gather(start.unsqueeze(-1) + torch.arange(length, device=start.device))

    def mixed(self, synthetic: Batch, fraction: float) -> Dataset:
        """A dataset whose batches hold `fraction` synthetic rows, rounded to whole rows.

        Args:
            synthetic: transitions [K, M, ...] or windows [K, M, L, ...], each seed its own.
            fraction: in [0, 1].
        """
        return MixedDataset(self, synthetic, fraction)

    @torch.compiler.assume_constant_result
    def _num_starts(self, length: int) -> int:
        if length < 1:
            raise ValueError(f"segment length is {length}; expected at least 1")
        count = int(np.searchsorted(self._sorted_remaining, -length, side="right"))
        if count == 0:
            raise ValueError(
                f"segment length is {length}; the longest episode of {self.spec.id!r} has "
                f"{int(self._lengths.max())} transitions. Choose a shorter length"
            )
        return count

    @torch.compiler.assume_constant_result
    def _strided_starts(self, length: int, stride: int) -> Tensor:
        if (length, stride) not in self._starts:
            self._num_starts(length)  # refuses what does not fit
            ends = self.terminated.cpu().numpy(), self.truncated.cpu().numpy()
            found = window_starts(self._lengths, *ends, length, stride)
            if not len(found):
                raise ValueError(
                    f"every window of {length} steps in {self.spec.id!r} ends in a truncated step; "
                    "choose a shorter length, or no stride"
                )
            self._starts[length, stride] = torch.from_numpy(found).to(self.device)
        return self._starts[length, stride]

    def _gather(self, index: Tensor, names: tuple[str, ...] = _FIELDS) -> Batch:
        return Batch(**{name: getattr(self, name)[index] for name in names})


class MixedDataset:
    """Real and synthetic rows in every batch: the first rows are real, the last synthetic.

    The number of synthetic rows is fixed (`round(fraction * batch_size)`), as in policy-guided
    diffusion (240 of 256), not drawn. `spec` stays that of the real data.
    """

    def __init__(self, real: Dataset, synthetic: Batch, fraction: float) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction is {fraction}; expected a number in [0, 1]")
        lead = tuple(synthetic.reward.shape)
        if len(lead) not in (2, 3) or 0 in lead:
            raise ValueError(
                f"synthetic reward has shape {lead}; expected transitions [K, M] or windows "
                "[K, M, L], none of them empty"
            )
        for name, width in (
            ("obs", real.spec.obs_dim),
            ("action", real.spec.action_dim),
            ("next_obs", real.spec.obs_dim),
            ("terminated", None),
            ("truncated", None),
        ):
            expected = lead if width is None else (*lead, width)
            shape = tuple(getattr(synthetic, name).shape)
            if shape != expected:
                raise ValueError(f"synthetic {name} has shape {shape}; expected {expected}")
        self.real = real
        self.spec = real.spec
        self.fraction = fraction
        self._windows = synthetic if len(lead) == 3 else None  # [K, M, L, ...]
        self._rows = synthetic if len(lead) == 2 else _flat_windows(synthetic)  # [K, M, ...]

    def transitions(self, rng: Rng, batch_size: int, next_action: bool = False) -> Batch:
        """`batch_size` rows, of which `round(fraction * batch_size)` are synthetic: [K, B, ...].

        Raises:
            ValueError: for `next_action` if the synthetic data lack it.
        """
        made = round(self.fraction * batch_size)
        parts = []
        if made < batch_size:
            parts.append(self.real.transitions(rng, batch_size - made, next_action))
        if made > 0:
            if next_action and self._rows.next_action is None:
                raise ValueError(
                    "next actions were asked for, but the synthetic data have none; generate "
                    "transitions with `next_action`"
                )
            index = rng.integers(self._rows.reward.shape[1], made)  # [K, made]
            names = _ALL_FIELDS if next_action else _FIELDS
            parts.append(_pick(self._rows, index, names))
        return _joined(parts)

    def rows(self, index: Tensor, next_action: bool = False) -> Batch:
        """Refused: only real transitions have a place, and nobody asked for those alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "rows of a dataset with synthetic transitions have no index; draw `transitions`, or "
            "take the rows of the real dataset"
        )

    def segments(self, rng: Rng, batch_size: int, length: int, stride: int | None = None) -> Batch:
        """Windows, of which `round(fraction * batch_size)` are synthetic: [K, B, L, ...].

        Raises:
            ValueError: if the synthetic data are single transitions or shorter than `length`.
        """
        made = round(self.fraction * batch_size)
        parts = []
        if made < batch_size:
            parts.append(self.real.segments(rng, batch_size - made, length, stride))
        if made > 0:
            if self._windows is None or self._windows.reward.shape[2] < length:
                have = 1 if self._windows is None else self._windows.reward.shape[2]
                raise ValueError(
                    f"segment length is {length}, synthetic windows have {have} steps; generate "
                    "longer windows or draw transitions"
                )
            count, steps = self._windows.reward.shape[1:3]
            starts = steps - length + 1
            choice = rng.integers(count * starts, made)  # [K, made]
            device = choice.device
            rows = torch.arange(count * steps, device=device).view(count, steps)
            start = rows[:, :starts].reshape(-1)[choice]
            index = start.unsqueeze(-1) + torch.arange(length, device=device)
            parts.append(_pick(self._rows, index))
        return _joined(parts)

    def mixed(self, synthetic: Batch, fraction: float) -> Dataset:
        """Mixes once more, taking this dataset as the real one."""
        return MixedDataset(self, synthetic, fraction)


def _from_columns(
    spec: DatasetSpec, columns: Mapping[str, np.ndarray], lengths: np.ndarray
) -> TransitionDataset:
    with warnings.catch_warnings():  # that mapped arrays cannot be written to; nobody does
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    return TransitionDataset(spec, **tensors, lengths=lengths)


def _flat_windows(windows: Batch) -> Batch:
    """[K, M, L, ...] -> [K, M * L, ...]."""
    return Batch(**{name: getattr(windows, name).flatten(1, 2) for name in _FIELDS})


def _pick(rows: Batch, index: Tensor, names: tuple[str, ...] = _FIELDS) -> Batch:
    """Rows of each seed by its own indices: [K, M, ...] by [K, ...] -> [K, ...]."""
    seed = torch.arange(index.shape[0], device=index.device)
    seed = seed.view(-1, *([1] * (index.ndim - 1)))
    return Batch(**{name: getattr(rows, name)[seed, index] for name in names})


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    names = _FIELDS if parts[0].next_action is None else _ALL_FIELDS
    return Batch(**{name: torch.cat([getattr(p, name) for p in parts], dim=1) for name in names})


# -------------------------------------------------------------------------------------- transforms


def _episodes(raw: RawDataset, data: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the episodes that are learned from, and of those held out, ascending."""
    try:
        held = held_out_episodes(raw.num_episodes, data.held_out)
    except ValueError as error:
        raise DatasetError(f"dataset {raw.id!r}: data.held_out: {error}") from error
    kept = np.flatnonzero(~held)
    if data.top_fraction < 1.0:
        # 1e-9: 0.29 * 100 is 28.999... in floating point
        count = max(1, int(data.top_fraction * len(kept) + 1e-9))
        best_first = np.argsort(-raw.returns(data.discount)[kept], kind="stable")
        kept = np.sort(kept[best_first[:count]])
    return kept, np.flatnonzero(held)


def _kept_steps(raw: RawDataset, data: DataSpec, episodes: np.ndarray, named: str) -> np.ndarray:
    """Indices of the steps of some episodes that can be drawn, ascending.

    Args:
        named: what the episodes are, for the error.
    Raises:
        DatasetError: if there is none.
    """
    keep = np.isin(raw.episode_of_step, episodes)
    if data.truncated_last_step == "drop" and not raw.last_step_dropped:
        # As in D4RL, also where the step happens to be terminal.
        keep &= ~raw.truncated
    steps = np.flatnonzero(keep)
    if not len(steps):
        raise DatasetError(
            f"dataset {raw.id!r}: no transition is left: {named} is one truncated step and "
            "data.truncated_last_step is 'drop'; set it to 'keep'"
        )
    return steps


def _refuse_lost_rewards(
    raw: RawDataset, data: DataSpec, episodes: np.ndarray, steps: np.ndarray
) -> None:
    """PointMaze cuts episodes at the goal: dropping last steps there drops every reward."""
    before = raw.reward[np.isin(raw.episode_of_step, episodes)]
    after = raw.reward[steps]
    if 1 < len(after) < len(before) and np.ptp(after) == 0.0 and np.ptp(before) > 0.0:
        raise DatasetError(
            f"dataset {raw.id!r}: with data.truncated_last_step 'drop' every reward is "
            f"{after[0]:g}, because the others ({len(np.unique(before))} different values) are on "
            "the last steps of truncated episodes. Set data.truncated_last_step to 'keep' (next "
            "observations are real there)"
        )


def _next_actions(raw: RawDataset, steps: np.ndarray) -> np.ndarray:
    """The action after each of `steps` in its episode, zero after an episode's last: [S, A]."""
    last = np.zeros(raw.num_steps, bool)
    last[np.cumsum(raw.lengths) - 1] = True
    after = raw.action[np.minimum(steps + 1, raw.num_steps - 1)]
    return np.where(last[steps, None], 0.0, after).astype(np.float32)


def _reward_transform(raw: RawDataset, data: DataSpec, steps: np.ndarray) -> Any:
    """The function from raw to transformed rewards, fitted on the steps that can be drawn."""
    reward = raw.reward[steps]
    if data.reward == "none":
        return lambda r: r
    if data.reward == "cql_antmaze":
        return lambda r: (r - 0.5) * 4.0
    if data.reward == "iql_antmaze":
        return lambda r: r - 1.0
    if data.reward == "antmaze":
        return lambda r: (r - 0.25) * 2.0
    if data.reward == "corl_antmaze":
        return lambda r: r * 10.0 - 5.0
    if data.reward == "times_100":
        return lambda r: r * 100.0
    if data.reward in ("trajectory_range", "corl_locomotion"):
        return _over_range(raw, data, steps)
    if data.reward == "normalize":
        std = reward.std(ddof=1) if len(reward) > 1 else 0.0
        if not std > 0.0:
            raise DatasetError(
                f"dataset {raw.id!r}: data.reward 'normalize' divides by the rewards' standard "
                f"deviation, which is {std}; use 'none'"
            )
        mean = reward.mean()
        return lambda r: (r - mean) / std
    if data.reward == "min_max":
        low, high = float(reward.min()), float(reward.max())
        if not high > low:
            raise DatasetError(
                f"dataset {raw.id!r}: data.reward 'min_max' divides by the range of the rewards, "
                f"which are all {low}; use 'none'"
            )
        return lambda r: 2.0 * (r - low) / (high - low) - 1.0
    assert data.reward == "iql_locomotion"
    ends = np.flatnonzero(raw.terminated[steps])
    if len(ends):
        returns = np.add.reduceat(reward[: ends[-1] + 1], np.concatenate(([0], ends[:-1] + 1)))
        spread = float(returns.max() - returns.min())
    else:
        spread = 0.0
    if not spread > 0.0:
        raise DatasetError(
            f"dataset {raw.id!r}: data.reward 'iql_locomotion' divides by the range of returns of "
            f"trajectories that end in a termination; there are {len(ends)}, with range {spread}. "
            "Use 'none' or 'normalize'"
        )
    return lambda r: r / spread * 1000.0


def _over_range(raw: RawDataset, data: DataSpec, steps: np.ndarray) -> Any:
    """1000 r / (max - min) of the returns of trajectories; what those are depends on the code."""
    reward = raw.reward[steps]
    if data.reward == "trajectory_range":
        episode = raw.episode_of_step[steps]
        ends = np.flatnonzero(np.diff(episode, append=-1))
    else:
        ends = _ends_by_length(raw.terminated[steps], 1000)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    returns = np.add.reduceat(reward[: ends[-1] + 1], starts) if len(ends) else np.zeros(1)
    spread = float(np.ptp(returns))
    if not spread > 0.0:
        raise DatasetError(
            f"dataset {raw.id!r}: data.reward {data.reward!r} divides by the range of the returns "
            f"of trajectories; there are {len(ends)}, with range {spread}. Use 'none' or "
            "'normalize'"
        )
    return lambda r: r / spread * 1000.0


def _ends_by_length(terminated: np.ndarray, limit: int) -> np.ndarray:
    """Last indices of pieces that end at a termination or when they have `limit` steps."""
    ends: list[int] = []
    start = 0
    for stop in np.append(np.flatnonzero(terminated), len(terminated)):
        ends.extend(range(start + limit - 1, int(stop), limit))
        if stop < len(terminated):
            ends.append(int(stop))
            start = int(stop) + 1
    return np.array(ends, dtype=np.int64)


def _statistics(obs: np.ndarray, reward: np.ndarray, returns: np.ndarray) -> Statistics:
    """Float64 statistics; the order of summation is fixed, so they are reproducible."""
    mean = obs.mean(axis=0, dtype=np.float64)
    std = obs.std(axis=0, dtype=np.float64)
    return Statistics(
        obs_mean=tuple(mean.tolist()),
        obs_std=tuple(std.tolist()),
        reward_mean=float(reward.mean()),
        reward_std=float(reward.std(ddof=1)) if len(reward) > 1 else 0.0,
        return_min=float(returns.min()),
        return_max=float(returns.max()),
    )
