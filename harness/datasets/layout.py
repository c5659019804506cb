"""How observations and actions become flat vectors: one rule for datasets and environments.

A nested observation is flattened depth first; the keys of a Dict are taken in sorted order, the
parts of a Tuple in their own; each Box is ravelled in C order. So PointMaze gives
`[achieved_goal, desired_goal, observation]` and FrankaKitchen
`[achieved_goal/<tasks sorted>, desired_goal/<tasks sorted>, observation]`. The order depends on
the names only, never on the order in which a file or a simulator happens to list them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.datasets.errors import DatasetError


@dataclass(frozen=True)
class Leaf:
    """One array of a nested observation."""

    path: tuple[str, ...]  # keys from the root; () for an observation that is one array
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __str__(self) -> str:
        return f"{self.name or 'observation'}[{self.size}]"


def leaves_of(space: Any, what: str = "observation space") -> tuple[Leaf, ...]:
    """Leaves of a Gymnasium space in the order they are flattened in.

    Raises:
        DatasetError: if a part is neither Box nor MultiBinary.
    """
    from gymnasium import spaces

    def walk(part: Any, path: tuple[str, ...]) -> list[Leaf]:
        if isinstance(part, spaces.Dict):
            return [leaf for key in sorted(part.spaces) for leaf in walk(part[key], (*path, key))]
        if isinstance(part, spaces.Tuple):
            return [
                leaf
                for index, child in enumerate(part.spaces)
                for leaf in walk(child, (*path, f"_index_{index}"))
            ]
        if isinstance(part, spaces.Box | spaces.MultiBinary):
            shape = (part.n,) if isinstance(part.shape, int) else tuple(part.shape)
            return [Leaf(path, shape)]
        raise DatasetError(
            f"{what}: {'/'.join(path) or 'the space'} is {type(part).__name__}; expected arrays "
            "of numbers (Box), possibly nested in Dict. Only continuous control is supported; "
            "choose a dataset with numeric observations and actions."
        )

    return tuple(walk(space, ()))


def select(nested: Any, path: Sequence[str]) -> Any:
    """The value at `path` in nested dicts and tuples."""
    for key in path:
        nested = nested[key] if isinstance(nested, Mapping) else nested[int(key[len("_index_") :])]
    return nested


def flatten_one(obs: Any, leaves: Sequence[Leaf]) -> np.ndarray:
    """One observation as a float32 vector [O]."""
    if len(leaves) == 1 and not leaves[0].path:
        return np.asarray(obs, dtype=np.float32).reshape(-1)
    parts = [np.asarray(select(obs, leaf.path), dtype=np.float32).reshape(-1) for leaf in leaves]
    return np.concatenate(parts)
