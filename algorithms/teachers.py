"""Trained diffusion policies as teachers: which there are, their scores, samples drawn from them.

A teacher is named by a config field (`algorithms.api.Pretrained`); its stages are those of its own
trial. Actions here are scaled: the bounds are [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from algorithms import diffusion_bc, diffusion_ql, idql
from algorithms.api import (
    Dataset,
    DatasetSpec,
    Make,
    Pretrained,
    Recipe,
    Rng,
    Train,
    borrowed,
)
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.ddpm import Diffusion

SAMPLE_ROWS = 4096  # states of one call of a teacher while its samples are drawn
LEVEL_POINTS = 64  # noise levels that stand for a range of them


class Kind(NamedTuple):
    """An algorithm that can be a teacher."""

    recipe: Recipe
    network: str  # the learner's attribute that acts: F of an EDM, otherwise a noise network
    scaled: bool  # whether it scales actions to [-1, 1], and normalises observations


TEACHERS = {
    kind.recipe.name: kind
    for kind in (
        Kind(diffusion_bc.recipe, "ema_actor", True),
        Kind(diffusion_ql.recipe, "actor", False),
        Kind(idql.recipe, "ema_actor", False),
    )
}


def teacher_config(teacher: Pretrained) -> Any:
    """The teacher's own config.

    Raises:
        ValueError: for an algorithm that is no diffusion policy, or another revision of it.
    """
    if teacher.algorithm not in TEACHERS:
        raise ValueError(
            f"teacher is {teacher.algorithm!r}; expected a diffusion policy: {', '.join(TEACHERS)}"
        )
    return teacher.config_of(TEACHERS[teacher.algorithm].recipe)


def teacher_stages(teacher: Pretrained) -> tuple[Train | Make, ...]:
    """The stages of the teacher's own trial; the last is the policy."""
    config = teacher_config(teacher)
    return borrowed(TEACHERS[teacher.algorithm].recipe, config)


def restored(teacher: Pretrained, spec: DatasetSpec, state: Mapping[str, Tensor]) -> Any:
    """The trained policy, on the device of its state."""
    stage = teacher_stages(teacher)[-1]
    assert isinstance(stage, Train)
    first = next(iter(state.values()))
    policy = stage.learner(stage.config, spec, range(len(first)), None).to(first.device)
    policy.load_state_dict(state)
    return policy


@dataclass(frozen=True)
class Levels:
    """The noise levels that a teacher's score is asked at.

    Attributes:
        sigmas: those of a chain, ascending; for an EDM, some that stand for the whole range.
        chain: schedule and length of a chain, or None for an EDM, whose levels are continuous.
    """

    low: float
    high: float
    sigmas: tuple[float, ...]
    chain: tuple[str, int] | None

    @classmethod
    def of(cls, teacher: Pretrained, low: float, high: float) -> Levels:
        """Those between `low` and `high`.

        Raises:
            ValueError: if the teacher has not learned such levels, with what to do.
        """
        config = teacher_config(teacher)
        if getattr(config, "form", "ddpm") == "edm":
            if config.sigma_min > low or config.sigma_max < high:
                raise ValueError(
                    f"the teacher is trained on noise from {config.sigma_min} to "
                    f"{config.sigma_max}, but its score is asked from {low} to {high}; move one "
                    "of the ranges (sigma_min and sigma_max, sigma_low and sigma_high)"
                )
            middles = (torch.arange(LEVEL_POINTS, dtype=torch.float64) + 0.5) / LEVEL_POINTS
            return cls(low, high, tuple((low + (high - low) * middles).tolist()), None)
        sigmas = Diffusion(config.schedule, config.denoise_steps).sigmas
        if sigmas[0] > low:
            raise ValueError(
                f"the teacher's chain of {config.denoise_steps} levels is too coarse: its smallest "
                f"noise is {sigmas[0].item():.2f}, so that it knows its policy only blurred by "
                f"that, and sigma_low is {low}. Train a teacher with more levels (denoise_steps: "
                "50 goes down to 0.06 on the vp schedule), or raise sigma_low if so blurred a "
                "policy will do"
            )
        inside = tuple(sigma for sigma in sigmas.tolist() if low <= sigma <= high)
        if not inside:
            below = int((sigmas < low).sum())
            near = " and ".join(f"{s:.3g}" for s in sigmas[below - 1 : below + 1].tolist())
            raise ValueError(
                f"the teacher's chain has no noise level between sigma_low {low} and sigma_high "
                f"{high}; the nearest are {near}"
            )
        return cls(low, high, inside, (config.schedule, config.denoise_steps))


