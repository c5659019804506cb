"""What DOSER trains beforehand and then holds constant: Sec. 3.1 and 3.4 of arXiv:2605.08202.

    paper        here               what
    eps_theta_a  ActionDiffusion    EDM denoiser of actions given the observation, Eq. 4
    eps_theta_s  StateDiffusion     EDM denoiser of observations, Eq. 5
    p_psi        Dynamics           next observation and reward from observation and action, Eq. 13
    tau_a, tau_s thresholds         percentiles of the reconstruction errors of all data, Eq. 8
    --           candidates         actions of the behaviour for every observation of the data
    --           ActionCVAE         the detector of the paper's Figure 4

Observations are standardised, actions scaled to [-1, 1], everywhere in these models.
After the authors' code (7ingw24/DOSER, b5ade4d). Deviation: diffusion is trained with minibatches;
the code takes the whole dataset as the batch of each of as many steps.

What candidates cost, a call of the network being 0.42 MFLOP: the code draws 256 x 10 of them by 100
calls in every step, 107 GFLOP, or 1e17 in 1e6 steps. Sampled once for each of 1e6 observations by
15 Heun steps (29 calls) they are 1.2e14 in all, 900 times less, and nothing in a step. For 64
flagged rows of each step by the same sampler: 7.8 GFLOP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Rng, StageInput
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.denoising_error import (
    EDM,
    Levels,
    ScoreNet,
    denoiser_of,
    level_errors,
    mean_error,
    percentile,
)
from algorithms.blocks.edm import Preconditioning, heun
from algorithms.blocks.layers import MLP
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.vae import VAE, latent_kl

ROWS = 4096  # of the dataset in one pass of a stage that computes; also fixes its draws
CACHE_ROWS = 64  # whose candidates' activations a CPU keeps in its cache: 3 times as fast as ROWS
HIGHEST = 10.0  # level the sampler of valid candidates starts from
KL_COEF = 0.5  # of the CVAE, BCQ's


@dataclass(frozen=True)
class ModelConfig:
    """Of one model; the stage's identity."""

    batch_size: int
    lr: float = 3e-4  # Adam
    hidden_dim: int = 256
    time_dim: int = 16  # of the level's embedding
    members: int = 1  # dynamics networks


class FrozenModel(nn.Module):
    """A learner of one network called `model`, fed with standardised data."""

    model: nn.Module

    def __init__(
        self,
        config: ModelConfig,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        self.normalizer = Normalizer(
            rng.num_seeds, spec.statistics.obs_mean, spec.statistics.obs_std
        )
        self.model = self.build(rng, spec, config)
        self.optim = Adam(self.model, config.lr)

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: ModelConfig) -> nn.Module:
        """A fresh network."""
        raise NotImplementedError

    @classmethod
    def trained(cls, given: StageInput, spec: DatasetSpec) -> Any:
        """The network a stage of this learner left behind, on the device of its state."""
        state = {
            name.removeprefix("model."): value
            for name, value in given.state.items()
            if name.startswith("model.")
        }
        first = next(iter(state.values()))
        rng = CounterRng.at_step(range(first.shape[0]), 0, Stream.INITIALISATION)
        model = cls.build(rng, spec, given.config).to(first.device)
        model.load_state_dict(state)
        return model

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        grads, metrics = gradients(self.model, lambda model: self.loss(model, batch, rng))
        metrics["grad_norm"] = self.optim.step(self.model, grads)
        return metrics

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Means over batch and dimensions, [K]."""
        raise NotImplementedError


class ActionDiffusion(FrozenModel):
    """Eq. 4: the behaviour policy."""

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: ModelConfig) -> ScoreNet:
        return ScoreNet(rng, spec.action_dim, spec.obs_dim, config.hidden_dim, config.time_dim)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        obs = self.normalizer(batch.obs)
        return _diffusion_loss(model, self.bounds.unit(batch.action), obs, rng)


class StateDiffusion(FrozenModel):
    """Eq. 5: the distribution of observations."""

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: ModelConfig) -> ScoreNet:
        return ScoreNet(rng, spec.obs_dim, 0, config.hidden_dim, config.time_dim)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        return _diffusion_loss(model, self.normalizer(batch.obs), None, rng)


def _diffusion_loss(
    net: Any, clean: Tensor, condition: Tensor | None, rng: Rng
) -> tuple[Tensor, Metrics]:
    noise = rng.normal(*clean.shape[1:])
    sigma = EDM.log_logistic(rng.uniform(*clean.shape[1:-1]))
    error = EDM.errors(lambda x, level: net(x, level, condition), clean, sigma, noise)
    loss = error.mean(dim=(1, 2))
    return loss, {"loss": loss}


class DynamicsNet(nn.Module):
    """(observation, action) -> next observation and reward, [K, E, *rows, O + 1], E networks."""

    def __init__(
        self, rng: Rng, obs_dim: int, action_dim: int, hidden_dim: int, members: int
    ) -> None:
        super().__init__()
        sizes = (obs_dim + action_dim, hidden_dim, hidden_dim, obs_dim + 1)
        self.net = MLP(rng, sizes, ensemble=members)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((obs, action), dim=-1).unsqueeze(1))

    def next_obs(self, obs: Tensor, action: Tensor) -> Tensor:
        """Mean over the networks, [K, *rows, O]."""
        return self(obs, action)[..., :-1].mean(dim=1)

    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """Root of the mean variance of the next observation over the networks, [K, *rows]."""
        predicted = self(obs, action)[..., :-1]
        return predicted.var(dim=1, correction=0).mean(dim=-1).sqrt()


class Dynamics(FrozenModel):
    """Eq. 13, with the reward, which nothing uses, as a last output (the code)."""

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: ModelConfig) -> DynamicsNet:
        sizes = (spec.obs_dim, spec.action_dim, config.hidden_dim)
        return DynamicsNet(rng, *sizes, config.members)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        target = torch.cat((self.normalizer(batch.next_obs), batch.reward.unsqueeze(-1)), dim=-1)
        predicted = model(self.normalizer(batch.obs), self.bounds.unit(batch.action))
        error = (predicted - target.unsqueeze(1)).square().mean(dim=(2, 3))  # [K, E]
        loss = error.sum(dim=1)
        return loss, {"loss": loss}


class CVAENet(VAE):
    """A VAE of actions whose score is the error of what the latent's mean decodes to."""

    def error(self, obs: Tensor, action: Tensor) -> Tensor:
        """| a - decoded |_2, [K, *rows]."""
        mean, _ = self.encoder(torch.cat((obs, action), dim=-1))
        return (torch.tanh(self.decode(obs, mean)) - action).norm(dim=-1)


