"""Behaviour cloning with a diffusion model over actions; the teacher of `vdd`.

Two forms. `edm` is BESO's (Reuss, Li, Jia and Lioutikov, 2023, arXiv:2304.02532), which takes its
preconditioning and samplers from EDM (Karras et al., 2022, arXiv:2206.00364). `ddpm` is a noise
network on a cosine chain (Nichol and Dhariwal, 2021), as in the D3IL benchmark's DDPM.

    paper          here             where
    D(a; sigma)    denoise          clean action, given the action with noise of level sigma
    F, eps         actor            network of D, or noise network; ema_actor is what acts
    sigma_data     sigma_data       EDM, Table 1
    p(sigma)       log_logistic     BESO's code: log sigma logistic around log sigma_data, scale 1/2
    rho            rho              spacing of the levels while sampling, EDM Eq. 5

While sampling both forms are one process in sigma: level t of a DDPM is noise of sqrt(1/alpha_bar -
1) on the action, so that DDIM, Heun's rule and the ancestral sampler of `blocks.edm` serve both. A
DDPM's levels are discrete; fewer steps take some of them, evenly spaced in t.
`act_steps`, `sampler`, `spacing` and `rho` change nothing that is learned: trials that differ in
these share one training, which runs (and is evaluated along the way) with their defaults.
Deviations: (a) observations are single and flat, the network is an MLP on a normalised observation;
the papers use windows of a GPT. (b) actions are scaled by their bounds to [-1, 1], and clean
predictions are clipped there (D3IL does, BESO clips the last one only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import polyak_update
from algorithms.blocks.ddpm import Diffusion, NoiseNet
from algorithms.blocks.edm import Preconditioning, euler, euler_ancestral, heun
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices

SAMPLERS = ("ddim", "heun", "ancestral")
LEAST_DDPM_STEPS = 50  # fewer leave no small noise to take scores at; see `vdd`
TIME_SCALE = 4.0  # the network sees ln(sigma), not EDM's ln(sigma) / 4: its waves have period 2 pi
ACTING = ("act_steps", "sampler", "spacing", "rho")  # fields that training does not read


@dataclass(frozen=True)
class Config:
    """Defaults: BESO's on Kitchen, but EDM's own deterministic sampler; the network is ours."""

    steps: int = 40_000  # gradient steps (BESO, Kitchen)
    form: str = "edm"  # edm | ddpm
    batch_size: int = 1024  # BESO and D3IL
    lr: float = 1e-4  # Adam (BESO); 5e-4 in D3IL
    ema_decay: float = 0.999  # weight of the old EMA network (BESO); 0.995 in D3IL's DDPM
    hidden_dim: int = 256  # width of the 3 hidden layers, Mish (ours)
    time_dim: int = 16  # dimension of the level's embedding (ours: Diffusion-QL's)
    sigma_data: float = 0.5  # edm: standard deviation of actions in [-1, 1] (BESO)
    sigma_min: float = 0.005  # edm: smallest level (BESO, Kitchen; 0.1 to 0.01 in D3IL)
    sigma_max: float = 1.0  # edm: largest level (BESO)
    denoise_steps: int = 50  # ddpm: levels of the chain, at least 50 (ours; D3IL 8 to 16)
    schedule: str = "cosine"  # ddpm: cosine (D3IL) | vp | linear
    act_steps: int = 18  # levels while acting, at most a DDPM's (EDM; BESO and D3IL 3 to 64)
    sampler: str = "heun"  # heun (EDM) | ddim (BESO; Euler's rule) | ancestral (D3IL)
    spacing: str = "karras"  # edm: of the levels while acting, karras (EDM) | exponential (BESO)
    rho: float = 7.0  # edm: of the karras spacing (EDM; 5 in BESO)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "form": ("edm", "ddpm"),
                "sampler": SAMPLERS,
                "spacing": ("exponential", "karras"),
            },
        )
        if self.form == "ddpm" and self.denoise_steps < LEAST_DDPM_STEPS:
            raise ValueError(
                f"denoise_steps is {self.denoise_steps}; expected at least {LEAST_DDPM_STEPS}. Act "
                "in fewer by act_steps"
            )
        most = self.denoise_steps if self.form == "ddpm" else None
        if self.act_steps < 1 or (most is not None and self.act_steps > most):
            raise ValueError(
                f"act_steps is {self.act_steps}; expected at least 1"
                + (f" and at most {most}, the levels of the chain" if most else "")
            )
        self.preconditioning  # noqa: B018  checks the levels

    @property
    def preconditioning(self) -> Preconditioning:
        """The scalings of the edm form and its range of levels."""
        return Preconditioning(self.sigma_data, self.sigma_min, self.sigma_max)


class DiffusionBC(nn.Module):
    """Learner and policy; see the module's docstring."""

    levels: Tensor  # while acting: descending, then 0, [act_steps + 1]

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
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        statistics = spec.statistics
        self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        self.actor = NoiseNet(
            rng, spec.obs_dim, spec.action_dim, (config.hidden_dim,) * 3, config.time_dim
        )
        self.ema_actor = frozen_copy(self.actor)
        self.optim = Adam(self.actor, config.lr)
        self.diffusion = Diffusion(config.schedule, config.denoise_steps)
        self.preconditioning = config.preconditioning
        self.register_buffer("levels", self.acting_levels(), persistent=False)
        if inputs:  # a stage that only acts
            self.load_state_dict(inputs["policy"].state)

    def acting_levels(self) -> Tensor:
        config = self.config
        if config.form == "ddpm":
            last = config.denoise_steps - 1
            t = torch.linspace(last, 0, config.act_steps).round().long()
            return torch.cat((self.diffusion.sigmas[t], torch.zeros(1)))
        if config.spacing == "karras":
            return self.preconditioning.karras_sigmas(config.act_steps, config.rho)
        return self.preconditioning.exponential_sigmas(config.act_steps)

    # ------------------------------------------------------------------------------------ training

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        grads, metrics = gradients(self.actor, lambda actor: self.loss(actor, batch, rng))
        metrics["grad_norm"] = self.optim.step(self.actor, grads)
        polyak_update(self.ema_actor, self.actor, 1.0 - self.config.ema_decay)
        return metrics

    def loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Squared error of F's output (edm) or of the noise (ddpm), mean over all, [K]."""
        clean = self.unit(batch.action)
        obs = self.normalizer(batch.obs)
        if self.config.form == "ddpm":
            per_seed = self.diffusion.noise_loss(actor, clean, obs, rng)
        else:
            sigma = self.preconditioning.log_logistic(rng.uniform(clean.shape[1]))  # [K, B]
            noise = rng.normal(*clean.shape[1:])
            errors = self.preconditioning.errors(self.network(actor, obs), clean, sigma, noise)
            per_seed = errors.flatten(1).mean(dim=1)
        return per_seed, {"bc_loss": per_seed}

    # ------------------------------------------------------------------------------------- acting

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """One action per observation from the EMA network: [K, N, O] -> [K, N, A]."""
        noise = rng.normal(*obs.shape[1:-1], self.bounds.low.shape[0])
        return self.bounds.stretch(self.sample_unit(obs, noise, rng))

    def sample_unit(self, obs: Tensor, noise: Tensor, rng: Rng) -> Tensor:
        """The scaled action that the sampler makes of `noise` [K, N, A]."""
        levels, normalized = self.levels, self.normalizer(obs)

        def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
            return self.denoise(noisy, sigma, normalized)

        start = levels[0] * noise
        if self.config.form == "ddpm":  # its chain starts at unit variance, data included
            start = (1.0 + levels[0].square()).sqrt() * noise
        if self.config.sampler == "ancestral":
            return euler_ancestral(denoiser, start, levels, rng)
        return (heun if self.config.sampler == "heun" else euler)(denoiser, start, levels)

    def denoise(self, noisy: Tensor, sigma: Tensor, normalized_obs: Tensor) -> Tensor:
        """D(noisy; sigma) of the EMA network, clipped to [-1, 1]: [K, *rows, A].

        Args:
            noisy: scaled action plus noise of level sigma.
            sigma: broadcastable to [K, *rows]; for a DDPM the nearest of its levels is taken.
        """
        if self.config.form == "edm":
            network = self.network(self.ema_actor, normalized_obs)
            clean = self.preconditioning.denoise(network, noisy, sigma)
        else:
            t = (sigma.unsqueeze(-1) - self.diffusion.sigmas).abs().argmin(dim=-1)
            sigma = self.diffusion.sigmas[t].unsqueeze(-1)
            scaled = noisy / (1.0 + sigma.square()).sqrt()
            clean = noisy - sigma * self.ema_actor(scaled, t, normalized_obs)
        return clean.clamp(-1.0, 1.0)

    @staticmethod
    def network(actor: Any, normalized_obs: Tensor) -> Any:
        """F with the observation filled in; see `blocks.edm.Network`."""
        return lambda scaled, level: actor(scaled, TIME_SCALE * level, normalized_obs)

    def unit(self, action: Tensor) -> Tensor:
        """The action on the scale where the bounds are [-1, 1]."""
        return (action - self.bounds.middle) / self.bounds.reach


def trained_config(config: Config) -> Config:
    """The config whose training a config shares: its acting fields at their defaults."""
    defaults: dict[str, Any] = {f.name: f.default for f in fields(Config) if f.name in ACTING}
    return replace(config, **defaults)


def stages(config: Config) -> tuple[Train, ...]:
    """The training, and if another way to act is asked for, a stage that does."""
    trained = trained_config(config)
    policy = Train("policy", DiffusionBC, trained, trained.steps)
    if config == trained:
        return (policy,)
    return (policy, Train("acting", DiffusionBC, config, 0, needs=("policy",)))


recipe = Recipe(
    name="diffusion_bc",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "diffusion_bc.yaml",
    summary="Behaviour cloning with a diffusion policy (EDM or DDPM), in any number of steps",
    paper="arXiv:2304.02532",
)
