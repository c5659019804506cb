"""Behaviour cloning: the action of the data as a function of the observation.

    symbol     here      where
    pi(s)      actor     tanh network scaled to the action bounds, or the mean of a Gaussian
    sigma(s)   actor     standard deviation of the Gaussian

Two heads. `deterministic` is CORL's BC (any-percent BC): 2 x 256 ReLU, tanh output, squared error,
normalised observations. `gaussian` is the maximum-likelihood baseline of Diffusion-QL's bandit
figure (BC-MLE): an unsquashed diagonal Gaussian with a standard deviation per observation.
10 % BC, cloning the 10 % of the episodes with the highest returns, is the preset `top10`.
The Gaussian's log-std is clamped to [-20, 2], as in that figure's code (toy_experiments/bc_mle.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.gaussians import normal_log_prob
from algorithms.blocks.layers import MLP
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


@dataclass(frozen=True)
class Config:
    """Defaults: CORL's BC, the same for all of its datasets."""

    steps: int = 1_000_000  # gradient steps
    batch_size: int = 256  # CORL
    lr: float = 3e-4  # Adam
    hidden_dim: int = 256  # width of the 2 hidden layers
    head: str = "deterministic"  # deterministic (tanh, squared error) | gaussian (likelihood)
    sample_actions: bool = False  # gaussian only: act by a sample instead of the mean
    normalize_obs: bool = True  # act on (s - mean) / (std + 1e-3), statistics of the dataset

    def __post_init__(self) -> None:
        if self.head not in ("deterministic", "gaussian"):
            raise ValueError(f"head is {self.head!r}; expected deterministic or gaussian")
        if self.sample_actions and self.head != "gaussian":
            raise ValueError("sample_actions needs head: gaussian; a deterministic head has no std")


class BehaviourCloning(nn.Module):
    """Learner and policy; see the module's docstring."""

    low: Tensor
    high: Tensor

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        self.register_buffer("low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.action_high), persistent=False)
        if config.normalize_obs:
            statistics = spec.statistics
            self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        out_dim = spec.action_dim * (1 if config.head == "deterministic" else 2)
        self.actor = MLP(rng, (spec.obs_dim, config.hidden_dim, config.hidden_dim, out_dim))
        self.optim = Adam(self.actor, config.lr)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        loss = self.squared_error if self.config.head == "deterministic" else self.neg_log_prob
        grads, metrics = gradients(self.actor, lambda actor: loss(actor, batch))
        metrics["grad_norm"] = self.optim.step(self.actor, grads)
        return metrics

    def squared_error(self, actor: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean over batch and action dimensions, [K]."""
        error = self.squash(actor(self.normalize(batch.obs))) - batch.action  # [K, B, A]
        per_seed = error.square().mean(dim=(1, 2))
        return per_seed, {"bc_loss": per_seed}

    def neg_log_prob(self, actor: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """-log N(a; mean(s), std(s)**2), sum over action dimensions, mean over the batch, [K]."""
        mean, log_std = self.gaussian(actor(self.normalize(batch.obs)))
        per_seed = -normal_log_prob(batch.action, mean, log_std).mean(dim=-1)
        return per_seed, {"bc_loss": per_seed, "std": torch.exp(log_std).mean(dim=(1, 2))}

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """[K, N, O] -> [K, N, A]."""
        return self.act_unclamped(obs, rng).clamp(self.low, self.high)

    def act_unclamped(self, obs: Tensor, rng: Rng) -> Tensor:
        """The same draw before it is moved into the bounds, which a Gaussian knows nothing of."""
        output = self.actor(self.normalize(obs))
        if self.config.head == "deterministic":
            return self.squash(output)
        action, log_std = self.gaussian(output)
        if self.config.sample_actions:
            action = action + torch.exp(log_std) * rng.normal(*action.shape[1:])
        return action

    def normalize(self, obs: Tensor) -> Tensor:
        return self.normalizer(obs) if self.config.normalize_obs else obs

    def squash(self, output: Tensor) -> Tensor:
        """tanh stretched to the bounds; tanh * max_action where they are symmetric."""
        middle, reach = (self.high + self.low) / 2.0, (self.high - self.low) / 2.0
        return middle + reach * torch.tanh(output)

    @staticmethod
    def gaussian(output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = output.chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", BehaviourCloning, config, config.steps),)


recipe = Recipe(
    name="bc",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "bc.yaml",
    summary="Behaviour cloning with a deterministic or a Gaussian policy",
    paper="CORL, arXiv:2210.07105",
)
