"""Variational diffusion distillation (Zhou et al., NeurIPS 2024, arXiv:2406.12538).

A trained diffusion policy p(a|s), the teacher, becomes a mixture of Gaussian experts q(a|s) that
acts in one network pass and has a density. It descends the reverse KL through the upper bound

    U = E_{q(z|s) q(a|s,z)} [log q(a|s,z) - log p(a|s) - log qt(z|a,s) + log q(z|s)] >= KL(q || p),

with equality at qt(z|a,s) = q(z|a,s), which is what qt is set to before every expert update.

    paper           here               where
    q(a|s,z)        experts            N(mean_z(s), L_z L_z^T), all from one backbone
    q(z|s)          gate               softmax network on the backbone's features, without gradient
    qt(z|a,s)       log_responsibility the mixture's posterior: fixed numbers, but a function of a
    J_z(s)          expert_loss        mean_v [score(a_v) . a_v + log qt(z|a_v,s)] + H(q(.|s,z))
    score(a)        score              d log p / d a, at random noise levels of the diffusion
    v               num_samples        reparameterised actions of each expert

The log p of the bound is needed only through its slope at a, so score(a) . a with the score held
fixed has the right gradient. log qt repels an expert from what another one explains.
Equations are after the authors' code (intuitive-robots/vdd, e1395f3); the appendix was not at hand.

The score. Actions are not noised. An EDM teacher is asked at a and sigma ~ U[sigma_low,
sigma_high]: (D(a; sigma) - a) / sigma^2. That is the score of p smoothed by noise sigma, so for
p = N(m, S) one expert ends at N(m, V) with V^-1 = E[(S + sigma^2 I)^-1]; `correct_covariance`
inverts this in the density and in drawn noise. A DDPM teacher has levels t, sigma_t =
sqrt(1/alpha_bar_t - 1); those within the range are drawn. `ddpm_score`: `released` asks at a,
-eps(a, t) / sqrt(1 - alpha_bar_t). But at level t the teacher's actions are sqrt(alpha_bar_t) a +
noise: its means are pulled to 0. `unbiased` asks at sqrt(alpha_bar_t) a and, as d/da demands,
multiplies by sqrt(alpha_bar_t), which is -eps / sigma_t, the score of an EDM teacher at sigma_t.

The same mixture without a teacher: `objective: em` fits it to the data by expectation maximisation;
`imc` (Blessing et al., 2023, arXiv:2303.15349) weighs each expert's rows by q(a|s,z) q(z|s), so
that it takes what it explains already. Both after the code of the submission
(VDD-Anonymous/Variational-Diffusion-Distillation).
Deviations: (a) log-sum-exp throughout; the code adds 1e-8 to densities, which fails beyond some 6
dimensions. (b) backbone and heads are MLPs on one flat observation; the paper has a GPT. (c) the
gate's actions are the teacher's (`gate_data`): demonstrations are samples of p only if p clones
them. (d) imc's weights are divided by the expert's peak density, a constant while covariances are
fixed: the 1e-8 that the code adds would drown them in more than a few dimensions. (e) no 1e-8 on
the gate: its softmax stays a logarithm. (f) one batch of states serves all updates of an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import (
    Batch,
    Dataset,
    DatasetSpec,
    Make,
    Metrics,
    Pretrained,
    Recipe,
    Rng,
    Train,
)
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.layers import ACTIVATIONS, MLP
from algorithms.blocks.mixtures import Mixture, scale_of, scale_size, spread_means
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices, check_positive
from algorithms.teachers import Levels, SampleConfig, Score, draw_samples, teacher_stages

TEACHER = Pretrained("diffusion_bc")


@dataclass(frozen=True)
class Config:
    """Defaults: the released code's where it has one value for all tasks."""

    steps: int = 20_000  # iterations: expert_updates + gate_updates each
    objective: str = "vdd"  # vdd | em | imc (the last two without a teacher)
    teacher: Pretrained = TEACHER  # the policy p: {algorithm, preset, config}
    num_experts: int = 8  # C: 4 or 8 by task
    covariance: str = "full"  # full (Cholesky) | diagonal
    batch_size: int = 1024  # states of an update
    num_samples: int = 2  # v: actions of each expert and state
    expert_updates: int = 2  # in one iteration, on its batch
    gate_updates: int = 1  # in one iteration; 0 leaves the gate uniform
    lr: float = 1e-4  # Adam of experts and gate, falling linearly to 0
    sigma_low: float = 0.2  # smallest noise level of the score (Block Push, Avoiding)
    sigma_high: float = 0.5  # largest; equal to the smallest for a fixed one (Kitchen: 0.1)
    ddpm_score: str = "released"  # released | unbiased; see above
    gate_data: str = "teacher"  # actions the gate is fitted to: teacher | demonstrations (code)
    gate_states: int = 20_000  # states the teacher's samples are drawn at, once (ours)
    gate_samples: int = 2  # of them at each state (ours)
    initial_means: str = "uniform"  # uniform | kmeans (k-means++ on the gate's actions)
    initial_bound: float = 1.0  # uniform: means start in +- this; 0.2 to 1 by task
    initial_std: float = 1.0  # of every expert, actions in [-1, 1]
    min_std: float = 1e-4  # smallest diagonal entry of L
    imc_fixed_covariance: bool = True  # imc: train means alone (code)
    hidden_dim: int = 256  # width of backbone (3 layers) and heads (1) (ours)
    activation: str = "silu"  # silu | mish | relu (ours; released: mish asked for, PReLU found)
    gate_hidden_dim: int = 64  # width of the gate's 2 layers
    expert_choice: str = "sample"  # sample (from the gate) | argmax
    act_noise: bool = False  # act by a draw of the expert instead of its mean
    correct_covariance: bool = False  # take the score's noise out of densities and draws (ours)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "objective": ("vdd", "em", "imc"),
                "covariance": ("full", "diagonal"),
                "ddpm_score": ("released", "unbiased"),
                "gate_data": ("teacher", "demonstrations"),
                "initial_means": ("uniform", "kmeans"),
                "activation": ("silu", "mish", "relu"),
                "expert_choice": ("sample", "argmax"),
            },
        )
        check_positive(
            self, "num_experts", "num_samples", "expert_updates", "gate_states", "gate_samples"
        )
        if not 0.0 < self.min_std < self.initial_std:
            raise ValueError(
                f"min_std is {self.min_std} and initial_std {self.initial_std}; expected "
                "0 < min_std < initial_std"
            )
        if not 0.0 < self.sigma_low <= self.sigma_high:
            raise ValueError(
                f"noise levels from {self.sigma_low} to {self.sigma_high}; expected "
                "0 < sigma_low <= sigma_high"
            )
        if self.objective != "vdd":
            if self.correct_covariance:
                raise ValueError("correct_covariance is of scores; objective em and imc use none")
            return
        levels = self.levels
        if self.correct_covariance and levels.chain and self.ddpm_score == "released":
            raise ValueError(
                "correct_covariance needs ddpm_score: unbiased with this teacher; the released "
                "form moves means too"
            )

    @property
    def levels(self) -> Levels:
        """The noise levels of the score; raises ValueError if the teacher does not know them."""
        return Levels.of(self.teacher, self.sigma_low, self.sigma_high)


