"""Diffusion-QL (Wang, Hunt and Zhou, ICLR 2023, arXiv:2208.06193).

A conditional diffusion model over actions is the policy. It is trained to model the data (L_d, the
behaviour-cloning term) and, through its whole reverse chain, to raise Q:

    L(theta) = L_d(theta) + eta L_q(theta)

    paper      here            where
    theta      actor           noise network eps_theta(a^t, t, s)
    phi        critic          two action-value networks
    theta'     ema_actor       draws the next action of the critic's target
    T          denoise_steps   length of the chain
    eta        q_coef          per dataset, the paper's Table 3
    gamma      discount
    rho        tau             rate of the target critics

Where paper and official code differ, the default follows the code, which made the published scores:
(1) `q_normalizer`: L_q is divided by the mean |Q| of the *other* critic at the *policy's* actions;
the paper divides by the mean |Q| over the data's actions.
(2) `candidate_choice`: at evaluation 50 candidates are drawn and one is picked with probability
proportional to exp(min target Q); the paper draws one action.
(3) `lr_decay`: the code's cosine schedule is advanced once in 50 000 steps while its length counts
epochs of 1000, so that the rate is constant in effect.
(4) Gradients are clipped at a per-dataset norm that only the code lists.
Deviations from the code: (a) the coin that picks the critic is thrown for each seed of a stack.
(b) bounds of the actions may differ by dimension; all datasets of the paper have [-1, 1].
(c) `bc_only` has the same schedule of the rate, less than 0.1 % off the code's constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.candidates import pick, softmax_index
from algorithms.blocks.critics import (
    QEnsemble,
    max_q_backup,
    normalized_q_loss,
    polyak_update,
    squared_td_error,
    td_target,
)
from algorithms.blocks.ddpm import Denoiser, Diffusion, NoiseNet
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.optim import Adam, cosine_decay, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices

EPOCH_STEPS = 1000  # the official code counts in epochs
TRAIN_CALL_EPOCHS = 50  # its learning-rate schedule advances once per this many


@dataclass(frozen=True)
class Config:
    """Defaults: official code, gym rows of its table; per-dataset values in hparams/."""

    steps: int = 2_000_000  # gradient steps; num_epochs x 1000
    bc_only: bool = False  # train L_d alone: no critic, no clipping, one plain sample (--algo bc)
    batch_size: int = 256  # shared by critic and actor
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, every step
    lr: float = 3e-4  # actor; paper's Table 3, from {1e-3, 3e-4, 3e-5}
    critic_lr: float = 3e-4  # fixed, whatever the actor's
    lr_decay: str = "as_run"  # as_run (code, constant in effect) | cosine (to 0 at `steps`) | off
    clip_norm: float = 0.0  # gn: largest gradient norm, actor and critic each; 0 is off
    q_coef: float = 1.0  # eta; paper's Table 3
    q_normalizer: str = "other_critic"  # other_critic (code) | dataset (paper)
    max_q_backup: bool = False  # next value: best of `backup_actions` (antmaze but umaze)
    backup_actions: int = 10  # actions drawn per next observation under `max_q_backup`
    denoise_steps: int = 5  # T
    schedule: str = "vp"  # vp | linear | cosine
    hidden_dim: int = 256  # width of the 3 hidden layers of actor and critics
    time_dim: int = 16  # dimension of the time embedding
    ema_decay: float = 0.995  # weight of the old EMA actor
    ema_every: int = 5  # steps between its updates
    ema_start: int = 1000  # until this step it is the initial actor; no copy is made then
    num_candidates: int = 50  # actions drawn per observation at evaluation
    candidate_choice: str = "softmax"  # softmax (code) | argmax | none (paper: one plain sample)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "lr_decay": ("as_run", "cosine", "off"),
                "q_normalizer": ("other_critic", "dataset"),
                "candidate_choice": ("softmax", "argmax", "none"),
            },
        )


class DiffusionQL(nn.Module):
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
        hidden = (config.hidden_dim,) * 3
        self.register_buffer("low", torch.tensor(spec.action_low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.action_high), persistent=False)
        self.diffusion = Diffusion(config.schedule, config.denoise_steps)
        self.actor = NoiseNet(rng, spec.obs_dim, spec.action_dim, hidden, config.time_dim)
        if config.bc_only:
            self.actor_optim = Adam(self.actor, config.lr)
            return
        clip_norm = config.clip_norm if config.clip_norm > 0 else None
        self.actor_optim = Adam(self.actor, config.lr, clip_norm=clip_norm)
        self.ema_actor = frozen_copy(self.actor)
        self.critic = QEnsemble(rng, spec.obs_dim, spec.action_dim, hidden, "mish")
        self.critic_optim = Adam(self.critic, config.critic_lr, clip_norm=clip_norm)
        self.target_critic = frozen_copy(self.critic)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One step: critic, actor against the new critic, EMA actor, target critics."""
        if self.config.bc_only:
            return self.update_actor(self.bc_loss, batch, rng)
        metrics = self.update_critic(batch, rng)
        metrics |= self.update_actor(self.actor_loss, batch, rng)
        due = (rng.step % self.config.ema_every == 0) & (rng.step >= self.config.ema_start)
        polyak_update(self.ema_actor, self.actor, 1.0 - self.config.ema_decay, where=due)
        polyak_update(self.target_critic, self.critic, self.config.tau)
        return metrics

    def update_critic(self, batch: Batch, rng: Rng) -> Metrics:
        target = self.q_target(batch, rng)  # [K, B]

        def loss(critic: Any) -> tuple[Tensor, Metrics]:  # Eq. 4
            q = critic(batch.obs, batch.action)  # [K, 2, B]
            per_seed = squared_td_error(q, target)
            return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

        grads, metrics = gradients(self.critic, loss)
        metrics["critic_grad_norm"] = self.critic_optim.step(
            self.critic, grads, self.lr_scale(rng.step)
        )
        return metrics

    def q_target(self, batch: Batch, rng: Rng) -> Tensor:
        """Eq. 4's target: reward + discount * min of target critics at an EMA action, [K, B]."""
        if self.config.discount == 0.0:  # a bandit: no chain for the next action is needed
            return batch.reward
        if self.config.max_q_backup:
            next_obs = batch.next_obs.unsqueeze(1)  # [K, C, B, O]
            next_obs = next_obs.expand(-1, self.config.backup_actions, -1, -1)
            next_action = self.draw(self.ema_actor, next_obs, rng)
            next_v = max_q_backup(self.target_critic(next_obs, next_action))
        else:
            next_action = self.draw(self.ema_actor, batch.next_obs, rng)
            next_v = self.target_critic(batch.next_obs, next_action).amin(dim=1)
        return td_target(batch.reward, batch.terminated, next_v, self.config.discount)

    def update_actor(self, actor_loss: Any, batch: Batch, rng: Rng) -> Metrics:
        grads, metrics = gradients(self.actor, lambda actor: actor_loss(actor, batch, rng))
        metrics["actor_grad_norm"] = self.actor_optim.step(
            self.actor, grads, self.lr_scale(rng.step)
        )
        return metrics

    def actor_loss(self, actor: Denoiser, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """L = L_d + eta L_q: Eq. 3."""
        bc_loss, metrics = self.bc_loss(actor, batch, rng)
        q_loss = self.q_loss(actor, batch, rng)
        per_seed = bc_loss + self.config.q_coef * q_loss
        return per_seed, metrics | {"q_loss": q_loss, "actor_loss": per_seed}

    def bc_loss(self, actor: Denoiser, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """L_d, mean over batch and action dimensions: Eq. 2."""
        per_seed = self.diffusion.noise_loss(actor, batch.action, batch.obs, rng)
        return per_seed, {"bc_loss": per_seed}

    def q_loss(self, actor: Denoiser, batch: Batch, rng: Rng) -> Tensor:
        """L_q: minus the mean Q of one critic at the policy's actions, over a detached scale, [K].

        A coin per step and seed picks the critic.
        """
        action = self.draw(actor, batch.obs, rng)
        q = self.critic(batch.obs, action)  # [K, 2, B]
        heads = rng.uniform() < 0.5  # [K]
        if self.config.q_normalizer == "other_critic":
            scale = q.abs().mean(dim=-1).flip(1)  # [K, 2]
        else:
            scale = self.critic(batch.obs, batch.action).abs().mean(dim=-1)
        return normalized_q_loss(q, scale, heads)

    def draw(self, actor: Denoiser, obs: Tensor, rng: Rng) -> Tensor:
        """One action per observation by the whole chain: [K, *rows, O] -> [K, *rows, A]."""
        return self.diffusion.sample(actor, obs, self.low, self.high, rng)

    def lr_scale(self, step: Tensor) -> Tensor | None:
        if self.config.lr_decay == "off":
            return None
        if self.config.lr_decay == "cosine":
            return cosine_decay(step, self.config.steps)
        calls = step // (TRAIN_CALL_EPOCHS * EPOCH_STEPS)
        return cosine_decay(calls, self.config.steps / EPOCH_STEPS)

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """One action per observation from the raw (not EMA) actor: [K, N, O] -> [K, N, A]."""
        if self.config.bc_only or self.config.candidate_choice == "none":
            return self.draw(self.actor, obs, rng)
        repeated = obs.unsqueeze(2).expand(-1, -1, self.config.num_candidates, -1)  # [K, N, C, O]
        candidates = self.draw(self.actor, repeated, rng)
        score = self.target_critic(repeated, candidates).amin(dim=1)  # [K, N, C]
        if self.config.candidate_choice == "softmax":
            return pick(candidates, softmax_index(score, rng))
        return pick(candidates, score.argmax(dim=-1))


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", DiffusionQL, config, config.steps),)


recipe = Recipe(
    name="diffusion_ql",
    revision=2,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "diffusion_ql.yaml",
    summary="Diffusion policy, behaviour cloning plus Q through the whole reverse chain",
    paper="arXiv:2208.06193",
)
