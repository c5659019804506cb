"""The policies Diffusion-QL is compared with on its 2-D bandit (arXiv:2208.06193, Fig. 1 and 2).

Three policy classes, each trained to model the data alone or also to raise Q:

    panel         policy, guidance    loss of what is trained
    BC-MLE        gaussian, none      -log pi(a)
    BC-CVAE       cvae, none          L_vae = (decoded - a)**2 + kl_coef KL(latent || N(0, I))
    BC-MMD        mmd, none           MMD(actor, VAE), the VAE on L_vae
    "TD3+BC"      gaussian, q         -log pi(a) + eta L_q
    "BCQ"         cvae, q             L_vae; a perturbation xi of its samples on -Q1(s, a + xi)
    "BEAR-MMD"    mmd, q              exp(log lambda) MMD(actor, VAE) + eta L_q

    paper    here             where
    eta      q_coef           Eq. 3; L_q is Diffusion-QL's, `blocks.critics.normalized_q_loss`
    Phi      perturbation     reach of xi, in half widths of the bounds
    sigma    mmd_sigma        kernel exp(-|x - y|_1 / (2 sigma))
    lambda   multiplier       log lambda rises while MMD exceeds `mmd_threshold`

After the authors' toy code (Zhendong-Wang/Diffusion-Policies-for-Offline-RL, d871f5c6:
run_toy_bc.py, run_toy_ql.py, toy_experiments/), which is also where the names in quotes are from:
these are bandit versions, not the algorithms. Critics are regressed on the immediate reward, which
is right only where every episode is one step.
As there: the BCQ panel shows plain samples of the VAE, which Q never touches (`act_perturbed` shows
the perturbed ones); the Gaussian is not squashed, and Q is asked for actions outside of the bounds;
MMD compares points before the tanh, with the actor's noise clipped, so that its spread while acting
was never matched.
Deviations: (a) the coin that picks the critic is thrown for each seed of a stack. (b) bounds of the
actions may differ by dimension. (c) `act` moves the Gaussian's draws into the bounds; the figure
shows `act_unclamped`.
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
from algorithms.blocks.critics import QEnsemble, normalized_q_loss, squared_td_error
from algorithms.blocks.gaussians import normal_log_prob
from algorithms.blocks.layers import MLP, constant
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_choices
from algorithms.blocks.vae import VAE, GaussianNet, latent_kl

GAUSSIAN_LOG_STD = (-20.0, 2.0)  # official code; its tanh-Gaussian of the MMD actor has no limits
LOG_MULTIPLIER = (-5.0, 10.0)  # official code, after BEAR


@dataclass(frozen=True)
class Config:
    """Defaults: official toy code, the same for every panel but where said."""

    steps: int = 100_000  # gradient steps; 1000 epochs x 100 (run_toy_*.py)
    policy: str = "gaussian"  # gaussian | cvae | mmd
    guidance: str = "none"  # none (BC panels) | q (QL panels)
    batch_size: int = 100  # run_toy_*.py
    lr: float = 3e-4  # Adam of every network (run_toy_*.py)
    hidden_dim: int = 128  # width: 2 ReLU layers of policies, 3 Mish layers of critics
    q_coef: float = 2.5  # eta: run_toy_ql.py; its BEAR-MMD keeps the class's 1.0 (ql_mmd.py)
    latent_dim: int = 4  # of the VAE: twice the action dimension (bc_cvae.py)
    kl_coef: float = 0.5  # weight of the KL term, a mean over latent dimensions (bc_cvae.py)
    latent_clip: float = 0.5  # largest |latent| when sampling (bc_cvae.py, after BCQ)
    perturbation: float = 0.05  # Phi of BCQ, in half widths of the bounds (ql_cvae.py)
    act_perturbed: bool = False  # BCQ: act by perturbed samples; the figure shows plain ones
    mmd_samples: int = 10  # actions of actor and VAE per observation (bc_mmd.py, after BEAR)
    mmd_sigma: float = 20.0  # width of the Laplacian kernel (bc_mmd.py)
    noise_clip: float = 0.5  # largest |noise| of the actor in the MMD term (bc_mmd.py)
    mmd_threshold: float = 0.05  # above it the multiplier grows (ql_mmd.py)
    multiplier_lr: float = 1e-3  # Adam of log lambda (ql_mmd.py)

    def __post_init__(self) -> None:
        check_choices(
            self,
            {
                "policy": ("gaussian", "cvae", "mmd"),
                "guidance": ("none", "q"),
            },
        )
        if self.act_perturbed and (self.policy, self.guidance) != ("cvae", "q"):
            raise ValueError("act_perturbed needs policy: cvae and guidance: q; nothing perturbs")


def laplacian_mmd(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Square root of the squared MMD plus 1e-6, kernel exp(-|x - y|_1 / (2 sigma)): [...].

    The biased estimate: all pairs count, each point with itself included, so that it is 0.001 for
    equal samples and never below.

    Args:
        x, y: samples [..., M, A] of the two distributions.
    """

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        distance = (one.unsqueeze(-2) - two.unsqueeze(-3)).abs().sum(dim=-1)  # [..., M, M]
        return torch.exp(-distance / (2.0 * sigma)).mean(dim=(-2, -1))

    squared = kernel(x, x) + kernel(y, y) - 2.0 * kernel(x, y)
    return torch.sqrt(squared + 1e-6)  # keeps the slope finite where the two agree