# ------------------------------------------------------------------------------------ the student


class Experts(nn.Module):
    """Features [K, *rows, H], means [K, *rows, C, A] and L's of all experts, in one pass."""

    def __init__(self, rng: Rng, config: Config, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.action_dim = config, action_dim
        self.full = config.covariance == "full"
        width, count = config.hidden_dim, config.num_experts
        self.backbone = MLP(rng, (obs_dim, width, width, width), config.activation)
        head = partial(
            MLP, rng, activation=config.activation, orthogonal_gain=1.0, output_gain=0.01
        )
        self.mean = head((width, width, count * action_dim))
        self.scale = head((width, width, count * scale_size(action_dim, self.full)))

    def spread(self, means: Tensor) -> None:
        """Starts the experts at `means` [K, C, A], whatever the state."""
        last: Any = self.mean.layers[-1]
        last.weight.zero_()
        last.bias.copy_(means.flatten(1))

    def means(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Features and means alone: what acting needs."""
        features = ACTIVATIONS[self.config.activation](self.backbone(obs))
        return features, self.mean(features).unflatten(-1, (-1, self.action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, mean = self.means(obs)
        raw = self.scale(features).unflatten(-1, (self.config.num_experts, -1))
        stds = self.config.initial_std, self.config.min_std
        return features, mean, scale_of(raw, self.action_dim, self.full, *stds)


class VDD(nn.Module):
    """Learner and policy; see the module's docstring."""

    sample_obs: Tensor
    sample_action: Tensor

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        given = dict(inputs or {})
        samples = given.pop("samples", None)
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        statistics = spec.statistics
        self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        self.experts = Experts(rng, config, spec.obs_dim, spec.action_dim)
        width, count = config.gate_hidden_dim, config.num_experts
        self.gate = MLP(rng, (config.hidden_dim, width, width, count), config.activation)
        self.expert_optim = Adam(self.experts, config.lr)
        self.gate_optim = Adam(self.gate, config.lr)
        if config.objective == "vdd":
            (teacher,) = given.values()
            unbiased = config.ddpm_score == "unbiased"
            self.score = Score(config.teacher, config.levels, spec, teacher.state, unbiased)
        if samples is not None:
            self.register_buffer("sample_obs", samples.state["obs"], persistent=False)
            self.register_buffer("sample_action", samples.state["action"], persistent=False)
        if config.initial_means == "kmeans":
            points = self.unit(samples.state["action"].cpu()).flatten(1, 2)  # type: ignore[union-attr]
            self.experts.spread(spread_means(points, count, rng))
        else:
            means = 2.0 * rng.uniform(count, spec.action_dim) - 1.0
            self.experts.spread(config.initial_bound * means)

    # ---------------------------------------------------------------------------------- training

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One iteration: expert updates, then gate updates."""
        config = self.config
        lr_scale = (1.0 - rng.step / config.steps).clamp(min=0.0)
        obs = self.normalizer(batch.obs)
        metrics: Metrics = {}
        losses = {"vdd": self.expert_loss, "em": self.em_loss, "imc": self.imc_loss}
        loss = losses[config.objective]
        for _ in range(config.expert_updates):
            grads, metrics = gradients(self.experts, lambda experts: loss(experts, obs, batch, rng))
            metrics["expert_grad_norm"] = self.expert_optim.step(self.experts, grads, lr_scale)
        for _ in range(config.gate_updates):
            metrics |= self.update_gate(*self.gate_pairs(obs, batch, rng), lr_scale)
        return metrics

    def expert_loss(
        self, experts: Any, obs: Tensor, batch: Batch, rng: Rng
    ) -> tuple[Tensor, Metrics]:
        """-E_s mean_z q(z|s) J_z(s), [K]."""
        mixture = self.mixture_of(experts, obs)
        rows, count, size = mixture.mean.shape[1:]
        shape = (rows, self.config.num_samples, count)  # B, S, C
        action = mixture.reparameterised(rng.normal(*shape, size))
        level = rng.uniform(*shape)
        score = self.score(action.detach(), batch.obs, level)
        slope = (score * action).sum(dim=-1)  # [K, B, S, C]; its value means nothing
        # Every expert's actions under every expert, of which its own is taken.
        log_qt = mixture.detach().log_responsibility(action.flatten(2, 3))
        log_qt = torch.diagonal(log_qt.unflatten(2, shape[1:]), dim1=-2, dim2=-1)
        entropy = mixture.expert_entropy()  # [K, B, C]
        weight = mixture.log_weight.exp()
        gain = (slope + log_qt).mean(dim=2) + entropy
        metrics = {
            "score_norm": score.square().sum(dim=-1).mean(dim=(1, 2, 3)).sqrt(),
            "responsibility": log_qt.exp().mean(dim=(1, 2, 3)),
            "expert_entropy": (weight * entropy).sum(dim=-1).mean(dim=-1),
        }
        return -(weight * gain).mean(dim=(1, 2)), metrics

    def em_loss(self, experts: Any, obs: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """-E_(s,a) mean_z r_z log q(a|s,z), r the responsibilities: [K]."""
        mixture = self.mixture_of(experts, obs)
        action = self.unit(batch.action).unsqueeze(2)  # [K, B, 1, A]
        share = mixture.detach().log_responsibility(action).exp()
        per_seed = -(share * mixture.expert_log_prob(action)).mean(dim=(1, 2, 3))
        nll = -mixture.detach().log_prob(action).mean(dim=(1, 2))
        return per_seed, {"expert_loss": per_seed, "nll": nll}

    def imc_loss(self, experts: Any, obs: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """-E_(s,a) mean_z w_z log q(a|s,z), w the curriculum's weights: [K]."""
        mixture = self.mixture_of(experts, obs)
        if self.config.imc_fixed_covariance:
            mixture = Mixture(mixture.log_weight, mixture.mean, mixture.scale.detach())
        action = self.unit(batch.action).unsqueeze(2)
        weight = curriculum(mixture.detach(), action)  # [K, B, 1, C]
        per_seed = -(weight * mixture.expert_log_prob(action)).mean(dim=(1, 2, 3))
        nll = -mixture.detach().log_prob(action).mean(dim=(1, 2))
        return per_seed, {"expert_loss": per_seed, "nll": nll}

    def gate_pairs(self, obs: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Normalised states [K, B, O] and actions [K, B, v, A] for a gate update."""
        if self.config.objective != "vdd" or self.config.gate_data == "demonstrations":
            return obs, self.unit(batch.action).unsqueeze(2)
        index = rng.integers(self.sample_obs.shape[1], self.config.batch_size)  # [K, B]
        states = self.sample_obs.take_along_dim(index[..., None], dim=1)
        actions = self.sample_action.take_along_dim(index[..., None, None], dim=1)
        return self.normalizer(states), self.unit(actions)

    def update_gate(self, obs: Tensor, action: Tensor, lr_scale: Tensor) -> Metrics:
        """One step on -E_(s,a) mean_z r_z log q(z|s), the experts fixed."""
        features, mean, scale = self.experts(obs)
        current = Mixture(self.log_gate(self.gate, features), mean, scale)
        if self.config.objective == "imc":
            share = curriculum(current, action)
            share = share / share.sum(dim=1, keepdim=True) * share.shape[1]
        else:
            share = current.log_responsibility(action).exp()  # [K, B, v, C]

        def loss(gate: Any) -> tuple[Tensor, Metrics]:
            log_weight = self.log_gate(gate, features).unsqueeze(2)
            per_seed = -(share * log_weight).mean(dim=(1, 2, 3))
            entropy = current.gate_entropy().mean(dim=-1)
            return per_seed, {"gate_loss": per_seed, "gate_entropy": entropy}

        grads, metrics = gradients(self.gate, loss)
        metrics["gate_grad_norm"] = self.gate_optim.step(self.gate, grads, lr_scale)
        return metrics

    # -------------------------------------------------------------------------------- the mixture

    def mixture_of(self, experts: Any, obs: Tensor) -> Mixture:
        """q(.|s) for normalised observations; no gradient goes through the gate."""
        features, mean, scale = experts(obs)
        return Mixture(self.log_gate(self.gate, features.detach()), mean, scale)

    def log_gate(self, gate: Any, features: Tensor) -> Tensor:
        """log q(z|s), [K, *rows, C]; uniform if the gate is not trained."""
        count = self.config.num_experts
        if not self.config.gate_updates:
            return features.new_full((*features.shape[:-1], count), -math.log(count))
        return torch.log_softmax(gate(features), dim=-1)

    def mixture(self, obs: Tensor) -> Mixture:
        """The policy's distribution over scaled actions, for observations [K, N, O]."""
        return self.mixture_of(self.experts, self.normalizer(obs))

    def corrected(self, mixture: Mixture) -> Mixture:
        """The mixture that densities and draws are of."""
        if not self.config.correct_covariance:
            return mixture
        return mixture.without_noise(self.score.sigmas, self.config.min_std)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """log q(a|s) of actions [K, N, A] at observations [K, N, O]: [K, N].

        Of the action itself, per unit of its volume, not of the scaled one.
        """
        scaled = (
            self.corrected(self.mixture(obs)).log_prob(self.unit(action).unsqueeze(-2)).squeeze(-1)
        )
        return scaled - self.bounds.reach.log().sum()

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """The mean of an expert: [K, N, O] -> [K, N, A]."""
        return self.bounds.clamp(self.act_unclamped(obs, rng))

    def act_unclamped(self, obs: Tensor, rng: Rng) -> Tensor:
        """The same before it is moved into the bounds, which a Gaussian knows nothing of."""
        if self.config.act_noise:
            mixture = self.corrected(self.mixture(obs))
        else:  # the scales are not asked for, nor computed
            features, mean = self.experts.means(self.normalizer(obs))
            mixture = Mixture(self.log_gate(self.gate, features), mean, mean)
        if self.config.expert_choice == "argmax":
            expert = mixture.log_weight.argmax(dim=-1)
        else:
            expert = mixture.choose(rng.uniform(obs.shape[1]))
        if self.config.act_noise:
            unit = mixture.draw_of(expert, rng.normal(obs.shape[1], mixture.mean.shape[-1]))
        else:
            unit = mixture.mean_of(expert)
        return self.bounds.middle + self.bounds.reach * unit

    def unit(self, action: Tensor) -> Tensor:
        """The action on the scale where the bounds are [-1, 1]."""
        return (action - self.bounds.middle) / self.bounds.reach


def curriculum(mixture: Mixture, action: Tensor) -> Tensor:
    """Weights q(a|z) q(z) / max_a q(a|z) of each expert, plus 1e-8: [K, B, v, C]."""
    log_peak = 0.5 * action.shape[-1] - mixture.expert_entropy()  # [K, B, C]
    reward = mixture.expert_log_prob(action) + mixture.log_weight.unsqueeze(-2)
    return torch.exp(reward - log_peak.unsqueeze(-2)) + 1e-8


def stages(config: Config) -> tuple[Train | Make, ...]:
    """The teacher's own stages, state-action pairs drawn once if they are needed, the student."""
    before: tuple[Train | Make, ...] = ()
    if config.objective == "vdd":
        before = teacher_stages(config.teacher)
    else:
        config = replace(config, teacher=Pretrained())  # nothing of it is read
    needs = tuple(stage.name for stage in before[-1:])
    if config.objective == "vdd" and config.gate_data == "teacher":
        asked = SampleConfig(config.gate_states, config.gate_samples, config.teacher)
        before = (*before, Make("samples", draw_samples, asked, needs))
    elif config.initial_means == "kmeans":
        asked = SampleConfig(config.gate_states, 1, Pretrained())
        before = (*before, Make("samples", draw_samples, asked))
    needs += tuple(stage.name for stage in before[-1:] if isinstance(stage, Make))
    return (*before, Train("student", VDD, config, config.steps, needs))


recipe = Recipe(
    name="vdd",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "vdd.yaml",
    summary="A diffusion policy distilled into a mixture of experts that acts in one pass",
    paper="arXiv:2406.12538",
)
