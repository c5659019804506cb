"""IDQL (Hansen-Estruch, Kostrikov, Janner, Kuba and Levine, 2023, arXiv:2304.10573).

Critics are learned from the data's actions alone, as in IQL, with any of three value losses f; the
policy they imply is recovered at evaluation, by choosing among samples of a diffusion model that
clones the behaviour.

    paper         here                where
    mu(a|s)       actor, ema_actor    residual noise network eps_theta(a^t, t, s); the EMA acts
    Q             critic              two action-value networks, target_critic their average
    V             value
    tau           expectile, quantile asymmetry of the value loss of that name
    alpha         exponential_scale   of exp(alpha u) - alpha u
    w(s, a)       implicit_weights    |f'(Q - V)| / |Q - V|, up to a constant
    T             denoise_steps       length of the chain
    N             num_candidates      samples to choose from
    gamma         discount

A step is one update of V, Q and target Q on `batch_size` rows, after `actor_updates` updates of
the actor on `actor_batch_size` rows each. The critic's rows are the first of the actor's, as in the
code.

Paper and official code differ, and the code exists in two versions (April and December 2023). The
default is the paper's protocol, "-A"; presets in hparams/ name "-1" and December's code:
(1) `actor_updates`, `actor_batch_size`: two updates of 1024 (paper). April's code slices its batch
of 2048 wrongly, so that one update sees all of it and the other is empty; December's does one of
512.
(2) `activation`, `time_dim`, `cond_dim`: Mish, 64, 128 (April); swish, 128, 256 (December).
(3) `weight_decay`: 0 (April); December's code leaves it to a default of 1e-4 on all parameters.
(4) `value_input_norm`: layer norm of V's input (December).
(5) `candidate_choice`: the argmax of Q (code, and better according to the paper); `implicit`
samples the implied actor. The code is right for the expectile only: its quantile weights can be
negative and its exponential ones are constant. Here all three follow the formula.
(6) `num_candidates`: 128 on locomotion, 32 on antmaze (paper); 64 in December's learner.
Deviations: (a) training uses all transitions; the code holds out a random 5 %. (b) the rows of a
batch depend on the seed; in the code their index stream does not. (c) the critics see the data's
actions as they are; the code keeps them 1e-5 inside the bounds there too. (d) bounds of the actions
may differ by dimension; in the code they are [-1, 1]. (e) left out: linear and quadratic
continuations of the exponential loss, extra passes at the last level (never used), the plain MLP
actor, fixed time features, online finetuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.candidates import pick, softmax_index
from algorithms.blocks.critics import (
    QEnsemble,
    Value,
    expectile_loss,
    exponential_loss,
    implicit_weights,
    polyak_update,
    quantile_loss,
    td_target,
)
from algorithms.blocks.ddpm import Diffusion
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.optim import Adam, cosine_decay, decay_weights, gradients
from algorithms.blocks.residual import ResidualNoiseNet, redraw, xavier_uniform
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices, check_positive

ACTION_MARGIN = 1e-5  # data actions stay this part of the half-range inside the bounds
HARD_THRESHOLD = -0.01  # hard_adv keeps actions whose Q - V is at least this
MAX_WEIGHT = 100.0  # of exp_adv


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's "-A" protocol on locomotion; per-dataset values in hparams/."""

    steps: int = 1_500_000  # critic updates; 1e6 in the paper's "-1", 3e6 in December's code
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, every step
    batch_size: int = 256  # rows of a critic update; 512 in December's code
    actor_batch_size: int = 1024  # rows of an actor update; 512 in December's code
    actor_updates: int = 2  # actor updates in a step; 1 in December's code
    lr: float = 3e-4  # actor
    critic_lr: float = 3e-4  # Q and V
    lr_decay: str = "cosine"  # actor: cosine (to 0 over its steps * actor_updates) | off
    weight_decay: float = 0.0  # actor, decoupled from Adam; 1e-4 in December's code
    critic_objective: str = "expectile"  # f: expectile | quantile | exponential
    expectile: float = 0.7  # tau in (0, 1) under `expectile`; 0.9 on antmaze
    quantile: float = 0.6  # tau in (0, 1) under `quantile` (paper)
    exponential_scale: float = 1.0  # alpha > 0 under `exponential` (paper)
    actor_objective: str = "bc"  # bc (published results) | soft_adv | hard_adv | exp_adv
    actor_inv_temperature: float = 3.0  # exp_adv: weight exp(this * (Q - V)), at most 100 (code)
    denoise_steps: int = 5  # T
    schedule: str = "vp"  # vp | linear | cosine
    sample_noise_scale: float = 1.0  # factor on the reverse chain's noise (ddpm_temperature)
    hidden_dim: int = 256  # width of the critics' 2 hidden layers and of the actor's residual path
    num_blocks: int = 3  # residual blocks of the actor, each 4 times as wide inside
    dropout_rate: float = 0.1  # inside the actor's blocks, training only
    activation: str = "mish"  # actor: mish (April's code) | silu (December's, swish)
    time_dim: int = 64  # Fourier features of the level; 128 in December's code
    cond_dim: int = 128  # widths of the 2 layers on them; 256 in December's code
    value_input_norm: bool = False  # layer norm of V's input (December's code)
    ema_decay: float = 0.999  # weight of the old EMA actor, every actor update
    num_candidates: int = 128  # N at evaluation; 32 on antmaze, 64 in the paper's "-1"
    candidate_choice: str = "greedy"  # greedy | softmax (of min target Q) | implicit (policy)
    choice_inv_temperature: float = 1.0  # under softmax: probability prop. to exp(this * Q)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "lr_decay": ("cosine", "off"),
                "critic_objective": ("expectile", "quantile", "exponential"),
                "actor_objective": ("bc", "soft_adv", "hard_adv", "exp_adv"),
                "candidate_choice": ("greedy", "softmax", "implicit"),
            },
        )
        check_positive(self, "batch_size", "actor_batch_size", "actor_updates", "num_candidates")
        for name in ("expectile", "quantile"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in (0, 1)")
        if not self.exponential_scale > 0.0:
            raise ValueError(f"exponential_scale is {self.exponential_scale}; expected more than 0")
        if self.actor_objective == "soft_adv" and self.critic_objective == "exponential":
            raise ValueError(
                "actor_objective soft_adv weighs by the value loss's asymmetry, and exponential "
                "has none; use expectile or quantile, or another actor_objective"
            )

    @property
    def objective_parameter(self) -> float:
        """The parameter of `critic_objective`."""
        return {
            "expectile": self.expectile,
            "quantile": self.quantile,
            "exponential": self.exponential_scale,
        }[self.critic_objective]


VALUE_LOSSES = {
    "expectile": expectile_loss,
    "quantile": quantile_loss,
    "exponential": exponential_loss,
}


def rows(batch: Batch, first: int, count: int) -> Batch:
    """`count` rows of every seed, from `first` on."""
    part = slice(first, first + count)
    return Batch(
        obs=batch.obs[:, part],
        action=batch.action[:, part],
        reward=batch.reward[:, part],
        next_obs=batch.next_obs[:, part],
        terminated=batch.terminated[:, part],
        truncated=batch.truncated[:, part],
    )


class IDQL(nn.Module):
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
        hidden = (config.hidden_dim,) * 2
        self.register_buffer("low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.action_high), persistent=False)
        self.diffusion = Diffusion(config.schedule, config.denoise_steps)
        self.actor = ResidualNoiseNet(
            rng,
            spec.obs_dim,
            spec.action_dim,
            hidden_dim=config.hidden_dim,
            num_blocks=config.num_blocks,
            activation=config.activation,
            dropout_rate=config.dropout_rate,
            time_dim=config.time_dim,
            cond_dim=config.cond_dim,
        )
        self.actor_optim = Adam(self.actor, config.lr)
        self.ema_actor = frozen_copy(self.actor)
        self.critic = QEnsemble(rng, spec.obs_dim, spec.action_dim, hidden)
        redraw(self.critic, rng, xavier_uniform)
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)
        self.value = Value(rng, spec.obs_dim, hidden, input_norm=config.value_input_norm)
        redraw(self.value, rng, xavier_uniform)
        self.value_optim = Adam(self.value, config.critic_lr)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        """One draw for all updates of a step; each takes its rows."""
        config = self.config
        size = max(config.batch_size, config.actor_updates * config.actor_batch_size)
        return dataset.transitions(rng, size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One step: actor, V, Q against the new V, target Q."""
        metrics = self.update_actor(batch, rng)
        critic_batch = rows(batch, 0, self.config.batch_size)
        metrics |= self.update_value(critic_batch)
        metrics |= self.update_critic(critic_batch)
        polyak_update(self.target_critic, self.critic, self.config.tau)
        return metrics

    # ------------------------------------------------------------------------------------ critic

    def update_value(self, batch: Batch) -> Metrics:
        q = self.min_q(batch.obs, batch.action)  # [K, B]

        def loss(value: Any) -> tuple[Tensor, Metrics]:
            v = value(batch.obs)  # [K, B]
            per_seed = self.value_loss(q - v).mean(dim=-1)
            return per_seed, {"value_loss": per_seed, "v": v.mean(dim=-1)}

        grads, metrics = gradients(self.value, loss)
        metrics["value_grad_norm"] = self.value_optim.step(self.value, grads)
        return metrics

    def value_loss(self, difference: Tensor) -> Tensor:
        """f(Q - V), element-wise."""
        config = self.config
        return VALUE_LOSSES[config.critic_objective](difference, config.objective_parameter)

    def update_critic(self, batch: Batch) -> Metrics:
        next_v = self.value(batch.next_obs)
        target = td_target(batch.reward, batch.terminated, next_v, self.config.discount)  # [K, B]

        def loss(critic: Any) -> tuple[Tensor, Metrics]:
            q = critic(batch.obs, batch.action)  # [K, 2, B]
            per_seed = (q - target.unsqueeze(1)).square().mean(dim=(1, 2))
            return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

        grads, metrics = gradients(self.critic, loss)
        metrics["critic_grad_norm"] = self.critic_optim.step(self.critic, grads)
        return metrics

    def min_q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Minimum of the target critics, [K, *rows]."""
        return self.target_critic(obs, action).amin(dim=1)

    # ------------------------------------------------------------------------------------- actor

    def update_actor(self, batch: Batch, rng: Rng) -> Metrics:
        """`actor_updates` updates, each on rows of its own and followed by the EMA."""
        config = self.config
        history = []
        for i in range(config.actor_updates):
            part = rows(batch, i * config.actor_batch_size, config.actor_batch_size)
            loss = partial(self.actor_loss, batch=part, rng=rng)
            grads, metrics = gradients(self.actor, loss)
            lr_scale = self.lr_scale(rng.step * config.actor_updates + i)
            if config.weight_decay:
                decay_weights(self.actor, config.lr * config.weight_decay * lr_scale)
            metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, grads, lr_scale)
            polyak_update(self.ema_actor, self.actor, 1.0 - config.ema_decay)
            history.append(metrics)
        return {name: torch.stack([m[name] for m in history]).mean(dim=0) for name in history[0]}

    def actor_loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Squared error of the noise, summed over action dimensions, mean over the batch: [K]."""

        def denoiser(noisy: Tensor, t: Tensor, obs: Tensor) -> Tensor:
            return actor(noisy, t, obs, rng)

        margin = 0.5 * ACTION_MARGIN * (self.high - self.low)
        clean = batch.action.clamp(self.low + margin, self.high - margin)
        error = self.diffusion.noise_errors(denoiser, clean, batch.obs, rng).sum(dim=-1)  # [K, B]
        metrics = {"bc_loss": error.mean(dim=-1)}
        if self.config.actor_objective == "bc":
            return metrics["bc_loss"], metrics
        per_seed = (self.row_weights(batch) * error).mean(dim=-1)
        return per_seed, metrics | {"actor_loss": per_seed}

    def row_weights(self, batch: Batch) -> Tensor:
        """Weights of the rows under the actor objectives other than bc, [K, B]."""
        advantage = self.min_q(batch.obs, batch.action) - self.value(batch.obs)
        if self.config.actor_objective == "soft_adv":
            asymmetry = self.config.objective_parameter
            return torch.where(advantage < 0, 1.0 - asymmetry, asymmetry)
        if self.config.actor_objective == "hard_adv":
            return (advantage >= HARD_THRESHOLD).float()
        return torch.exp(self.config.actor_inv_temperature * advantage).clamp(max=MAX_WEIGHT)

    def lr_scale(self, actor_step: Tensor) -> Tensor:
        """Factor on the actor's learning rate after `actor_step` updates of it, [K]."""
        if self.config.lr_decay == "off":
            return torch.ones_like(actor_step, dtype=torch.float32)
        return cosine_decay(actor_step, self.config.steps * self.config.actor_updates)

    # ------------------------------------------------------------------------------------ acting

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """One of `num_candidates` samples of the EMA actor: [K, N, O] -> [K, N, A]."""
        repeated = obs.unsqueeze(2).expand(-1, -1, self.config.num_candidates, -1)  # [K, N, C, O]
        candidates = self.diffusion.sample_clipping_iterates(
            self.ema_actor, repeated, self.low, self.high, rng, self.config.sample_noise_scale
        )
        score = self.score(self.min_q(repeated, candidates), obs)  # [K, N, C]
        if self.config.candidate_choice == "greedy":
            return pick(candidates, score.argmax(dim=-1))
        return pick(candidates, softmax_index(score, rng))

    def score(self, q: Tensor, obs: Tensor) -> Tensor:
        """Log probability of each candidate up to a constant; Q itself under greedy. [K, N, C]."""
        config = self.config
        if config.candidate_choice == "softmax":
            return config.choice_inv_temperature * q
        if config.candidate_choice == "implicit":
            difference = q - self.value(obs).unsqueeze(-1)
            return implicit_weights(
                difference, config.critic_objective, config.objective_parameter
            ).log()
        return q


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", IDQL, config, config.steps),)


recipe = Recipe(
    name="idql",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "idql.yaml",
    summary="Implicit Q-learning with a diffusion policy; the critic chooses among its samples",
    paper="arXiv:2304.10573",
)
