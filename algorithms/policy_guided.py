"""Policy-Guided Diffusion (Jackson et al., RLC 2024, arXiv:2404.06356): agents on generated data.

A diffusion model of windows of steps is trained once on the data. While an agent trains, windows
are generated anew every so many steps, their actions drawn towards the agent's policy:

    p_lambda(window)  ~  p_data(window)  prod_t  pi(a_t | s_t) ** lambda

    paper           here                 where
    H               window               rows of a window
    D               WindowDiffusion      U-Net over time, EDM preconditioning
    sigma           sigma                noise level
    lambda          guidance_coef        see `guidance`
    pi              agent.log_density    TD3+BC: N(pi(s), 1), as in the code; IQL: its Gaussian
    S_churn, ...    churn                EDM's stochastic sampler

The paper's tables could not be read; `source` of every value says whether it is the public code's
(EmptyJackson/policy-guided-diffusion 9da606c) or ours. `training_data` chooses what is compared:

    real           the agent on the data alone
    unguided       lambda 0
    guided         lambda > 0; the first set is unguided, as there is no policy yet
    world_model    the same policy rolled out on `blocks.dynamics` from observations of the data;
                   the first set is the data's own transitions

Deviations: (1) `guidance: calibrated` is ours, its coefficient is the exponent lambda (see
`blocks.guidance`); `additive` is the code's nudge. (2) `final_row: next_obs` is ours. In the code
(`step`) the last row is only a next observation when decoded, so that steps on which the data
terminate, which are last in their windows, are trained on but never generated. (3) the code's
sampler predicts from the point without the added noise; ours by Algorithm 2 unless
`predict_from_unchurned`. (4) windows are sampled at the length that is trained; the code's defaults
are 32 and 129. (5) no episodes are held out. (6) the mean and standard deviation of the rows are
measured on 2^17 transitions. (7) a step is one update of the agent as `td3_bc` or `iql` does it; in
the code TD3+BC's is two critic updates and one of the actor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms import iql, td3_bc
from algorithms.api import (
    Batch,
    Dataset,
    DatasetSpec,
    Make,
    Metrics,
    Recipe,
    Rng,
    StageInput,
    Train,
)
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import polyak_update
from algorithms.blocks.dynamics import DynamicsConfig, WorldModel
from algorithms.blocks.edm import Churn, Preconditioning, log_normal_sigmas, stochastic_heun
from algorithms.blocks.guidance import additive, calibrated
from algorithms.blocks.layers import frozen_copy, outside_state
from algorithms.blocks.optim import Adam, cosine_decay, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices, check_positive
from algorithms.blocks.unet import UNet
from algorithms.blocks.windows import WindowCoder, features

CHUNK = 256  # windows that are sampled at once; part of the numbers
COLUMNS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


@dataclass(frozen=True)
class Config:
    """Defaults: the public code's, but a network and a sampler for CPUs (see hparams/)."""

    steps: int = 1_000_000  # of the agent (code)
    agent: str = "td3_bc"  # td3_bc | iql
    training_data: str = "guided"  # real | unguided | guided | world_model
    # --- windows
    window: int = 32  # H, rows (code; a user reports 16 for the paper)
    stride: int | None = 8  # between windows (code); none: every window, also at time limits
    final_row: str = "step"  # what the last row holds: step (code) | next_obs (ours)
    # --- diffusion model
    diffusion_steps: int = 50_000  # gradient steps (ours; code: 10,000 epochs as an upper limit)
    diffusion_batch_size: int = 128  # windows (ours; code 32)
    diffusion_lr: float = 1e-3  # peak, after 10 % warm-up, then a cosine to 0 (ours; code 2e-3)
    width: int = 64  # f, channels of the first U-Net block (ours; code 1024)
    num_blocks: int = 3  # U-Net blocks, each twice as wide and half as long (code)
    diffusion_ema_decay: float = 0.995  # of the weights that are sampled from (code)
    diffusion_ema_every: int = 10  # steps between two updates of the average (code)
    sigma_mean: float = -1.2  # of log sigma in training (EDM, code)
    sigma_std: float = 1.2  # of log sigma in training (EDM, code)
    shared_generator: bool = True  # one diffusion or world model for all seeds (code: a checkpoint)
    # --- sampler
    denoise_steps: int = 32  # N, Heun steps (ours; code 256)
    churn: float = 80.0  # S_churn; at most sqrt(2) - 1 of the level is added in a step (code)
    predict_from_unchurned: bool = False  # the code's predictor, not Algorithm 2's
    # --- guidance
    guidance: str = "calibrated"  # calibrated (ours, exponent) | additive (code)
    guidance_coef: float = 1.0  # lambda (ours); of the code's nudge, whose default 0 is unguided
    guidance_jacobian: str = "data"  # calibrated: data | network, see blocks.guidance
    guidance_cosine_coef: float = 0.3  # additive: half-sine bump of the schedule (code)
    guidance_normalize: bool = False  # additive: gradient over its norm (code: off)
    guidance_denoised: bool = False  # additive: gradient at the denoised window (code: off)
    # --- use of generated data
    refresh_every: int = 10_000  # agent steps between two sets (code)
    num_windows: int = 8192  # of a set (code)
    synthetic_fraction: float = 0.9375  # of a batch: 240 of 256 (code)
    generations: int = 1  # sets that are alive at once; they share the synthetic rows (code)
    # --- world model
    dynamics_steps: int = 100_000  # gradient steps (ours; Unifloral: 400 epochs)
    dynamics_hidden_dim: int = 200  # 4 layers of it in 7 members, 5 of them elites (Unifloral)
    # --- agent
    batch_size: int = 256  # real and synthetic rows (code)
    discount: float = 0.99  # gamma (code)
    tau: float = 0.005  # rate of the targets (code)
    lr: float = 3e-4  # of all networks (code since July 2024; 1e-3 before)
    hidden_dim: int = 256  # width of the 2 hidden layers (code)
    normalize_obs: bool = True  # td3_bc, iql: standardised observations (code: an option)
    q_coef: float = 2.5  # td3_bc: alpha (code)
    expectile: float = 0.7  # iql: tau (code)
    inv_temperature: float = 3.0  # iql: beta (code)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "agent": AGENTS,
                "training_data": ("real", "unguided", "guided", "world_model"),
                "final_row": ("step", "next_obs"),
                "guidance": ("calibrated", "additive"),
                "guidance_jacobian": ("data", "network"),
            },
        )
        shrink = 2 ** (self.num_blocks - 1)
        if self.window < 2 or self.window % shrink:
            raise ValueError(
                f"window is {self.window}; expected a multiple of {shrink} for a U-Net of "
                f"{self.num_blocks} blocks"
            )
        check_positive(self, "refresh_every", "num_windows", "generations")
        if not 0.0 <= self.synthetic_fraction <= 1.0:
            raise ValueError(
                f"synthetic_fraction is {self.synthetic_fraction}; expected a number in [0, 1]"
            )


