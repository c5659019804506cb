"""World model: a probabilistic ensemble rolled out step by step (PETS; settings of Unifloral).

Each of E networks gives a mean and a log-variance of [change of the observation, reward], both
standardised, and a logit of termination. The log-variances are clamped softly between limits that
are trained as well:

    loss = mean((error^2 exp(-log_var) + log_var), over rows and entries)
           + limit_coef sum(max_log_var - min_log_var) + cross-entropy of termination

summed over members. The best members by squared error on held-out rows are the elites, and every
step of a roll-out is drawn from a random one.
Deviations from Unifloral: (1) termination is learned; there, each environment's rule is known.
(2) a row is held out by a hash of its observation instead of a random split. (3) inputs and targets
are standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Rng
from algorithms.blocks.layers import MLP, constant
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, decay_weights, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream

HASH_PRIME = 65_521  # of the split into training and held-out rows
ERROR_DECAY = 0.99  # of the running error on held-out rows


@dataclass(frozen=True)
class DynamicsConfig:
    """Defaults: Unifloral."""

    batch_size: int = 256  # rows of a step, before some are held out
    lr: float = 1e-3  # AdamW
    weight_decay: float = 2.5e-5  # decoupled from Adam
    hidden_dim: int = 200  # width of the hidden layers
    num_layers: int = 4  # hidden layers, ReLU
    num_members: int = 7  # E
    num_elites: int = 5  # members that are rolled out
    held_out: float = 0.2  # share of the rows that elites are chosen by
    limit_coef: float = 0.01  # weight of the gap between the limits of the log-variance

    def __post_init__(self) -> None:
        if not 1 <= self.num_elites <= self.num_members:
            raise ValueError(
                f"num_elites is {self.num_elites}; expected 1 to num_members = {self.num_members}"
            )
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out is {self.held_out}; expected a number in (0, 1)")


class Ensemble(nn.Module):
    """E networks of one-step predictions for inputs [K, N, O + A]."""

    def __init__(self, rng: CounterRng, config: DynamicsConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        sizes = (in_dim, *(config.hidden_dim,) * config.num_layers, 2 * out_dim + 1)
        self.net = MLP(rng, sizes, ensemble=config.num_members)
        ones = torch.ones(rng.num_seeds, config.num_members, 1, out_dim, device=rng.step.device)
        self.max_log_var = constant(0.5 * ones)  # [K, E, 1, out_dim]
        self.min_log_var = constant(-10.0 * ones)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and log-variance [K, E, N, out_dim], logit of termination [K, E, N], and the gap
        between the limits of the log-variance, summed: [K]."""
        out = self.net(inputs.unsqueeze(1))
        mean, raw = out[..., :-1].chunk(2, dim=-1)
        log_var = self.max_log_var - functional.softplus(self.max_log_var - raw)
        log_var = self.min_log_var + functional.softplus(log_var - self.min_log_var)
        gap = (self.max_log_var - self.min_log_var).sum(dim=(1, 2, 3))
        return mean, log_var, out[..., -1], gap


