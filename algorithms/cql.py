"""Conservative Q-learning (Kumar et al., NeurIPS 2020, arXiv:2006.04779), as in CORL.

Soft actor-critic whose critics are pushed down on actions the policy would take and up on the
data's, CQL(H):

    alpha' ( log sum_a exp Q(s, a) - Q(s, a_data) ) + 1/2 (Bellman error)**2

The sum over all actions is estimated from uniform actions and from the policy's, each divided by
its density (importance weights).

    paper     here                  where
    Q         critic                two networks, a regulariser each; no factor 1/2 in the code
    pi        actor                 tanh-Gaussian
    alpha     cql_coef              Eq. 4; with a Lagrange multiplier on top if `lagrange`
    tau       target_gap            Eq. 30: the multiplier grows while the gap is above it
    --        entropy_coef          SAC's temperature, tuned so that entropy stays near -dim(A)
    gamma     discount

Everything in a step is computed with the parameters it starts with, then all are updated.
The official code is unmaintained; the defaults are CORL's, gym values, whose code differs from the
paper: (1) actions of the policy at s' are scored at s. (2) No entropy in the target. (3) The
log-std has a learned multiplier and offset. (4) On AntMaze critic 1 has 5 hidden layers and critic
2 three, as CORL's option reaches the first only (`critic_layers`, `second_critic_layers`).
Deviations: (a) CORL's warm-up by cloning (`bc_steps`) is left out: it is 0 in every config, and its
log-density ignores the given actions. (b) Bounds of the actions may differ by dimension; densities
are those of actions scaled to [-1, 1], as in CORL.
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
from algorithms.blocks.critics import QEnsemble, polyak_update, squared_td_error, td_target
from algorithms.blocks.entropy import LogScalar, entropy_loss, positive
from algorithms.blocks.gaussians import TanhGaussian, tanh_normal
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_positive

OUTPUT_GAIN = 0.01  # of all last layers


@dataclass(frozen=True)
class Config:
    """Defaults: CORL, gym; per-dataset values in hparams/."""

    steps: int = 1_000_000  # gradient steps
    batch_size: int = 256  # CORL
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, every step
    lr: float = 3e-5  # actor and temperature; policy_lr: gym 3e-5, antmaze and adroit 1e-4
    critic_lr: float = 3e-4  # critics and Lagrange multiplier; qf_lr
    hidden_dim: int = 256  # width of all hidden layers; the actor has 3
    critic_layers: int = 3  # hidden layers of critic 1; 5 on antmaze
    second_critic_layers: int = 3  # of critic 2; CORL's option for it has no effect there
    orthogonal_init: bool = True  # critics: gain sqrt(2), last layer 0.01, zero biases
    cql_coef: float = 10.0  # alpha: weight of the regulariser; gym 10, antmaze 5, adroit 1
    num_actions: int = 10  # actions of each of the three kinds in the regulariser
    temperature: float = 1.0  # of the log-sum-exp
    gap_min: float = -1e9  # smallest value of a sample's gap; antmaze -200, off in effect elsewhere
    lagrange: bool = False  # tune a multiplier of cql_coef so that the gap stays near target_gap
    target_gap: float = -1.0  # only under `lagrange`: antmaze 0.8, maze2d 5
    initial_log_multiplier: float = 1.0  # log of the multiplier at the start
    max_backup: bool = False  # next value: best of `num_actions` (antmaze)
    backup_entropy: bool = False  # subtract entropy_coef * log pi from the next value
    normalize_obs: bool = True  # act on (s - mean) / (std + 1e-3); antmaze does not

    def __post_init__(self) -> None:
        check_positive(self, "critic_layers", "second_critic_layers", "num_actions")


class Critics(nn.Module):
    """Two action-value networks, as one ensemble where their depths agree: [K, 2, *rows]."""

    def __init__(self, rng: Rng, spec: DatasetSpec, config: Config) -> None:
        super().__init__()
        depths = [config.critic_layers, config.second_critic_layers]
        count = 2 if depths[0] == depths[1] else 1
        self.groups = nn.ModuleList(
            QEnsemble(
                rng,
                spec.obs_dim,
                spec.action_dim,
                (config.hidden_dim,) * depth,
                num_critics=count,
                orthogonal_gain=math.sqrt(2.0) if config.orthogonal_init else None,
                output_gain=OUTPUT_GAIN,
            )
            for depth in depths[: 3 - count]
        )
        if not config.orthogonal_init:
            for group in self.groups:
                last: Any = group.get_submodule("net.layers")[-1]  # type: ignore[index]
                fan_in = last.weight.shape[-2]  # Xavier's bound over the layer's own 1/sqrt(in)
                last.weight.mul_(OUTPUT_GAIN * math.sqrt(6.0 * fan_in / (fan_in + 1)))
                last.bias.zero_()

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat([group(obs, action) for group in self.groups], dim=1)


class CQL(nn.Module):
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
        self.target_entropy = -float(spec.action_dim)
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        if config.normalize_obs:
            statistics = spec.statistics
            self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        sizes = (spec.obs_dim, *(config.hidden_dim,) * 3, spec.action_dim)
        self.actor = TanhGaussian(rng, sizes, output_gain=OUTPUT_GAIN)
        self.actor_optim = Adam(self.actor, config.lr)
        self.entropy_coef = LogScalar(rng, 0.0)
        self.entropy_optim = Adam(self.entropy_coef, config.lr)
        self.critic = Critics(rng, spec, config)
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)
        if config.lagrange:
            self.multiplier = LogScalar(rng, config.initial_log_multiplier)
            self.multiplier_optim = Adam(self.multiplier, config.critic_lr)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """Gradients of temperature, actor, multiplier and critics; then their steps; targets."""
        obs, next_obs = self.normalize(batch.obs), self.normalize(batch.next_obs)
        entropy_coef = self.entropy_coef.value()
        noise = rng.normal(*batch.action.shape[1:])

        actor_grads, metrics = gradients(
            self.actor, lambda actor: self.actor_loss(actor, obs, noise, entropy_coef)
        )
        log_pi = metrics["log_pi"]
        entropy_grads, found = gradients(
            self.entropy_coef, lambda coef: entropy_loss(coef, log_pi, self.target_entropy)
        )
        metrics |= found
        target = self.q_target(next_obs, batch, entropy_coef, rng)
        actions, log_density = self.ood_actions(obs, next_obs, batch.action, rng)
        critic_grads, found = gradients(
            self.critic,
            lambda critic: self.critic_loss(critic, obs, actions, log_density, target),
        )
        metrics |= found

        if self.config.lagrange:
            grads, found = gradients(
                self.multiplier, lambda multiplier: self.multiplier_loss(multiplier, found["gap"])
            )
            self.multiplier_optim.step(self.multiplier, grads)
            metrics |= found
        metrics["critic_grad_norm"] = self.critic_optim.step(self.critic, critic_grads)
        metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, actor_grads)
        self.entropy_optim.step(self.entropy_coef, entropy_grads)
        polyak_update(self.target_critic, self.critic, self.config.tau)
        return metrics

    def actor_loss(
        self, actor: Any, obs: Tensor, noise: Tensor, entropy_coef: Tensor
    ) -> tuple[Tensor, Metrics]:
        """SAC: entropy_coef * log pi - min Q, mean over the batch, [K]."""
        mean, log_std = actor(obs)
        unit, log_pi = tanh_normal(mean, log_std, noise)
        q = self.critic(obs, self.bounds.stretch(unit)).amin(dim=1)  # [K, B]
        per_seed = (entropy_coef.unsqueeze(1) * log_pi - q).mean(dim=-1)
        return per_seed, {"actor_loss": per_seed, "log_pi": log_pi.mean(dim=-1)}

    def q_target(self, next_obs: Tensor, batch: Batch, entropy_coef: Tensor, rng: Rng) -> Tensor:
        """r + gamma min Q'(s', a'), a' the policy's (or the best of several): [K, B]."""
        count = self.config.num_actions if self.config.max_backup else 1
        action, log_pi = self.draw(next_obs, count, rng)  # [K, C, B, A], [K, C, B]
        next_q = self.target_critic(_repeat(next_obs, count), action).amin(dim=1)  # [K, C, B]
        next_v, best = next_q.max(dim=1)
        if self.config.backup_entropy:
            log_pi = log_pi.gather(1, best.unsqueeze(1)).squeeze(1)
            next_v = next_v - entropy_coef.unsqueeze(1) * log_pi
        return td_target(batch.reward, batch.terminated, next_v, self.config.discount)

    def ood_actions(
        self, obs: Tensor, next_obs: Tensor, action: Tensor, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """The data's action, then uniform ones, the policy's at s' and at s, with log densities.

        [K, 1 + 3 C, B, A] and, without the data's, [K, 3 C, B].
        """
        count, (rows, dim) = self.config.num_actions, action.shape[1:]
        uniform = self.bounds.stretch(2.0 * rng.uniform(count, rows, dim) - 1.0)
        density = torch.full_like(uniform[..., 0], dim * math.log(0.5))
        at_next, next_log_pi = self.draw(next_obs, count, rng)
        at_obs, log_pi = self.draw(obs, count, rng)
        actions = torch.cat((action.unsqueeze(1), uniform, at_next, at_obs), dim=1)
        return actions, torch.cat((density, next_log_pi, log_pi), dim=1)

    def critic_loss(
        self, critic: Any, obs: Tensor, actions: Tensor, log_density: Tensor, target: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Squared errors plus weighted gaps, summed over the critics: [K]."""
        config = self.config
        q = critic(_repeat(obs, actions.shape[1]), actions)  # [K, 2, 1 + 3 C, B]
        data_q = q[:, :, 0]
        td_error = squared_td_error(data_q, target)
        scores = (q[:, :, 1:] - log_density.unsqueeze(1)) / config.temperature
        gap = config.temperature * torch.logsumexp(scores, dim=2) - data_q  # [K, 2, B]
        gap = gap.clamp(min=config.gap_min).mean(dim=-1)  # [K, 2]
        metrics = {"td_error": td_error, "q": data_q.mean(dim=(1, 2)), "gap": gap.mean(dim=-1)}
        if config.lagrange:
            excess = (gap - config.target_gap).sum(dim=-1)
            penalty = self.multiplier.value() * config.cql_coef * excess
        else:
            penalty = config.cql_coef * gap.sum(dim=-1)
        per_seed = td_error + penalty
        return per_seed, metrics | {"critic_loss": per_seed}

    def multiplier_loss(self, multiplier: Any, gap: Tensor) -> tuple[Tensor, Metrics]:
        """-alpha' cql_coef (gap - target gap), mean over the critics: Eq. 30, [K]."""
        now = positive(multiplier())
        per_seed = -now * self.config.cql_coef * (gap - self.config.target_gap)
        return per_seed, {"multiplier": now}

    def draw(self, obs: Tensor, count: int, rng: Rng) -> tuple[Tensor, Tensor]:
        """`count` actions of the policy at each observation and their log densities.

        [K, C, B, A] and [K, C, B]; the network is evaluated once for all of them.
        """
        mean, log_std = (value.unsqueeze(1) for value in self.actor(obs))
        noise = rng.normal(count, *mean.shape[2:])
        unit, log_pi = tanh_normal(mean, log_std, noise)
        return self.bounds.stretch(unit), log_pi

    def normalize(self, obs: Tensor) -> Tensor:
        return self.normalizer(obs) if self.config.normalize_obs else obs

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """tanh of the Gaussian's mean: [K, N, O] -> [K, N, A]."""
        return self.bounds.stretch(torch.tanh(self.actor(self.normalize(obs))[0]))


def _repeat(obs: Tensor, count: int) -> Tensor:
    """[K, B, O] -> [K, C, B, O] without a copy."""
    return obs.unsqueeze(1).expand(-1, count, -1, -1)


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", CQL, config, config.steps),)


recipe = Recipe(
    name="cql",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "cql.yaml",
    summary="Conservative Q-learning on soft actor-critic, as in CORL",
    paper="arXiv:2006.04779",
)
