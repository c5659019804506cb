"""Detectors of actions that are not in the data, behind one interface.

A detector is a learner (`sample`, `update`) with `finish(dataset, rng)`, called once after
`config.steps` steps, and `score(obs, action, rng)`: [K, N, O] and [K, N, A] -> [K, N], higher where
the action is more likely out of distribution. A score has no scale of its own.

    diffusion_1     error of denoising at one random noise level (DOSER, Eq. 6)
    diffusion_10    averaged over ten random levels
    stratified      at fixed levels, each divided by its mean over the data
    ensemble        disagreement of five dynamics networks
    dropout         spread of a dynamics network's predictions under dropout (Gal et al., 2016)
    cvae            error of a conditional VAE's reconstruction
    neighbours      distance to the k-th nearest (observation, action) of the data
    rnd             error of predicting a random network (Burda et al., 2019)

The first three are one trained model, scored in three ways. Sizes and steps are ours, the same for
all: two or more layers of 256, observations standardised, actions scaled to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Rng
from algorithms.blocks.denoising_error import Levels, denoiser_of, level_errors, mean_error
from algorithms.blocks.layers import MLP
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.doser_models import (
    ActionCVAE,
    ActionDiffusion,
    Dynamics,
    FrozenModel,
    ModelConfig,
)

FIT_ROWS = 4096  # of the data, for what is measured after training


@dataclass(frozen=True)
class DetectorConfig(ModelConfig):
    """Of one detector; ours."""

    batch_size: int = 512
    steps: int = 20_000  # gradient steps
    levels: int = 1  # random noise levels that are averaged
    fixed_levels: tuple[float, ...] = ()  # instead: the stratified score
    dropout_rate: float = 0.1
    passes: int = 20  # predictions under dropout
    memory: int = 20_000  # pairs that neighbours are looked for in
    neighbour: int = 5  # k
    feature_dim: int = 32  # outputs of the random network


class Detector(FrozenModel):
    """What detectors share; `raw_score` is told of standardised observations and unit actions."""

    config: DetectorConfig

    def finish(self, dataset: Dataset, rng: Rng) -> None:
        """Called once after training."""

    def score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        """[K, N, O] and [K, N, A] -> [K, N]."""
        return self.raw_score(self.normalizer(obs), self.bounds.unit(action), rng)

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        raise NotImplementedError


class DenoisingError(ActionDiffusion, Detector):
    """Random or fixed levels."""

    scale: Tensor | None = None

    def finish(self, dataset: Dataset, rng: Rng) -> None:
        if not self.config.fixed_levels:
            return
        batch = dataset.transitions(rng, FIT_ROWS)
        obs, action = self.normalizer(batch.obs), self.bounds.unit(batch.action)
        self.scale = self.errors(obs, action, rng).mean(dim=1)  # [K, L]

    def errors(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        levels = Levels(self.config.levels, self.config.fixed_levels)
        draws = levels.draw(rng, *action.shape[1:])
        net: Any = self.model
        return level_errors(denoiser_of(net, obs), action, *draws)

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        return mean_error(self.errors(obs, action, rng), self.scale)


class Disagreement(Dynamics, Detector):
    """Of dynamics networks."""

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        model: Any = self.model
        return model.disagreement(obs, action)


class Dropout(Detector):
    """Of one dynamics network."""

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: Any) -> nn.Module:
        width = config.hidden_dim
        sizes = (spec.obs_dim + spec.action_dim, width, width, spec.obs_dim + 1)
        return MLP(rng, sizes, dropout_rate=config.dropout_rate)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        target = torch.cat((self.normalizer(batch.next_obs), batch.reward.unsqueeze(-1)), dim=-1)
        pair = torch.cat((self.normalizer(batch.obs), self.bounds.unit(batch.action)), dim=-1)
        loss = (model(pair, rng) - target).square().mean(dim=(1, 2))
        return loss, {"loss": loss}

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        pair = torch.cat((obs, action), dim=-1)
        predicted = torch.stack([self.model(pair, rng) for _ in range(self.config.passes)])
        return predicted[..., :-1].var(dim=0, correction=0).mean(dim=-1).sqrt()


class Reconstruction(ActionCVAE, Detector):
    """Of a conditional VAE."""

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        model: Any = self.model
        return model.error(obs, action)


class RandomNetwork(Detector):
    """Error of predicting a random network's outputs."""

    def __init__(
        self,
        config: DetectorConfig,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, spec, seeds, inputs)
        other = CounterRng.at_step(seeds, 1, Stream.INITIALISATION)
        self.target = self.build(other, spec, config)

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: Any) -> nn.Module:
        width = config.hidden_dim
        sizes = (spec.obs_dim + spec.action_dim, width, width, config.feature_dim)
        return MLP(rng, sizes)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        pair = torch.cat((self.normalizer(batch.obs), self.bounds.unit(batch.action)), dim=-1)
        loss = (model(pair) - self.target(pair)).square().mean(dim=(1, 2))
        return loss, {"loss": loss}

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        pair = torch.cat((obs, action), dim=-1)
        return (self.model(pair) - self.target(pair)).square().mean(dim=-1)


class Neighbours(Detector):
    """Distance to the k-th nearest pair of the data; nothing is trained."""

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: Any) -> nn.Module:
        return MLP(rng, (1, 1))  # no network: a learner has one

    def finish(self, dataset: Dataset, rng: Rng) -> None:
        size = min(self.config.memory, dataset.spec.num_steps)
        start = rng.integers(dataset.spec.num_steps, 1)
        # Evenly spaced from a random row: no pair twice, of which a draw would have many.
        place = torch.arange(size, device=start.device) * dataset.spec.num_steps // size
        batch = dataset.rows((start + place) % dataset.spec.num_steps)
        obs, action = self.normalizer(batch.obs), self.bounds.unit(batch.action)
        self.pairs = torch.cat((obs, action), dim=-1)  # [K, M, O + A]

    def raw_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        distance = torch.cdist(torch.cat((obs, action), dim=-1), self.pairs)
        nearest = min(self.config.neighbour, self.pairs.shape[1])
        return distance.kthvalue(nearest, dim=-1).values


def detectors(config: DetectorConfig | None = None) -> dict[str, tuple[type, DetectorConfig]]:
    """Name -> class and config, in the order of the table above."""
    base = config or DetectorConfig()
    stratified = (0.05, 0.2, 0.5, 2.0, 5.0)
    return {
        "diffusion_1": (DenoisingError, base),
        "diffusion_10": (DenoisingError, replace(base, levels=10)),
        "stratified": (DenoisingError, replace(base, fixed_levels=stratified)),
        "ensemble": (Disagreement, replace(base, members=5)),
        "dropout": (Dropout, base),
        "cvae": (Reconstruction, base),
        "neighbours": (Neighbours, replace(base, steps=0)),
        "rnd": (RandomNetwork, base),
    }
