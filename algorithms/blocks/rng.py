"""Per-seed random numbers without a generator state: a draw is a function of where it is made.

Philox-4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") in tensor
operations. The 64-bit key is (seed, stream), the 128-bit counter (step, index, substep, site):

    step     gradient steps done before this one
    index    of the number within its call: one block for each, of which one or two words are used
    substep  position inside a step's outer loop, such as the environment step of an evaluation
    site     position of the call within one step, counted by the `Rng` object

One block per number wastes words, but not time: joining the words of a block makes the compiler
evaluate all ten rounds once more for each of them.

So the numbers of a seed do not depend on which seeds share its stack, on the device, on
compilation or on history, and there is no state to checkpoint. Integers are exact everywhere;
`normal` goes through log, cos and sin, which may round differently elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions

Word = Any  # an int64 tensor or an int, in [0, 2**32)


class Stream(IntEnum):
    """What the numbers are for; streams of one seed are independent. The values are frozen."""

    INITIALISATION = 0
    TRAIN = 1
    EVALUATION = 2
    MAKE = 3
    TEST = 4
    ACTIONS = 5  # drawn from a trained policy to look at, outside an environment


def _multiply(constant: int, x: Word) -> tuple[Word, Word]:
    """High and low 32-bit words of `constant * x`, both operands below 2**32.

    The product itself can exceed int64. Both constants are above 2**32 - 2**30, so the product
    with `constant - 2**32` stays above -2**62 and misses the full one by x * 2**32, which only
    concerns the high word. Few operations, each used once or twice: halves of 16 bits give the
    same words but make the compiler inline ten rounds into a minute of code generation.
    """
    product = (constant - 2**32) * x
    return (product >> 32) + x, product & _WORD


def philox(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Four output words (int64 tensors below 2**32) of Philox-4x32-10.

    Args:
        counter: four words, key: two words; tensors that broadcast together, or ints below 2**32.
    """
    c0, c1, c2, c3 = counter
    for i in range(_ROUNDS):
        k0, k1 = ((key[j] + i * _KEY_STEPS[j]) & _WORD for j in (0, 1))
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high2, low2 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


