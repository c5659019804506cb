"""TD3+BC (Fujimoto and Gu, NeurIPS 2021, arXiv:2106.06860).

TD3 whose actor is also drawn to the actions of the data:

    pi = argmax  lambda Q(s, pi(s)) - (pi(s) - a)**2,    lambda = alpha / mean |Q(s, pi(s))|

    paper      here            where
    pi         actor           deterministic, tanh output scaled to the bounds
    Q          critic          two action-value networks; the actor is moved along the first
    alpha      q_coef          Eq. 5
    lambda     --              detached; computed on the batch the actor is trained on
    gamma      discount
    tau        tau             rate of all targets, in the steps that update the actor
    sigma, c   policy_noise, noise_clip    smoothing of the target's action
    d          policy_every    steps between updates of the actor

Defaults are the official code's, which CORL shares for all of its datasets. As there, the actor and
all targets are updated in steps d, 2 d, ... (counted from 1). CORL's shift of AntMaze's rewards is
a data transform.
Deviations: bounds of the actions may differ by dimension; noise is in units of half their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import QEnsemble, polyak_update, squared_td_error, td_target
from algorithms.blocks.gaussians import normal_log_prob
from algorithms.blocks.layers import MLP, frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_positive


@dataclass(frozen=True)
class Config:
    """Defaults: official code, the same for all of its datasets."""

    steps: int = 1_000_000  # gradient steps
    batch_size: int = 256  # official code
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of all targets, whenever the actor is updated
    lr: float = 3e-4  # actor
    critic_lr: float = 3e-4  # both critics
    hidden_dim: int = 256  # width of the 2 hidden layers of actor and critics
    policy_noise: float = 0.2  # std of the noise on the target's action, in half widths of bounds
    noise_clip: float = 0.5  # largest absolute value of that noise
    policy_every: int = 2  # d: steps between updates of the actor and of all targets
    q_coef: float = 2.5  # alpha: weight of Q against cloning; larger clones less
    normalize_obs: bool = True  # act on (s - mean) / (std + 1e-3), statistics of the dataset

    def __post_init__(self) -> None:
        check_positive(self, "policy_every")


class TD3BC(nn.Module):
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
        self.period = config.policy_every
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        hidden = (config.hidden_dim,) * 2
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        if config.normalize_obs:
            statistics = spec.statistics
            self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        self.actor = MLP(rng, (spec.obs_dim, *hidden, spec.action_dim))
        self.actor_optim = Adam(self.actor, config.lr)
        self.target_actor = frozen_copy(self.actor)
        self.critic = QEnsemble(rng, spec.obs_dim, spec.action_dim, hidden)
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng, phase: int) -> Metrics:
        """The critics; in the period's last step also the actor against them, then all targets."""
        obs, next_obs = self.normalize(batch.obs), self.normalize(batch.next_obs)
        metrics = self.update_critic(obs, batch, self.q_target(next_obs, batch, rng))
        if phase == self.period - 1:
            metrics |= self.update_actor(obs, batch.action)
            polyak_update(self.target_critic, self.critic, self.config.tau)
            polyak_update(self.target_actor, self.actor, self.config.tau)
        return metrics

    def q_target(self, next_obs: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """r + gamma min Q'(s', pi'(s') + noise), the noise and the sum clipped: [K, B]."""
        config = self.config
        next_action = self.policy(self.target_actor, next_obs)
        next_action = self.bounds.smooth(next_action, rng, config.policy_noise, config.noise_clip)
        next_v = self.target_critic(next_obs, next_action).amin(dim=1)
        return td_target(batch.reward, batch.terminated, next_v, config.discount)

    def update_critic(self, obs: Tensor, batch: Batch, target: Tensor) -> Metrics:
        def loss(critic: Any) -> tuple[Tensor, Metrics]:
            q = critic(obs, batch.action)  # [K, 2, B]
            per_seed = squared_td_error(q, target)
            return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

        grads, metrics = gradients(self.critic, loss)
        metrics["critic_grad_norm"] = self.critic_optim.step(self.critic, grads)
        return metrics

    def update_actor(self, obs: Tensor, action: Tensor) -> Metrics:
        grads, metrics = gradients(self.actor, lambda actor: self.actor_loss(actor, obs, action))
        metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, grads)
        return metrics

    def actor_loss(self, actor: Any, obs: Tensor, action: Tensor) -> tuple[Tensor, Metrics]:
        """-lambda Q1(s, pi(s)) + (pi(s) - a)**2, mean over batch (and dimensions): Eq. 5, [K]."""
        chosen = self.policy(actor, obs)  # [K, B, A]
        q = self.critic.member(0, obs, chosen)  # [K, B]
        scale = self.config.q_coef / q.abs().mean(dim=-1).detach()
        bc_loss = (chosen - action).square().mean(dim=(1, 2))
        per_seed = bc_loss - scale * q.mean(dim=-1)
        return per_seed, {"actor_loss": per_seed, "bc_loss": bc_loss}

    def policy(self, actor: Any, obs: Tensor) -> Tensor:
        """Of normalised observations: [K, *rows, O] -> [K, *rows, A]."""
        return self.bounds.stretch(torch.tanh(actor(obs)))

    def normalize(self, obs: Tensor) -> Tensor:
        return self.normalizer(obs) if self.config.normalize_obs else obs

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """log N(action; pi(s), 1), the stand-in where a density is needed: [K, N]."""
        mean = self.policy(self.actor, self.normalize(obs))
        return normal_log_prob(action, mean, torch.zeros_like(mean))

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """[K, N, O] -> [K, N, A]."""
        return self.policy(self.actor, self.normalize(obs))


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", TD3BC, config, config.steps),)


recipe = Recipe(
    name="td3_bc",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "td3_bc.yaml",
    summary="TD3 with a squared-error pull towards the data's actions",
    paper="arXiv:2106.06860",
)