DIFFUSION_FIELDS = (
    *("window", "stride", "final_row", "diffusion_steps", "diffusion_batch_size", "diffusion_lr"),
    *("width", "num_blocks", "diffusion_ema_decay", "diffusion_ema_every"),
    *("sigma_mean", "sigma_std"),
)
"""What the diffusion model depends on: its stage's config has the defaults elsewhere, so that one
model serves all agents, guided or not."""


def td3_bc_agent(config: Config) -> tuple[type, Any]:
    return td3_bc.TD3BC, td3_bc.Config(
        steps=config.steps,
        batch_size=config.batch_size,
        discount=config.discount,
        tau=config.tau,
        lr=config.lr,
        critic_lr=config.lr,
        hidden_dim=config.hidden_dim,
        q_coef=config.q_coef,
        normalize_obs=config.normalize_obs,
    )


def iql_agent(config: Config) -> tuple[type, Any]:
    """As in the code: constant rate, log-std from -20."""
    return iql.IQL, iql.Config(
        steps=config.steps,
        batch_size=config.batch_size,
        discount=config.discount,
        tau=config.tau,
        lr=config.lr,
        critic_lr=config.lr,
        lr_decay=False,
        hidden_dim=config.hidden_dim,
        expectile=config.expectile,
        inv_temperature=config.inv_temperature,
        log_std_min=-20.0,
        normalize_obs=config.normalize_obs,
    )


AGENTS = {"td3_bc": td3_bc_agent, "iql": iql_agent}


# ---------------------------------------------------------------------------------------- diffusion


@dataclass(frozen=True)
class ScaleConfig:
    draws: int = 2**17  # transitions that the rows' mean and standard deviation are measured on


def measure_scale(
    config: ScaleConfig, dataset: Dataset, inputs: Mapping[str, StageInput], rng: Rng, out: Any
) -> None:
    """Writes the mean and the standard deviation (1 where it is 0) of the rows: [K, D] each."""
    batch = dataset.transitions(rng, config.draws)
    bounds = ActionBounds(dataset.spec.action_low, dataset.spec.action_high)
    rows = features(batch, bounds.to(batch.obs.device)).double()
    std, mean = torch.std_mean(rows, dim=1, correction=0)
    out.array("mean", mean.float())
    out.array("std", torch.where(std > 0.0, std, 1.0).float())