class Score(nn.Module):
    """d log p / da of a trained diffusion policy p at random noise levels.

    Has no state: the teacher is an input of a student, not a part of it.

    Args:
        state: of the teacher's last stage.
        unbiased: the form of the score of a chain; see `algorithms.vdd`.
    """

    sigmas: Tensor  # [L]

    def __init__(
        self,
        teacher: Pretrained,
        levels: Levels,
        spec: DatasetSpec,
        state: Mapping[str, Tensor],
        unbiased: bool,
    ) -> None:
        super().__init__()
        kind = TEACHERS[teacher.algorithm]
        policy = restored(teacher, spec, state)
        self._teacher = (policy, getattr(policy, kind.network))  # a tuple's modules are not ours
        self.levels, self.scaled, self.unbiased = levels, kind.scaled, unbiased
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        self.register_buffer("sigmas", torch.tensor(levels.sigmas), persistent=False)
        self.first = 0  # level of the chain that sigmas begins with
        if levels.chain is not None:
            self.first = int((Diffusion(*levels.chain).sigmas < self.sigmas[0]).sum())

    def forward(self, action: Tensor, obs: Tensor, uniform: Tensor) -> Tensor:
        """The score [K, B, *, A] at scaled actions of that shape.

        Args:
            obs: [K, B, O].
            uniform: numbers in [0, 1) that choose the levels, [K, B, *].
        """
        policy, network = self._teacher
        if self.scaled:
            obs = policy.normalizer(obs)
        obs = obs.view(*obs.shape[:2], *(1,) * (action.dim() - 3), obs.shape[-1])
        obs = obs.expand(*action.shape[:-1], -1)
        if self.levels.chain is None:
            sigma = self.levels.low + (self.levels.high - self.levels.low) * uniform
            return (policy.denoise(action, sigma, obs) - action) / sigma.square().unsqueeze(-1)
        index = (uniform * len(self.sigmas)).long()
        sigma = self.sigmas[index].unsqueeze(-1)
        kept = (1.0 + sigma.square()).rsqrt()  # sqrt(alpha_bar); sigma kept = sqrt(1 - alpha_bar)
        reach = 1.0 if self.scaled else self.bounds.reach
        own = action if self.scaled else self.bounds.middle + reach * action
        if self.unbiased:
            return -reach * network(kept * own, self.first + index, obs) / sigma
        return -reach * network(own, self.first + index, obs) / (sigma * kept)


@dataclass(frozen=True)
class SampleConfig:
    """State-action pairs drawn once: from a teacher, or the data's own if it names none."""

    states: int
    per_state: int
    teacher: Pretrained


def draw_samples(
    config: SampleConfig, dataset: Dataset, inputs: Mapping[str, Any], rng: Rng, out: Any
) -> None:
    """`obs` [K, states, O] of the data and `action` [K, states, per_state, A]: a `Make` stage."""
    batch = dataset.transitions(rng, config.states)
    action = batch.action.unsqueeze(2)
    if config.teacher.algorithm:
        (given,) = inputs.values()
        policy = restored(config.teacher, dataset.spec, given.state)
        parts = []
        for obs in batch.obs.split(SAMPLE_ROWS, dim=1):
            repeated = obs.unsqueeze(2).expand(-1, -1, config.per_state, -1)
            drawn = policy.act(repeated.flatten(1, 2), rng)  # [K, states * per_state, A]
            parts.append(drawn.unflatten(1, repeated.shape[1:3]))
            out.progress(sum(part.shape[1] for part in parts), config.states)
        action = torch.cat(parts, dim=1)
    out.array("obs", batch.obs)
    out.array("action", action)