class WorldModel(nn.Module):
    """Learner of the ensemble, and its roll-outs."""

    scale: Tensor
    reward_mean: Tensor
    errors: Tensor

    def __init__(
        self,
        config: DynamicsConfig,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        statistics = spec.statistics
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        scale = [*statistics.obs_std, statistics.reward_std]
        self.register_buffer(
            "scale", torch.tensor([s if s > 0 else 1.0 for s in scale]), persistent=False
        )  # [O + 1]
        self.register_buffer("reward_mean", torch.tensor(statistics.reward_mean), persistent=False)
        self.ensemble = Ensemble(rng, config, spec.obs_dim + spec.action_dim, spec.obs_dim + 1)
        self.optim = Adam(self.ensemble, config.lr)
        # Running squared error of each member on held-out rows, [K, E].
        self.register_buffer("errors", torch.zeros(rng.num_seeds, config.num_members))

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        config = self.config
        aside = held_out(batch.obs, config.held_out)  # [K, B]
        grads, metrics = gradients(
            self.ensemble, lambda ensemble: self.loss(ensemble, batch, 1.0 - aside)
        )
        mean = self.ensemble(self.inputs(batch.obs, batch.action))[0]
        error = (mean - self.target(batch).unsqueeze(1)).square().mean(dim=-1)  # [K, E, B]
        found = weighted_mean(error, aside.unsqueeze(1))
        # A batch without a held-out row says nothing about the members.
        some = (aside.sum(dim=-1, keepdim=True) > 0).float()
        self.errors.add_(some * (1.0 - ERROR_DECAY) * (found - self.errors))
        decay_weights(self.ensemble, config.lr * config.weight_decay * torch.ones_like(found[:, 0]))
        metrics["dynamics_grad_norm"] = self.optim.step(self.ensemble, grads)
        return metrics | {"held_out_error": self.errors.mean(dim=1)}

    def loss(self, ensemble: Any, batch: Batch, weight: Tensor) -> tuple[Tensor, Metrics]:
        """Of the rows with weight 1, [K]."""
        mean, log_var, logit, gap = ensemble(self.inputs(batch.obs, batch.action))
        error = (mean - self.target(batch).unsqueeze(1)).square()
        nll = (error * torch.exp(-log_var) + log_var).mean(dim=-1)  # [K, E, B]
        end = batch.terminated.unsqueeze(1).expand_as(logit)
        nll = nll + functional.binary_cross_entropy_with_logits(logit, end, reduction="none")
        fit = weighted_mean(nll, weight.unsqueeze(1)).sum(dim=1)
        return fit + self.config.limit_coef * gap, {"dynamics_loss": fit}

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat((self.normalizer(obs), action), dim=-1)

    def target(self, batch: Batch) -> Tensor:
        """[K, B, O + 1]."""
        reward = (batch.reward - self.reward_mean).unsqueeze(-1)
        return torch.cat((batch.next_obs - batch.obs, reward), dim=-1) / self.scale

    def elites(self) -> Tensor:
        """Indices of the best members, [K, num_elites]."""
        return self.errors.argsort(dim=1, stable=True)[:, : self.config.num_elites]

    def step(self, obs: Tensor, action: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """One step drawn from a random elite per row.

        Returns:
            Next observations [K, N, O], rewards [K, N] and terminations (0 or 1) [K, N].
        """
        rows = obs.shape[1]
        mean, log_var, logit, _ = self.ensemble(self.inputs(obs, action))
        pick = rng.integers(self.config.num_elites, rows)  # [K, N]
        member = self.elites().gather(1, pick).unsqueeze(1)  # [K, 1, N]
        mean, log_var = (
            x.take_along_dim(member.unsqueeze(-1), 1).squeeze(1) for x in (mean, log_var)
        )
        drawn = mean + torch.exp(0.5 * log_var) * rng.normal(rows, mean.shape[-1])
        change = drawn * self.scale
        terminated = (logit.take_along_dim(member, 1).squeeze(1) > 0.0).float()
        return obs + change[..., :-1], change[..., -1] + self.reward_mean, terminated

    def roll_out(self, act: Callable[[Tensor, Rng], Tensor], starts: Tensor, rng: Rng) -> Batch:
        """Windows of H steps under a policy, all on the model: [K, M, H, ...].

        Args:
            act: of a `Policy`.
            starts: observations [K, M, H, O]: the first of each window, and where step t starts if
                the one before it terminated.
        """
        steps = starts.shape[2]
        obs = starts[:, :, 0]
        rows: dict[str, list[Tensor]] = {
            name: [] for name in ("obs", "action", "reward", "next_obs", "terminated")
        }
        for t in range(steps):
            action = act(obs, rng)
            next_obs, reward, terminated = self.step(obs, action, rng)
            found = (obs, action, reward, next_obs, terminated)
            for kept, value in zip(rows.values(), found, strict=True):
                kept.append(value)
            if t + 1 < steps:
                obs = torch.where(terminated.unsqueeze(-1) > 0, starts[:, :, t + 1], next_obs)
        columns = {name: torch.stack(values, dim=2) for name, values in rows.items()}
        truncated = torch.zeros_like(columns["terminated"])
        truncated[:, :, -1] = 1.0 - columns["terminated"][:, :, -1]
        return Batch(**columns, truncated=truncated)


def held_out(obs: Tensor, share: float) -> Tensor:
    """1 for the rows that are held out, by a hash of the observation: [K, B, O] -> [K, B].

    A function of the observation alone, so that a row is on the same side in every batch.
    """
    bits = obs.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    # Factors below 2**16: products of 32 bits with them, summed over entries, stay in int64.
    factors = (torch.arange(obs.shape[-1], device=obs.device) * 7_919 + 40_503) % HASH_PRIME
    mixed = ((bits ^ (bits >> 13)) * factors).sum(dim=-1) % HASH_PRIME
    return ((mixed * 40_503) % HASH_PRIME < share * HASH_PRIME).float()


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Over the last dimension; 0 where all weights are 0."""
    return (values * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1.0)
