"""Implicit Q-learning (Kostrikov, Nair and Levine, ICLR 2022, arXiv:2110.06169).

No action outside the data is ever evaluated: V is an upper expectile of Q over the data's actions,
Q is regressed on r + gamma V(s'), and the policy is cloned with weights exp(beta (Q - V)).

    paper      here              where
    V          value             Eq. 5, expectile regression on the min of the target critics
    Q          critic            Eq. 6, two networks
    pi         actor             Eq. 7, advantage-weighted log-likelihood
    tau        expectile         asymmetry of the loss of V
    beta       inv_temperature   0 is behaviour cloning
    --         max_weight        weights are clipped here
    gamma      discount
    alpha      tau               rate of the target critics, every step

Defaults are the official (JAX) code's, gym configuration: per step V, then with the new V the actor
and Q, then the targets; the sum of both critics' losses; orthogonal networks; the actor's rate
falls to 0 as a cosine. CORL's variant, which made other published numbers, differs in the fields
`value_in_use`, `q_loss`, `log_std_min`, `normalize_obs`, `orthogonal_init`, `action_margin` and, on
some datasets, `deterministic`; the recipe `iql_corl` sets them.
The Gaussian is not squashed: its mean is a tanh, samples may leave the bounds. Acting
uses the mean.
Deviations: bounds of the actions may differ by dimension (the mean is stretched to them, the
log-std stays in units of the action).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import (
    QEnsemble,
    Value,
    expectile_loss,
    polyak_update,
    squared_td_error,
    td_target,
)
from algorithms.blocks.gaussians import DiagonalGaussian, normal_log_prob
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, cosine_decay, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices


@dataclass(frozen=True)
class Config:
    """Defaults: official code, gym configuration; per-dataset values in hparams/."""

    steps: int = 1_000_000  # gradient steps
    batch_size: int = 256  # shared by all losses
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, every step
    lr: float = 3e-4  # actor; at the start, see lr_decay
    critic_lr: float = 3e-4  # critics and V, an optimizer each
    lr_decay: bool = True  # the actor's rate falls to 0 at `steps` as a cosine
    hidden_dim: int = 256  # width of the 2 hidden layers of all networks
    expectile: float = 0.7  # tau of the paper, in (0, 1)
    inv_temperature: float = 3.0  # beta of the paper
    max_weight: float = 100.0  # largest exp(beta (Q - V))
    dropout_rate: float = 0.0  # of the actor's hidden layers while training
    deterministic: bool = False  # squared error (sum over dimensions) instead of log-likelihood
    log_std_min: float = -5.0  # official -5, CORL -20
    log_std_max: float = 2.0  # both codes
    action_margin: float = 1e-5  # data's actions are kept off the bounds by it; CORL 0
    value_in_use: str = "updated"  # V in advantage and target: updated (official) | previous (CORL)
    q_loss: str = "sum"  # of both critics' mean squared errors: sum (official) | mean (CORL)
    orthogonal_init: bool = True  # gain sqrt(2), zero biases (official); else PyTorch's (CORL)
    normalize_obs: bool = False  # act on (s - mean) / (std + 1e-3); CORL does

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "value_in_use": ("updated", "previous"),
                "q_loss": ("sum", "mean"),
            },
        )
        if not 0.0 < self.expectile < 1.0:
            raise ValueError(f"expectile is {self.expectile}; expected a number in (0, 1)")


class IQL(nn.Module):
    """Learner and policy; see the module's docstring."""

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
        hidden = (config.hidden_dim,) * 2
        gain = math.sqrt(2.0) if config.orthogonal_init else None
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        if config.normalize_obs:
            statistics = spec.statistics
            self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        self.actor = DiagonalGaussian(
            rng,
            (spec.obs_dim, *hidden, spec.action_dim),
            (config.log_std_min, config.log_std_max),
            orthogonal_gain=gain,
            dropout_rate=config.dropout_rate,
        )
        self.actor_optim = Adam(self.actor, config.lr)
        self.value = Value(rng, spec.obs_dim, hidden, orthogonal_gain=gain)
        self.value_optim = Adam(self.value, config.critic_lr)
        self.critic = QEnsemble(rng, spec.obs_dim, spec.action_dim, hidden, orthogonal_gain=gain)
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One step: V, actor, Q, target critics."""
        obs = self.normalize(batch.obs)
        action = self.bounds.clamp(batch.action, self.config.action_margin)
        next_obs = self.normalize(batch.next_obs)
        q = self.target_critic(obs, action).amin(dim=1)  # [K, B]
        previous = self.config.value_in_use == "previous"
        if previous:
            v, next_v = self.value(obs), self.value(next_obs)
        grads, metrics = gradients(self.value, lambda value: self.value_loss(value, obs, q))
        self.value_optim.step(self.value, grads)
        if not previous:
            v, next_v = self.value(obs), self.value(next_obs)
        weight = torch.exp(self.config.inv_temperature * (q - v)).clamp(max=self.config.max_weight)
        metrics |= self.update_actor(obs, action, weight, rng)
        target = td_target(batch.reward, batch.terminated, next_v, self.config.discount)
        grads, found = gradients(
            self.critic, lambda critic: self.critic_loss(critic, obs, action, target)
        )
        metrics |= found | {"critic_grad_norm": self.critic_optim.step(self.critic, grads)}
        polyak_update(self.target_critic, self.critic, self.config.tau)
        return metrics

    def value_loss(self, value: Any, obs: Tensor, q: Tensor) -> tuple[Tensor, Metrics]:  # Eq. 5
        v = value(obs)  # [K, B]
        per_seed = expectile_loss(q - v, self.config.expectile).mean(dim=-1)
        return per_seed, {"value_loss": per_seed, "v": v.mean(dim=-1)}

    def critic_loss(
        self, critic: Any, obs: Tensor, action: Tensor, target: Tensor
    ) -> tuple[Tensor, Metrics]:  # Eq. 6
        q = critic(obs, action)  # [K, 2, B]
        per_seed = squared_td_error(q, target)
        if self.config.q_loss == "mean":
            per_seed = per_seed / q.shape[1]
        return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

    def update_actor(self, obs: Tensor, action: Tensor, weight: Tensor, rng: Rng) -> Metrics:
        grads, metrics = gradients(
            self.actor, lambda actor: self.actor_loss(actor, obs, action, weight, rng)
        )
        scale = cosine_decay(rng.step, self.config.steps) if self.config.lr_decay else None
        metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, grads, scale)
        return metrics | {"weight": weight.mean(dim=-1)}

    def actor_loss(
        self, actor: Any, obs: Tensor, action: Tensor, weight: Tensor, rng: Rng
    ) -> tuple[Tensor, Metrics]:  # Eq. 7
        """Weighted cloning, [K]; dropout draws only if there is some."""
        unit_mean, log_std = actor(obs, rng)
        mean = self.bounds.stretch(unit_mean)  # [K, B, A]
        if self.config.deterministic:
            error = (mean - action).square().sum(dim=-1)
        else:
            error = -normal_log_prob(action, mean, log_std)
        per_seed = (weight * error).mean(dim=-1)
        return per_seed, {"actor_loss": per_seed}

    def normalize(self, obs: Tensor) -> Tensor:
        return self.normalizer(obs) if self.config.normalize_obs else obs

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a|s), [K, N]."""
        unit_mean, log_std = self.actor(self.normalize(obs))
        return normal_log_prob(action, self.bounds.stretch(unit_mean), log_std)

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """The policy's mean: [K, N, O] -> [K, N, A]."""
        return self.bounds.stretch(self.actor(self.normalize(obs))[0])


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", IQL, config, config.steps),)


recipe = Recipe(
    name="iql",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "iql.yaml",
    summary="Implicit Q-learning, as in its official code",
    paper="arXiv:2110.06169",
)

corl_recipe = Recipe(
    name="iql_corl",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "iql_corl.yaml",
    summary="Implicit Q-learning, with CORL's differences and values",
    paper="CORL, arXiv:2210.07105",
)