class ActionCVAE(FrozenModel):
    """The behaviour policy as a CVAE, for the detector of the paper's Fig. 4.

    Depth, latent size and weight of the KL term are BCQ's; the width is `hidden_dim` like that of
    the other models (BCQ's is 750).
    """

    @staticmethod
    def build(rng: Rng, spec: DatasetSpec, config: ModelConfig) -> CVAENet:
        sizes = (spec.obs_dim, spec.action_dim, 2 * spec.action_dim)
        return CVAENet(rng, *sizes, config.hidden_dim)

    def loss(self, model: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        obs, action = self.normalizer(batch.obs), self.bounds.unit(batch.action)
        noise = rng.normal(obs.shape[1], 2 * action.shape[-1])
        decoded, mean, log_std = model(obs, action, noise)
        squared = (torch.tanh(decoded) - action).square().mean(dim=(1, 2))
        loss = squared + KL_COEF * latent_kl(mean, log_std).mean(dim=(1, 2))
        return loss, {"loss": loss, "squared_error": squared}


# ------------------------------------------------------------------------- stages that compute


@dataclass(frozen=True)
class ThresholdConfig:
    """Of the thresholds; the stage's identity."""

    percentile: float  # p
    action_levels: int
    state_levels: int
    fixed_levels: tuple[float, ...] = ()
    disagreement_percentile: float = 99.0


def thresholds(
    config: ThresholdConfig,
    dataset: Dataset,
    inputs: Mapping[str, StageInput],
    rng: Rng,
    out: Any,
) -> None:
    """Percentiles of the scores of all data, for the models that are given: arrays [K].

    Writes `reward_min`, and as `..._threshold` those of `action` (of `behaviour` or `cvae`),
    `state` (of `states`) and `disagreement` (of `dynamics`), rounded to 6 decimals as in the code;
    for fixed levels `action_scale` and `state_scale`, [K, L].
    """
    spec = dataset.spec
    models = {name: MODELS[name].trained(given, spec) for name, given in inputs.items()}
    action_levels = Levels(config.action_levels, config.fixed_levels)
    state_levels = Levels(config.state_levels, config.fixed_levels)
    # Only a denoising error has noise levels.
    scaled: set[str] = set()
    if config.fixed_levels:
        scaled = {"state"} if "cvae" in models else {"action", "state"}
    found: dict[str, list[Tensor]] = {}
    lowest = []
    for batch, obs, action in _passes(dataset, inputs, out):
        lowest.append(batch.reward.amin(dim=1))
        errors = {}
        if "cvae" in models:
            errors["action"] = models["cvae"].error(obs, action).unsqueeze(-1)
        elif "behaviour" in models:
            draws = action_levels.draw(rng, obs.shape[1], spec.action_dim)
            errors["action"] = level_errors(denoiser_of(models["behaviour"], obs), action, *draws)
        if "states" in models:
            draws = state_levels.draw(rng, obs.shape[1], spec.obs_dim)
            errors["state"] = level_errors(denoiser_of(models["states"]), obs, *draws)
        if "dynamics" in models:
            errors["disagreement"] = models["dynamics"].disagreement(obs, action).unsqueeze(-1)
        for name, value in errors.items():
            found.setdefault(name, []).append(value)
    out.array("reward_min", torch.stack(lowest, dim=1).amin(dim=1))
    for name, parts in found.items():
        errors_of_all = torch.cat(parts, dim=1)  # [K, S, L]
        scale = None
        if name in scaled:
            scale = errors_of_all.mean(dim=1)
            out.array(f"{name}_scale", scale)
        percent = config.disagreement_percentile if name == "disagreement" else config.percentile
        limit = percentile(mean_error(errors_of_all, scale), percent).round(decimals=6)
        out.array(f"{name}_threshold", limit)


@dataclass(frozen=True)
class CandidateConfig:
    """Of the behaviour's samples; the stage's identity where they are cached."""

    count: int  # N
    sampler: str  # heun | release
    steps: int


def candidates(
    config: CandidateConfig,
    dataset: Dataset,
    inputs: Mapping[str, StageInput],
    rng: Rng,
    out: Any,
) -> None:
    """N samples of the behaviour at every observation of the data: `actions`, [K, S, N, A]."""
    net = ActionDiffusion.trained(inputs["behaviour"], dataset.spec)
    parts = []
    for _, obs, _ in _passes(dataset, inputs, out):
        rows = None if obs.is_cuda else CACHE_ROWS
        parts.append(sample_behaviour(net, obs, config, rng, rows).cpu())
    out.array("actions", torch.cat(parts, dim=1))


def sample_behaviour(
    net: ScoreNet,
    obs: Tensor,
    config: CandidateConfig,
    rng: Rng,
    rows_at_once: int | None = None,
) -> Tensor:
    """N actions of the behaviour model at each observation, [K, rows, N, A].

    `heun` is EDM's second-order sampler, moved into the bounds. It starts at `HIGHEST`, not at 80:
    nearly all levels of the training density are below 5, and from 80 ten steps widen an exact
    Gaussian by a quarter or more (15 from 10: 3 to 7 %). `release` is the
    code's: levels are random draws of the training density in falling order, the start is not
    scaled to the first of them, the noise between two levels is that of their difference, and
    nothing is clipped. It is no sampler of the model's distribution: with far too little noise, it
    denoises again and again and draws its samples together.

    Args:
        rows_at_once: that go through the network together; None for all. No draw depends on it.
    """
    shape = (obs.shape[1], config.count, net.dim)
    if config.sampler == "heun":
        sigmas = Preconditioning(sigma_max=HIGHEST).karras_sigmas(config.steps).to(obs.device)
        draws: tuple[Tensor, ...] = (sigmas[0] * rng.normal(*shape),)

        def denoise(obs: Tensor, x: Tensor, *_: Tensor) -> Tensor:
            return heun(denoiser_of(net, obs), x, sigmas).clamp(-1.0, 1.0)

    else:
        sigma = EDM.log_logistic(rng.uniform(config.steps)).sort(dim=1, descending=True).values
        between = (sigma[:, :-1].square() - sigma[:, 1:].square()).clamp(min=0.0).sqrt()
        noise = rng.normal(*shape[:-1], config.steps - 1, shape[-1])
        draws = (rng.normal(*shape), noise)

        def denoise(obs: Tensor, x: Tensor, *noises: Tensor) -> Tensor:
            (noise,) = noises
            denoiser = denoiser_of(net, obs)
            for i in range(config.steps):
                x = denoiser(x, sigma[:, i].view(-1, 1, 1))
                if i < config.steps - 1:
                    x = x + between[:, i].view(-1, 1, 1, 1) * noise[..., i, :]
            return x

    if rows_at_once is None:
        return denoise(obs, *draws)
    parts = zip(*(values.split(rows_at_once, dim=1) for values in (obs, *draws)), strict=True)
    return torch.cat([denoise(*part) for part in parts], dim=1)


def _passes(
    dataset: Dataset, inputs: Mapping[str, StageInput], out: Any
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """All rows in order: the batch, its standardised observations and its scaled actions."""
    spec = dataset.spec
    first = next(iter(next(iter(inputs.values())).state.values()))
    normalizer = Normalizer(first.shape[0], spec.statistics.obs_mean, spec.statistics.obs_std)
    normalizer = normalizer.to(first.device)
    bounds = ActionBounds(spec.action_low, spec.action_high).to(first.device)
    for start in range(0, spec.num_steps, ROWS):
        index = torch.arange(start, min(start + ROWS, spec.num_steps), device=first.device)
        batch = dataset.rows(index.expand(first.shape[0], -1))
        yield batch, normalizer(batch.obs), bounds.unit(batch.action)
        out.progress(min(start + ROWS, spec.num_steps), spec.num_steps)


MODELS: dict[str, type[FrozenModel]] = {
    "behaviour": ActionDiffusion,
    "cvae": ActionCVAE,
    "states": StateDiffusion,
    "dynamics": Dynamics,
}