class Rng:
    """Random numbers for K seeds at one step; implements `algorithms.api.Rng`.

    Cheap to build: make one for every step, inside the compiled function. An object that outlives
    its step keeps counting sites, and a traced one would be recompiled for each of them.

    Args:
        seeds: int64 [K], each in [0, 2**32).
        step: int64 [K], gradient steps done before this one, each in [0, 2**32).
        stream: what the numbers are for.
        substep: int64 tensor (scalar or [K]) or int, in [0, 2**32).
    Raises:
        TypeError: if `seeds` or `step` is not an int64 tensor.
        ValueError: if they are not both [K].
    """

    def __init__(
        self, seeds: Tensor, step: Tensor, stream: Stream, substep: Tensor | int = 0
    ) -> None:
        for name, value in (("seeds", seeds), ("step", step)):
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} is {found}; expected an int64 tensor of shape [K]")
        if seeds.dim() != 1 or step.shape != seeds.shape:
            raise ValueError(
                f"seeds has shape {tuple(seeds.shape)} and step {tuple(step.shape)}; "
                "expected both to be [K]"
            )
        self.seeds = seeds
        self._step = step
        self.stream: int | Tensor = int(stream)  # a tensor [K, 1] in RowRng
        self.substep = substep
        self.site = 0

    @classmethod
    def at_step(cls, seeds: Sequence[int] | Tensor, step: int, stream: Stream) -> Rng:
        """The numbers of `stream` at one common step, on the CPU unless `seeds` is a tensor.

        Raises:
            ValueError: if a seed is outside [0, 2**32), so that two seeds could share numbers.
        """
        seeds = torch.as_tensor(seeds, dtype=torch.int64)
        if seeds.numel() and not (int(seeds.min()) >= 0 and int(seeds.max()) <= _WORD):
            raise ValueError(f"seeds {seeds.tolist()} are not all in [0, 2**32); choose others")
        return cls(seeds, torch.full_like(seeds, step), stream)

    @property
    def step(self) -> Tensor:
        """Gradient steps done before this one, int64 [K]."""
        return self._step

    @property
    def num_seeds(self) -> int:
        """K."""
        return self.seeds.shape[0]

    def words(self, count: int) -> tuple[Tensor, Tensor]:
        """Two independent 32-bit words for each of `count` numbers: int64 [K, count] each.

        Every other draw is made of these. The index is in a counter word that the first round only
        XORs: PyTorch 2.13's CPU compiler gets `constant * arange` wrong once it passes 2**31.
        """
        index = torch.arange(count, device=self.seeds.device)
        site = self.site
        self.site = site + 1
        substep = self.substep
        if isinstance(substep, Tensor) and substep.dim() == 1:
            substep = substep[:, None]
        counter = (self._step[:, None], index[None, :], substep, site)
        first, second, _, _ = philox(counter, (self.seeds[:, None], self.stream))
        return first, second

    def uniform(self, *shape: int) -> Tensor:
        """Float32 [K, *shape] in [0, 1): multiples of 2**-24, all equally likely."""
        first, _ = self.words(math.prod(shape))
        return ((first >> 8).float() * 2.0**-24).view(self.num_seeds, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 [K, *shape] by Box-Muller; at most 6.66 in absolute value.

        The radius uses all 32 bits of a word plus one: its uniform lies in (0, 1], so the
        logarithm is finite and the tail reaches sqrt(2 log 2**32).
        """
        first, second = self.words(math.prod(shape))
        radius = torch.sqrt(-2.0 * torch.log((first + 1).float() * 2.0**-32))
        angle = (second >> 8).float() * (2.0**-24 * 2.0 * math.pi)
        return (radius * torch.cos(angle)).view(self.num_seeds, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Int64 [K, *shape] in [0, high).

        floor(word64 * high / 2**64), computed exactly: no value's probability differs from 1/high
        by more than 2**-64.

        Raises:
            ValueError: if `high` is outside [1, 2**31].
        """
        if not 1 <= high <= 2**31:
            raise ValueError(f"high is {high}; expected an int in [1, 2**31]")
        first, second = self.words(math.prod(shape))
        return ((first * high + ((second * high) >> 32)) >> 32).view(self.num_seeds, *shape)


class RowRng:
    """Random numbers for N rows per seed, each with its own episode and environment step.

    What a policy is given while it is evaluated: a draw is a function of (seed, step, episode,
    environment step, site), not of the row the episode sits in, nor of how many others are
    played beside it. Implements `algorithms.api.Rng` for draws whose shape is led by N.

    Args:
        seeds, step: int64 [K].
        episode: int64 [K, N], each in [0, 2**24 - 1).
        substep: int64 [K, N], environment steps done in the episode.
    """

    def __init__(
        self, seeds: Tensor, step: Tensor, stream: Stream, episode: Tensor, substep: Tensor
    ) -> None:
        self._step = step
        self.num_rows = episode.shape[1]
        self._rows = Rng(
            seeds.repeat_interleave(self.num_rows),
            step.repeat_interleave(self.num_rows),
            stream,
            substep.flatten(),
        )
        # The key's second word has 32 bits: the stream in the low 8, episode + 1 above them.
        self._rows.stream = (int(stream) + ((episode.flatten() + 1) << 8))[:, None]

    @property
    def step(self) -> Tensor:
        """Gradient steps done before this one, int64 [K]."""
        return self._step

    def uniform(self, *shape: int) -> Tensor:
        """As `Rng.uniform`: [K, N, ...] for a shape (N, ...)."""
        return self._led(self._rows.uniform(*self._rest(shape)))

    def normal(self, *shape: int) -> Tensor:
        """As `Rng.normal`: [K, N, ...] for a shape (N, ...)."""
        return self._led(self._rows.normal(*self._rest(shape)))

    def integers(self, high: int, *shape: int) -> Tensor:
        """As `Rng.integers`: [K, N, ...] for a shape (N, ...)."""
        return self._led(self._rows.integers(high, *self._rest(shape)))

    def _rest(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[0] != self.num_rows:
            raise ValueError(
                f"a policy drew numbers of shape {shape}; while acting every draw must be led by "
                f"the N = {self.num_rows} rows of its observations"
            )
        return shape[1:]

    def _led(self, values: Tensor) -> Tensor:
        return values.view(-1, self.num_rows, *values.shape[1:])