class Multiplier(nn.Module):
    """log lambda, [K, 1]; standard normal at first, as in the official code."""

    def __init__(self, rng: Rng) -> None:
        super().__init__()
        self.log = constant(rng.normal(1))

    def forward(self) -> Tensor:
        """lambda, [K]."""
        return torch.exp(self.log.squeeze(-1))


class BanditPolicy(nn.Module):
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
        self.guided = config.guidance == "q"
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        obs_dim, action_dim, width = spec.obs_dim, spec.action_dim, config.hidden_dim
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        if config.policy != "gaussian":
            self.vae = VAE(rng, obs_dim, action_dim, config.latent_dim, width)
            self.vae_optim = Adam(self.vae, config.lr)
        if config.policy != "cvae":
            self.actor: nn.Module = GaussianNet(rng, (obs_dim, width, width, action_dim))
        elif self.guided:
            self.actor = MLP(rng, (obs_dim + action_dim, width, width, action_dim))  # xi
        if hasattr(self, "actor"):
            self.actor_optim = Adam(self.actor, config.lr)
        if self.guided:
            self.critic = QEnsemble(rng, obs_dim, action_dim, (width,) * 3, "mish")
            self.critic_optim = Adam(self.critic, config.lr)
        if self.guided and config.policy == "mmd":
            self.multiplier = Multiplier(rng)
            self.multiplier_optim = Adam(self.multiplier, config.multiplier_lr)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One step: critics, VAE, the actor against both, the multiplier."""
        config = self.config
        metrics: Metrics = {}
        if self.guided:
            metrics |= self.update_critic(batch)
        if config.policy != "gaussian":
            metrics |= self.descend(self.vae, self.vae_optim, self.vae_loss, batch, rng)
        losses = {"gaussian": self.gaussian_loss, "mmd": self.mmd_loss}
        if self.guided:
            losses["cvae"] = self.perturbation_loss
        if config.policy in losses:
            loss = losses[config.policy]
            metrics |= self.descend(self.actor, self.actor_optim, loss, batch, rng)
        if self.guided and config.policy == "mmd":
            metrics |= self.update_multiplier(metrics["mmd"])
        return metrics

    @staticmethod
    def descend(module: nn.Module, optim: Adam, loss: Any, batch: Batch, rng: Rng) -> Metrics:
        grads, metrics = gradients(module, lambda stand_in: loss(stand_in, batch, rng))
        optim.step(module, grads)
        return metrics

    def update_critic(self, batch: Batch) -> Metrics:
        def loss(critic: Any) -> tuple[Tensor, Metrics]:
            q = critic(batch.obs, batch.action)  # [K, 2, B]
            per_seed = squared_td_error(q, batch.reward)
            return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

        grads, metrics = gradients(self.critic, loss)
        self.critic_optim.step(self.critic, grads)
        return metrics

    def vae_loss(self, vae: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """L_vae: both terms are means over batch and dimensions, [K]."""
        noise = rng.normal(batch.obs.shape[1], self.config.latent_dim)
        decoded, mean, log_std = vae(batch.obs, batch.action, noise)
        error = self.bounds.stretch(torch.tanh(decoded)) - batch.action
        squared = error.square().mean(dim=(1, 2))
        kl = latent_kl(mean, log_std).mean(dim=(1, 2))
        return squared + self.config.kl_coef * kl, {"vae_error": squared, "vae_kl": kl}

    def gaussian_loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """-log pi(a), plus eta L_q at a draw that nothing bounds, [K]."""
        mean, log_std = self.limited(actor(batch.obs))
        bc_loss = -normal_log_prob(batch.action, mean, log_std).mean(dim=-1)
        if not self.guided:
            return bc_loss, {"bc_loss": bc_loss}
        action = mean + torch.exp(log_std) * rng.normal(*mean.shape[1:])
        q_loss = self.q_loss(batch.obs, action, rng)
        return bc_loss + self.config.q_coef * q_loss, {"bc_loss": bc_loss, "q_loss": q_loss}

    def mmd_loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """MMD to the VAE before the tanh; guided, lambda MMD + eta L_q, [K]."""
        config = self.config
        shape = (*batch.obs.shape[1:-1], config.mmd_samples)  # B, M
        obs = batch.obs.unsqueeze(-2).expand(-1, *shape, -1)
        target = self.vae.decode(obs, self.draw_latent(rng, *shape))  # [K, B, M, A]
        mean, log_std = actor(batch.obs)  # [K, B, A]
        noise = rng.normal(*shape, mean.shape[-1]).clamp(-config.noise_clip, config.noise_clip)
        own = mean.unsqueeze(-2) + torch.exp(log_std).unsqueeze(-2) * noise
        mmd = laplacian_mmd(own, target, config.mmd_sigma).mean(dim=-1)
        if not self.guided:
            return mmd, {"mmd": mmd}
        raw = mean + torch.exp(log_std) * rng.normal(*mean.shape[1:])
        q_loss = self.q_loss(batch.obs, self.bounds.stretch(torch.tanh(raw)), rng)
        per_seed = self.multiplier() * mmd + config.q_coef * q_loss
        return per_seed, {"mmd": mmd, "q_loss": q_loss}

    def perturbation_loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """-Q1 at perturbed samples of the VAE, [K]."""
        action = self.perturb(actor, batch.obs, self.draw_vae(batch.obs, rng))
        per_seed = -self.critic.member(0, batch.obs, action).mean(dim=-1)
        return per_seed, {"q_loss": per_seed}

    def q_loss(self, obs: Tensor, action: Tensor, rng: Rng) -> Tensor:
        """L_q with one critic, picked by a coin per step and seed, over the other's size: [K]."""
        q = self.critic(obs, action)  # [K, 2, B]
        return normalized_q_loss(q, q.abs().mean(dim=-1).flip(1), rng.uniform() < 0.5)

    def update_multiplier(self, mmd: Tensor) -> Metrics:
        """One step up lambda (MMD - threshold), in log lambda; then its limits."""

        def loss(multiplier: Any) -> tuple[Tensor, Metrics]:
            value = multiplier()
            return -value * (mmd - self.config.mmd_threshold), {"multiplier": value}

        grads, metrics = gradients(self.multiplier, loss)
        self.multiplier_optim.step(self.multiplier, grads)
        self.multiplier.log.clamp_(*LOG_MULTIPLIER)
        return metrics

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """[K, N, O] -> [K, N, A]."""
        return self.bounds.clamp(self.act_unclamped(obs, rng))

    def act_unclamped(self, obs: Tensor, rng: Rng) -> Tensor:
        """The same draw before it is moved into the bounds; only the Gaussian's can be outside."""
        if self.config.policy == "cvae":
            action = self.draw_vae(obs, rng)
            return self.perturb(self.actor, obs, action) if self.config.act_perturbed else action
        squashed = self.config.policy == "mmd"
        mean, log_std = self.actor(obs) if squashed else self.limited(self.actor(obs))
        raw = mean + torch.exp(log_std) * rng.normal(*mean.shape[1:])
        return self.bounds.stretch(torch.tanh(raw)) if squashed else raw

    def draw_latent(self, rng: Rng, *rows: int) -> Tensor:
        """Standard normal latents moved into +-latent_clip, [K, *rows, latent_dim]."""
        clip = self.config.latent_clip
        return rng.normal(*rows, self.config.latent_dim).clamp(-clip, clip)

    def draw_vae(self, obs: Tensor, rng: Rng) -> Tensor:
        """An action of the VAE for each observation."""
        return self.bounds.stretch(
            torch.tanh(self.vae.decode(obs, self.draw_latent(rng, *obs.shape[1:-1])))
        )

    def perturb(self, actor: Any, obs: Tensor, action: Tensor) -> Tensor:
        """`action` moved by at most `perturbation` half widths, and kept within the bounds."""
        shift = torch.tanh(actor(torch.cat((obs, action), dim=-1)))
        return self.bounds.clamp(action + self.config.perturbation * self.bounds.reach * shift)

    @staticmethod
    def limited(parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters
        return mean, log_std.clamp(*GAUSSIAN_LOG_STD)


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", BanditPolicy, config, config.steps),)


recipe = Recipe(
    name="bandit_policy",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "bandit_policy.yaml",
    summary="Gaussian, CVAE and MMD policies of Diffusion-QL's bandit, cloning or guided by Q",
    paper="arXiv:2208.06193",
)