class WindowDiffusion(nn.Module):
    """Learner of the diffusion model: EDM's loss on windows of the data."""

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, StageInput],
    ) -> None:
        super().__init__()
        self.config = config
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        scale = inputs["scale"].state
        self.coder = WindowCoder(spec, scale["mean"], scale["std"], config.final_row)
        self.edm = Preconditioning(sigma_data=1.0)
        self.network = UNet(rng, self.coder.width, config.width, config.num_blocks)
        self.optim = Adam(self.network, config.diffusion_lr)
        self.ema_network = frozen_copy(self.network)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        config = self.config
        length = self.coder.steps(config.window)
        return dataset.segments(rng, config.diffusion_batch_size, length, config.stride)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        clean = self.coder.encode(batch)  # [K, B, L, D]
        levels = rng.normal(clean.shape[1])
        sigma = log_normal_sigmas(levels, self.config.sigma_mean, self.config.sigma_std)  # [K, B]
        noise = rng.normal(*clean.shape[1:])
        grads, metrics = gradients(
            self.network, lambda network: self.loss(network, clean, sigma, noise)
        )
        scale = self.lr_scale(rng.step)
        metrics["diffusion_grad_norm"] = self.optim.step(self.network, grads, scale)
        every = self.config.diffusion_ema_every
        due = (rng.step + 1) % every == 0
        rate = 1.0 - self.config.diffusion_ema_decay
        polyak_update(self.ema_network, self.network, rate, due)
        return metrics

    def loss(
        self, network: Any, clean: Tensor, sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Denoising error times (sigma^2 + 1) / sigma^2, mean over everything: [K]."""
        per_seed = self.edm.errors(network, clean, sigma, noise).mean(dim=(1, 2, 3))
        return per_seed, {"diffusion_loss": per_seed}

    def lr_scale(self, step: Tensor) -> Tensor:
        """From 0.1 to 1 over the first tenth of the steps, then a cosine to 0: [K]."""
        steps = self.config.diffusion_steps
        warmup = max(1, steps // 10)
        rising = 0.1 + 0.9 * step / warmup
        falling = cosine_decay((step - warmup).clamp(min=0), max(1, steps - warmup))
        return torch.where(step < warmup, rising, falling)

    def denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """D(noisy; sigma) of the averaged weights."""
        return self.edm.denoise(self.ema_network, noisy, sigma)


# -------------------------------------------------------------------------------------------- agent


class PolicyGuided(nn.Module):
    """Learner and policy: an agent whose batches hold generated rows; see the module's docstring.

    The rows that were generated are part of the state, [K, generations * num_windows * H, ...].
    """

    agent: Any
    model: Any  # WindowDiffusion or WorldModel; none for real data

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, StageInput],
    ) -> None:
        super().__init__()
        self.config = config
        agent_type, agent_config = AGENTS[config.agent](config)
        self.agent = agent_type(agent_config, spec, seeds)
        if hasattr(self.agent, "period"):
            self.period = self.agent.period
        self.steps = config.window - 1  # transitions of a window
        self.refresh_every = 0 if config.training_data == "real" else config.refresh_every
        self.guidable = config.training_data in ("unguided", "guided")
        if config.training_data == "real":
            return
        modelled = config.training_data == "world_model"
        needed = inputs["dynamics" if modelled else "diffusion"]
        model_type: type = WorldModel if modelled else WindowDiffusion
        self.model = model_type(needed.config, spec, seeds, inputs)
        self.model.load_state_dict(needed.state)
        outside_state(self.model)
        rows = config.generations * config.num_windows * self.steps
        for name, width in zip(COLUMNS, (spec.obs_dim, spec.action_dim, 0, spec.obs_dim, 0, 0),
                               strict=True):  # fmt: skip
            shape = (len(seeds), rows, width) if width else (len(seeds), rows)
            self.register_buffer(f"synthetic_{name}", torch.zeros(shape))

    # ----------------------------------------------------------------------------------- training

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        if self.config.training_data == "real":
            return self.agent.sample(dataset, rng)
        synthetic = Batch(**{name: getattr(self, f"synthetic_{name}") for name in COLUMNS})
        return self.agent.sample(dataset.mixed(synthetic, self.config.synthetic_fraction), rng)

    def update(self, batch: Batch, rng: Rng, *phase: int) -> Metrics:
        return self.agent.update(batch, rng, *phase)

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        return self.agent.act(obs, rng)

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.agent.log_density(obs, action)

    # --------------------------------------------------------------------------------- generation

    def refresh(self, dataset: Dataset, rng: Rng) -> None:
        """Replaces the oldest set of generated windows; before step 0, all of them by the first."""
        first = int(rng.step[0]) == 0
        windows = self.first_set(dataset, rng) if first else self.generate(dataset, rng)
        for name in COLUMNS:
            kept = getattr(self, f"synthetic_{name}")
            fresh = getattr(windows, name).flatten(1, 2)  # [K, M H, ...]
            if first:
                repeats = (1, self.config.generations) + (1,) * (fresh.dim() - 2)
                kept.copy_(fresh.repeat(repeats))
            else:
                kept.copy_(torch.cat((kept[:, fresh.shape[1] :], fresh), dim=1))

    def first_set(self, dataset: Dataset, rng: Rng) -> Batch:
        """Windows made before there is a policy."""
        if self.config.training_data != "world_model":
            return self.generate(dataset, rng, 0.0)
        batch = dataset.transitions(rng, self.config.num_windows * self.steps)
        return Batch(**{name: self.as_windows(getattr(batch, name)) for name in COLUMNS})

    def generate(self, dataset: Dataset, rng: Rng, guidance_coef: float | None = None) -> Batch:
        """`num_windows` windows for the present policy: transitions [K, M, window - 1, ...].

        Args:
            guidance_coef: instead of the config's.
        Raises:
            ValueError: for an agent on real data, which generates nothing.
        """
        config = self.config
        if config.training_data == "real":
            raise ValueError("an agent with training_data 'real' has no model to generate with")
        if config.training_data == "world_model":
            starts = dataset.transitions(rng, config.num_windows * self.steps).obs
            return self.model.roll_out(self.agent.act, self.as_windows(starts), rng)
        if guidance_coef is None:
            guidance_coef = config.guidance_coef if config.training_data == "guided" else 0.0
        parts = [
            self.sample_windows(min(CHUNK, config.num_windows - start), rng, guidance_coef)
            for start in range(0, config.num_windows, CHUNK)
        ]
        return self.model.coder.decode(torch.cat(parts, dim=1))

    def as_windows(self, rows: Tensor) -> Tensor:
        """[K, M H, ...] -> [K, M, H, ...]."""
        return rows.unflatten(1, (self.config.num_windows, self.steps))

    def sample_windows(self, count: int, rng: Rng, guidance_coef: float) -> Tensor:
        """Normalised windows [K, count, L, D] of p_data pi^coef (or with the code's nudge)."""
        config, model = self.config, self.model
        sigmas = model.edm.karras_sigmas(config.denoise_steps).to(rng.step.device)
        noise = rng.normal(count, config.window, model.coder.width)
        denoiser, before_step = model.denoise, None
        actions = model.coder.actions
        if config.guidance == "calibrated":
            denoiser = calibrated(
                denoiser, self.window_log_density, actions, guidance_coef, config.guidance_jacobian
            )
        else:
            before_step = additive(
                self.window_log_density,
                actions,
                guidance_coef,
                config.denoise_steps,
                config.guidance_cosine_coef,
                config.guidance_normalize,
                model.denoise if config.guidance_denoised else None,
            )
        return stochastic_heun(
            denoiser,
            sigmas[0] * noise,
            sigmas,
            rng,
            Churn(config.churn),
            before_step,
            config.predict_from_unchurned,
        )

    def window_log_density(self, encoded: Tensor, window: Tensor) -> Tensor:
        """log pi(a_t | s_t) of the steps of normalised windows, 0 for a row without: [K, M, L]."""
        coder = self.model.coder
        obs, action = coder.obs(window), coder.action(encoded)
        found = self.agent.log_density(obs.flatten(1, 2), action.flatten(1, 2))
        return found.unflatten(1, obs.shape[1:3]) * coder.has_action(window.shape[2])


def stages(config: Config) -> tuple[Train | Make, ...]:
    per_seed = not config.shared_generator
    agent = partial(Train, "agent", PolicyGuided, config, config.steps)
    if config.training_data == "real":
        return (agent(),)
    if config.training_data == "world_model":
        dynamics = DynamicsConfig(hidden_dim=config.dynamics_hidden_dim)
        model = Train("dynamics", WorldModel, dynamics, config.dynamics_steps, per_seed=per_seed)
        return (model, agent(needs=("dynamics",)))
    diffusion = replace(Config(), **{name: getattr(config, name) for name in DIFFUSION_FIELDS})
    return (
        Make("scale", measure_scale, ScaleConfig(), per_seed=per_seed),
        Train(
            "diffusion",
            WindowDiffusion,
            diffusion,
            config.diffusion_steps,
            needs=("scale",),
            per_seed=per_seed,
        ),
        agent(needs=("scale", "diffusion")),
    )


recipe = Recipe(
    name="policy_guided",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "policy_guided.yaml",
    summary="TD3+BC or IQL on windows that a diffusion model draws towards the policy",
    paper="arXiv:2404.06356",
)
