"""DOSER (Wang et al., ICLR 2026, arXiv:2605.08202): actions out of the data, judged one step ahead.

Soft actor-critic. An action of the policy is out of distribution (OOD) where a diffusion model of
the behaviour denoises it badly. If it is predicted to lead somewhere that is OOD itself, or worth
less than where the best action of the behaviour leads, it is detrimental and its value is pulled
to Q_min; otherwise it is beneficial and pulled to eta (Q(s, a_id) + delta_V).

    paper        here                  where
    E_a, E_s     Levels, level_errors  Eq. 6-7, blocks/denoising_error.py
    tau_a, tau_s thresholds            Eq. 8: percentile p of the errors of all data
    A-, A+       Verdict               Definition 1
    a*_id        best_candidate        Eq. 11, the best of N samples of the behaviour
    beta         penalty_coef          Eq. 10
    lambda       compensation_coef     Eq. 10
    eta          compensation_scale    Eq. 10
    delta_V      --                    V(s'_pi) - V(s'_id); on A+ it is never negative
    tau (V)      expectile             Eq. 12, of V's own TD error
    alpha        entropy_coef          Eq. 14, tuned so that entropy stays near -dim(A)

The models are trained beforehand (doser_models.py). Defaults are the authors' code (7ingw24/DOSER,
b5ade4d), which produced the results. Where the paper says otherwise there is a field:
(1) `backup`: the code backs up the target actor's action with entropy, Eq. 10 the behaviour's.
(2) `id_value`: Eq. 10 takes the target critics' value of a*_id, the code the online ones'.
(3) `reduction`: the code averages both regularisers over the critics and sums the Bellman errors:
a critic feels beta / 4. (4) `num_critics`. (5) `q_min_rule`: R_min / (1 - gamma); the code has a
constant for each environment (hparams/).
Order in a step, as there: temperature, actor (every 2nd step), critics and V, targets
(every 2nd). The code exits where the mean Q of the policy's actions passes 5e4; here that seed has
diverged (`limits`).
Deviations: (a) candidates are made by a sampler of the model's distribution, once for every
observation of the data (`sampler`, `candidates`); with `ood_rows` so many OOD rows of a batch stand
for all of them, which changes the regularisers' noise, not their expectation. (b) Where the
smallest reward is positive, the rule's Q_min is 0. (c) tanh's log density is exact, without the
code's 1e-6. (d) Models belong to a seed unless `shared_models`. (e) Actions are scaled to [-1, 1]
by dimension. (f) The actor's rate decays over the run's own `steps`, in the code over 1e6 whatever
the run's length. (g) At a terminal step the dynamics learn the state that was reached; the code's
data have the next episode's first there (D4RL's shift by one), which teaches that a fall leads to a
good state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Make, Metrics, Recipe, Rng, Train
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import (
    QEnsemble,
    expectile_loss,
    polyak_update,
    squared_td_error,
    td_target,
)
from algorithms.blocks.denoising_error import Levels, denoiser_of, level_errors, mean_error
from algorithms.blocks.entropy import LogScalar, entropy_loss
from algorithms.blocks.gaussians import tanh_normal
from algorithms.blocks.layers import MLP, frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, cosine_decay, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices, check_positive
from algorithms.doser_models import (
    MODELS,
    CandidateConfig,
    ModelConfig,
    ThresholdConfig,
    candidates,
    sample_behaviour,
    thresholds,
)

LOG_STD = (-5.0, 2.0)  # limits of the actor's log-std (code)
CHOICES = {
    "treatment": ("full", "no_compensation", "uniform"),
    "detector": ("diffusion", "stratified", "cvae"),
    "candidates": ("cached", "sampled"),
    "sampler": ("heun", "release"),
    "backup": ("policy", "behaviour"),
    "id_value": ("online", "target"),
    "reduction": ("mean", "sum"),
    "q_min_rule": ("data", "constant"),
}


@dataclass(frozen=True)
class Config:
    """Defaults: the authors' code, its most common row; per-dataset values in hparams/."""

    steps: int = 1_000_000  # gradient steps of the agent
    batch_size: int = 256  # code
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the targets of critics, V and actor
    lr: float = 3e-4  # actor
    lr_decay: bool = True  # cosine decay of the actor's rate to 0 at the last step; see (f)
    critic_lr: float = 3e-4  # critics and V, constant
    entropy_lr: float = 3e-4  # temperature; an earlier uniform-penalty version had 1e-4
    hidden_dim: int = 256  # width: actor 3 layers; critics, V, dynamics 2; diffusion 4
    num_critics: int = 4  # code; a reviewer asked for two
    policy_every: int = 2  # steps between updates of the actor, and of all targets
    expectile: float = 0.9  # of V's TD error; 0.7 on expert data (code)
    penalty_coef: float = 0.001  # beta, 0.001 to 0.05 (code)
    compensation_coef: float = 0.001  # lambda (code, all datasets)
    compensation_scale: float = 0.9  # eta, at most gamma (code, all datasets)
    treatment: str = "full"  # of OOD actions: full | no_compensation | uniform (paper, Sec. 4.3)
    detector: str = "diffusion"  # diffusion | stratified (ours) | cvae (paper, Fig. 4)
    percentile: float = 99.0  # p of both thresholds; 80 on expert data (code)
    action_levels: int = 1  # noise levels averaged in an action's error (code)
    state_levels: int = 1  # noise levels averaged in an observation's error; 1 or 10 (code)
    fixed_levels: tuple[float, ...] = (0.05, 0.2, 0.5, 2.0, 5.0)  # of `stratified` (ours)
    num_candidates: int = 10  # N (paper and code)
    candidates: str = "cached"  # cached: made once for the data | sampled in every step (code)
    ood_rows: int = 0  # OOD rows of a batch that are classified and stand for all of them; 0: all
    sampler: str = "heun"  # heun (ours) | release, of 100 steps (code)
    sampler_steps: int = 15  # heun calls the model 2 n - 1 times, release n times
    backup: str = "policy"  # a' of policy (code) | behaviour: the data's own (paper, Eq. 10)
    id_value: str = "online"  # critics that value a*_id: online (code) | target (paper, Eq. 10)
    reduction: str = "mean"  # of both regularisers over the critics: mean (code) | sum (Eq. 10)
    q_min_rule: str = "data"  # data: min(reward, 0) / (1 - gamma) (paper) | constant: q_min (code)
    q_min: float = 0.0  # only under constant: smallest reward of the environment / (1 - gamma)
    dynamics_members: int = 1  # networks whose mean is the prediction (code: 1)
    dynamics_gate: bool = False  # detrimental also where networks disagree beyond the data (ours)
    gate_percentile: float = 99.0  # of the disagreement on the data; only with the gate (ours)
    q_limit: float = 5e4  # a mean min-Q of the policy's actions above it is divergence (code)
    shared_models: bool = False  # one set of trained models for all seeds (code: true)
    model_steps: int = 100_000  # gradient steps of each model (code)
    diffusion_batch_size: int = 1024  # ours; the code takes the whole dataset
    dynamics_batch_size: int = 256  # code
    model_lr: float = 3e-4  # Adam of the models (code)
    time_dim: int = 16  # embedding of the noise level (code)

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        if self.dynamics_gate and self.dynamics_members < 2:
            raise ValueError("dynamics_gate needs dynamics_members of at least 2 to disagree")
        if self.dynamics_gate and not self.classifies:
            raise ValueError(
                "dynamics_gate has no effect under treatment 'uniform'; drop one of them"
            )
        if self.detector == "stratified" and not self.fixed_levels:
            raise ValueError("detector 'stratified' needs fixed_levels, at least one")
        for name in ("percentile", "gate_percentile"):
            if not 0.0 <= getattr(self, name) <= 100.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 100")
        check_positive(
            self,
            "num_critics",
            "policy_every",
            "num_candidates",
            "action_levels",
            "state_levels",
        )
        if not 0 <= self.ood_rows <= self.batch_size:
            raise ValueError(
                f"ood_rows is {self.ood_rows}; expected 1 to batch_size, rows of a batch, or 0: all"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """Fixed noise levels of the detectors, empty for random ones."""
        return self.fixed_levels if self.detector == "stratified" else ()

    @property
    def classifies(self) -> bool:
        """Whether OOD actions are told apart."""
        return self.treatment != "uniform"


class Verdict(NamedTuple):
    """What is done with the policy's action in each row; each [K, B]."""

    detrimental: Tensor  # bool, A-
    beneficial: Tensor  # bool, A+
    target: Tensor  # of the compensation
    overflow: Tensor  # bool, OOD but beyond `ood_rows`
    weight: Tensor  # [K], of the regularisers: OOD rows for each that was classified


class DOSER(nn.Module):
    """Learner and policy; see the module's docstring.

    Raises:
        ValueError: if `inputs` lack a stage.
    """

    models: Any  # name of a stage -> its frozen network
    q_min: Tensor  # [K]
    action_threshold: Tensor
    state_threshold: Tensor
    disagreement_threshold: Tensor
    cached: Tensor  # [K, S, N, A]

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.period = config, config.policy_every
        self.limits = {"q_policy": config.q_limit}
        self.target_entropy = -float(spec.action_dim)
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        hidden = (config.hidden_dim,) * 2
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        self.normalizer = Normalizer(
            rng.num_seeds, spec.statistics.obs_mean, spec.statistics.obs_std
        )
        self.actor = MLP(rng, (spec.obs_dim, *hidden, config.hidden_dim, 2 * spec.action_dim))
        self.actor_optim = Adam(self.actor, config.lr)
        self.target_actor = frozen_copy(self.actor)
        self.entropy_coef = LogScalar(rng, 0.0)
        self.entropy_optim = Adam(self.entropy_coef, config.entropy_lr)
        self.critic = QEnsemble(
            rng, spec.obs_dim, spec.action_dim, hidden, num_critics=config.num_critics
        )
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)
        if config.classifies:
            self.value = MLP(rng, (spec.obs_dim, *hidden, 1), ensemble=2)
            self.value_optim = Adam(self.value, config.critic_lr)
            self.target_value = frozen_copy(self.value)
        self._take_models(spec, inputs or {})

    def _take_models(self, spec: DatasetSpec, inputs: Mapping[str, Any]) -> None:
        """Frozen networks, thresholds [K] and, where cached, candidates [K, S, N, A]."""
        config = self.config
        needed = agent_needs(config)
        if missing := sorted(set(needed) - set(inputs)):
            raise ValueError(f"the agent lacks the stages {missing}; given: {sorted(inputs)}")
        self.models = nn.ModuleDict(
            {name: MODELS[name].trained(inputs[name], spec) for name in needed if name in MODELS}
        )
        state = inputs["thresholds"].state
        for name, value in state.items():  # action_threshold, action_scale, ...
            self.register_buffer(name, value.clone())
        lowest = state["reward_min"].clamp(max=0.0) / (1.0 - config.discount)
        if config.q_min_rule == "constant":
            lowest = torch.full_like(lowest, config.q_min)
        self.register_buffer("q_min", lowest)
        if "candidates" in needed:  # follows from the inputs, and is too large for checkpoints
            cached = inputs["candidates"].state["actions"]
            self.register_buffer("cached", cached, persistent=False)
        self.action_noise = Levels(config.action_levels, config.levels)
        self.state_noise = Levels(config.state_levels, config.levels)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        """Rows with their places, by which cached candidates are found."""
        next_action = self.config.backup == "behaviour"
        if not hasattr(self, "cached"):
            return dataset.transitions(rng, self.config.batch_size, next_action)
        index = rng.integers(dataset.spec.num_steps, self.config.batch_size)
        return dataset.rows(index, next_action)

    def update(self, batch: Batch, rng: Rng, phase: int) -> Metrics:
        """Temperature; actor in the period's last step; critics, V; then all targets."""
        obs, next_obs = self.normalizer(batch.obs), self.normalizer(batch.next_obs)
        rows, dim = batch.action.shape[1:]
        noise, actor_noise, target_noise, critic_noise = rng.normal(rows, 4, dim).unbind(dim=2)
        metrics = self.update_entropy(obs, noise)
        last = phase == self.period - 1
        if last:
            metrics |= self.update_actor(obs, actor_noise)
        target = self.q_target(batch, next_obs, target_noise)
        chosen, _ = self.draw(self.actor, obs, critic_noise)
        verdict, found = self.judge(batch, obs, chosen, rng)
        metrics |= found | self.update_critic(batch, obs, chosen, target, verdict)
        if self.config.classifies:
            metrics |= self.update_value(batch, obs, next_obs)
        if last:
            polyak_update(self.target_critic, self.critic, self.config.tau)
            polyak_update(self.target_actor, self.actor, self.config.tau)
            if self.config.classifies:
                polyak_update(self.target_value, self.value, self.config.tau)
        return metrics

    # ------------------------------------------------------------------------ soft actor-critic

    def draw(self, actor: Any, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's actions in [-1, 1], [K, B, A], and their log densities, [K, B]."""
        mean, log_std = actor(obs).chunk(2, dim=-1)
        return tanh_normal(mean, log_std.clamp(*LOG_STD), noise)

    def update_entropy(self, obs: Tensor, noise: Tensor) -> Metrics:
        log_pi = self.draw(self.actor, obs, noise)[1].mean(dim=-1)
        grads, metrics = gradients(
            self.entropy_coef, lambda coef: entropy_loss(coef, log_pi, self.target_entropy)
        )
        self.entropy_optim.step(self.entropy_coef, grads)
        return metrics | {"log_pi": log_pi}

    def update_actor(self, obs: Tensor, noise: Tensor) -> Metrics:
        updates = self.config.steps / self.config.policy_every
        scale = cosine_decay(self.actor_optim.count, updates) if self.config.lr_decay else None
        grads, metrics = gradients(self.actor, lambda actor: self.actor_loss(actor, obs, noise))
        metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, grads, scale)
        return metrics

    def actor_loss(self, actor: Any, obs: Tensor, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 14 with the smallest critic, mean over the batch, [K]."""
        chosen, log_pi = self.draw(actor, obs, noise)
        q = self.critic(obs, chosen).amin(dim=1)  # [K, B]
        per_seed = (self.entropy_coef.value().unsqueeze(1) * log_pi - q).mean(dim=-1)
        return per_seed, {"actor_loss": per_seed, "q_policy": q.mean(dim=-1)}

    def q_target(self, batch: Batch, next_obs: Tensor, noise: Tensor) -> Tensor:
        """r + gamma (min Q'(s', a') - alpha log pi'(a'|s')), or the behaviour's a': [K, B]."""
        if self.config.backup == "behaviour":
            assert batch.next_action is not None
            next_action = self.bounds.unit(batch.next_action)
            next_v = self.target_critic(next_obs, next_action).amin(dim=1)
        else:
            next_action, log_pi = self.draw(self.target_actor, next_obs, noise)
            next_v = self.target_critic(next_obs, next_action).amin(dim=1)
            next_v = next_v - self.entropy_coef.value().unsqueeze(1) * log_pi
        return td_target(batch.reward, batch.terminated, next_v, self.config.discount)

    def update_critic(
        self, batch: Batch, obs: Tensor, chosen: Tensor, target: Tensor, verdict: Verdict
    ) -> Metrics:
        action = self.bounds.unit(batch.action)
        known = torch.ones_like(target)
        if self.config.backup == "behaviour":  # cut off there: no next action, no target
            known = 1.0 - batch.truncated * (1.0 - batch.terminated)
        grads, metrics = gradients(
            self.critic,
            lambda critic: self.critic_loss(critic, obs, action, target, known, chosen, verdict),
        )
        metrics["critic_grad_norm"] = self.critic_optim.step(self.critic, grads)
        return metrics

    def critic_loss(
        self,
        critic: Any,
        obs: Tensor,
        action: Tensor,
        target: Tensor,
        known: Tensor,
        chosen: Tensor,
        verdict: Verdict,
    ) -> tuple[Tensor, Metrics]:
        """Eq. 10: Bellman errors, penalty on A-, compensation on A+, [K]."""
        q = critic(obs, action)  # [K, E, B]
        td_error = squared_td_error(q * known.unsqueeze(1), target * known)
        q_chosen = critic(obs, chosen)
        q_min = self.q_min.unsqueeze(1).expand_as(verdict.target)
        penalty = verdict.weight * self.regulariser(q_chosen, q_min, verdict.detrimental)
        compensation = verdict.weight * self.regulariser(
            q_chosen, verdict.target, verdict.beneficial
        )
        per_seed = (
            td_error
            + self.config.penalty_coef * penalty
            + self.config.compensation_coef * compensation
        )
        return per_seed, {
            "critic_loss": per_seed,
            "td_error": td_error,
            "q": q.mean(dim=(1, 2)),
            "penalty": penalty,
            "compensation": compensation,
        }

    def regulariser(self, q: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """(q - target)^2 in the rows of the mask, mean over all rows: [K, E, B] -> [K]."""
        error = (q - target.unsqueeze(1)).square() * mask.unsqueeze(1)
        over_rows = error.mean(dim=-1)
        return over_rows.mean(dim=1) if self.config.reduction == "mean" else over_rows.sum(dim=1)

    def update_value(self, batch: Batch, obs: Tensor, next_obs: Tensor) -> Metrics:
        next_v = self.values(self.target_value, next_obs).amin(dim=1)
        target = td_target(batch.reward, batch.terminated, next_v, self.config.discount)
        grads, metrics = gradients(self.value, lambda value: self.value_loss(value, obs, target))
        self.value_optim.step(self.value, grads)
        return metrics

    def value_loss(self, value: Any, obs: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 12, summed over both networks, [K]."""
        v = self.values(value, obs)  # [K, 2, B]
        difference = target.unsqueeze(1) - v
        per_seed = expectile_loss(difference, self.config.expectile).mean(dim=-1).sum(dim=-1)
        return per_seed, {"value_loss": per_seed, "v": v.mean(dim=(1, 2))}

    @staticmethod
    def values(value: Any, obs: Tensor) -> Tensor:
        """Both state values: [K, *rows, O] -> [K, 2, *rows]."""
        return value(obs.unsqueeze(1)).squeeze(-1)

    # --------------------------------------------------------------------------- OOD actions

    def judge(self, batch: Batch, obs: Tensor, chosen: Tensor, rng: Rng) -> tuple[Verdict, Metrics]:
        """Definition 1 for the policy's actions: no gradient comes from here."""
        ood = self.action_score(obs, chosen, rng) > self.action_threshold.unsqueeze(1)
        if self.config.classifies:
            verdict = self.classify(batch, obs, chosen, ood, rng)
        else:
            nowhere = torch.zeros_like(ood)
            zeros = torch.zeros_like(obs[..., 0])
            verdict = Verdict(ood, nowhere, zeros, nowhere, torch.ones_like(zeros[:, 0]))
        rates = {
            "ood_rate": ood.float().mean(dim=-1),
            "detrimental_rate": verdict.weight * verdict.detrimental.float().mean(dim=-1),
            "beneficial_rate": verdict.weight * verdict.beneficial.float().mean(dim=-1),
            "overflow_rate": verdict.overflow.float().mean(dim=-1),
        }
        return verdict, rates

    def action_score(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        """E_a of Eq. 6, or the CVAE's error, [K, B]."""
        if self.config.detector == "cvae":
            return self.models["cvae"].error(obs, action)
        draws = self.action_noise.draw(rng, *action.shape[1:])
        errors = level_errors(denoiser_of(self.models["behaviour"], obs), action, *draws)
        return mean_error(errors, getattr(self, "action_scale", None))

    def classify(self, batch: Batch, obs: Tensor, chosen: Tensor, ood: Tensor, rng: Rng) -> Verdict:
        """A- and A+ among the OOD actions, or among the first `ood_rows` of them.

        A batch's rows are independent draws, so that the first are as good as any.
        """
        sigma, noise = self.state_noise.draw(rng, *obs.shape[1:])
        most, rows = self.config.ood_rows, obs.shape[1]
        if most in (0, rows):
            actions = self.candidate_actions(batch, obs, None, rng)
            return self.classify_rows(obs, chosen, ood, actions, sigma, noise)
        place = torch.argsort((~ood).int(), dim=1, stable=True)[:, :most]  # [K, M], OOD first

        def some(values: Tensor) -> Tensor:
            index = place.view(*place.shape, *(1,) * (values.dim() - 2))
            return values.take_along_dim(index, dim=1)

        actions = self.candidate_actions(batch, some(obs), place, rng)
        part = self.classify_rows(
            some(obs), some(chosen), some(ood), actions, some(sigma), some(noise)
        )
        nowhere = torch.zeros_like(ood)
        number = ood.sum(dim=1)
        return Verdict(
            nowhere.scatter(1, place, part.detrimental),
            nowhere.scatter(1, place, part.beneficial),
            torch.zeros_like(obs[..., 0]).scatter(1, place, part.target),
            ood & ~nowhere.scatter(1, place, True),
            number / number.clamp(1, most),
        )

    def candidate_actions(
        self, batch: Batch, obs: Tensor, place: Tensor | None, rng: Rng
    ) -> Tensor:
        """N actions of the behaviour in each of M rows, [K, M, N, A].

        Args:
            obs: of these rows, [K, M, O].
            place: where they are in the batch, [K, M]; None for all of it.
        """
        if self.config.candidates == "sampled":
            return self.sample_candidates(obs, rng)
        assert batch.index is not None
        index = batch.index if place is None else batch.index.take_along_dim(place, dim=1)
        seed = torch.arange(obs.shape[0], device=obs.device).unsqueeze(1)
        return self.cached[seed, index]

    def sample_candidates(self, obs: Tensor, rng: Rng) -> Tensor:
        """N actions of the behaviour for each row, [K, M, N, A]."""
        return sample_behaviour(self.models["behaviour"], obs, candidate_config(self.config), rng)

    def classify_rows(
        self,
        obs: Tensor,
        chosen: Tensor,
        ood: Tensor,
        actions: Tensor,
        sigma: Tensor,
        noise: Tensor,
    ) -> Verdict:
        """Verdicts on rows whose candidates and state noise are given."""
        dynamics, states = self.models["dynamics"], self.models["states"]
        best, id_q = self.best_candidate(obs, actions)
        led_to = dynamics.next_obs(obs, chosen)  # s'_pi, [K, B, O]
        v = self.values(self.value, led_to).amin(dim=1)
        id_v = self.values(self.value, dynamics.next_obs(obs, best)).amin(dim=1)
        errors = level_errors(denoiser_of(states), led_to, sigma, noise)
        score = mean_error(errors, getattr(self, "state_scale", None))
        bad = (score > self.state_threshold.unsqueeze(1)) | (v < id_v)
        if self.config.dynamics_gate:
            limit = self.disagreement_threshold.unsqueeze(1)
            bad = bad | (dynamics.disagreement(obs, chosen) > limit)
        beneficial = ood & ~bad if self.config.treatment == "full" else torch.zeros_like(ood)
        target = self.config.compensation_scale * (id_q + (v - id_v).clamp(min=0.0))
        one = torch.ones_like(id_q[:, 0])
        return Verdict(ood & bad, beneficial, target, torch.zeros_like(ood), one)

    def best_candidate(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 11: the candidate with the largest min-Q, [K, B, A], and its value, [K, B]."""
        repeated = obs.unsqueeze(2).expand(-1, -1, actions.shape[2], -1)
        q, best = self.critic(repeated, actions).amin(dim=1).max(dim=-1)  # [K, B]
        action = actions.take_along_dim(best[..., None, None], dim=2).squeeze(2)
        if self.config.id_value == "target":
            q = self.target_critic(obs, action).amin(dim=1)
        return action, q

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """tanh of the Gaussian's mean: [K, N, O] -> [K, N, A]."""
        mean, _ = self.actor(self.normalizer(obs)).chunk(2, dim=-1)
        return self.bounds.stretch(torch.tanh(mean))


# ------------------------------------------------------------------------------------- stages


def candidate_config(config: Config) -> CandidateConfig:
    return CandidateConfig(config.num_candidates, config.sampler, config.sampler_steps)


def agent_needs(config: Config) -> tuple[str, ...]:
    """Stages whose results the agent takes, in the order they are made."""
    names = []
    if config.detector != "cvae" or (config.classifies and config.candidates != "cached"):
        names.append("behaviour")
    if config.detector == "cvae":
        names.append("cvae")
    if config.classifies:
        names += ["states", "dynamics"]
    names.append("thresholds")
    if config.classifies and config.candidates == "cached":
        names.append("candidates")
    return tuple(names)


def stages(config: Config) -> tuple[Train | Make, ...]:
    """Models, thresholds, perhaps candidates, agent; what a treatment does not use is left out."""
    needs, per_seed = agent_needs(config), not config.shared_models

    def model(name: str) -> Train:
        of_dynamics = name == "dynamics"
        settings = ModelConfig(
            batch_size=config.dynamics_batch_size if of_dynamics else config.diffusion_batch_size,
            lr=config.model_lr,
            hidden_dim=config.hidden_dim,
            time_dim=config.time_dim,
            members=config.dynamics_members if of_dynamics else 1,
        )
        return Train(name, MODELS[name], settings, config.model_steps, per_seed=per_seed)

    names = [name for name in needs if name in MODELS]
    if "candidates" in needs and "behaviour" not in names:
        names.insert(0, "behaviour")
    parts: list[Train | Make] = [model(name) for name in names]
    scored = [name for name in names if name != "dynamics" or config.dynamics_gate]
    if config.detector == "cvae":
        scored = [name for name in scored if name != "behaviour"]
    limits = ThresholdConfig(
        config.percentile,
        config.action_levels,
        config.state_levels,
        config.levels,
        config.gate_percentile,
    )
    parts.append(Make("thresholds", thresholds, limits, tuple(scored), per_seed))
    if "candidates" in needs:
        settings = candidate_config(config)
        parts.append(Make("candidates", candidates, settings, ("behaviour",), per_seed))
    return (*parts, Train("agent", DOSER, config, config.steps, needs))


recipe = Recipe(
    name="doser",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "doser.yaml",
    summary="SAC that finds actions out of the data by denoising and judges where they lead",
    paper="arXiv:2605.08202",
)
