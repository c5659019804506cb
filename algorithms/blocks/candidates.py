"""Choosing one of several sampled actions."""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.api import Rng


def softmax_index(score: Tensor, rng: Rng) -> Tensor:
    """Index of one candidate, with probability softmax(score): [K, N, C] -> int64 [K, N].

    By the Gumbel-max trick: one draw of uniform numbers, led by N.
    """
    return (score - torch.log(-torch.log(rng.uniform(*score.shape[1:])))).argmax(dim=-1)


def pick(candidates: Tensor, index: Tensor) -> Tensor:
    """The candidates at an index: [K, N, C, A], [K, N] -> [K, N, A]."""
    # Not `take_along_dim`: traced, it would fix the number of rows.
    where = index[..., None, None].expand(-1, -1, 1, candidates.shape[-1])
    return candidates.gather(2, where).squeeze(2)
