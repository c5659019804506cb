"""Consistency distillation (Song, Dhariwal, Chen and Sutskever, 2023, arXiv:2303.01469, Alg. 2).

A one-step student of an EDM teacher: f(a; sigma, s) is trained to be constant along the teacher's
deterministic paths, and to be the identity at sigma_min. It acts by f of pure noise at sigma_max,
one network evaluation. The baseline CD of `vdd`'s paper.

    paper            here           where
    f_theta          consistency    c_skip a + c_out F(c_in a, sigma), Appendix C
    theta^-          target         slow copy of theta, rate 1 - target_decay (mu)
    epsilon, T       sigma_min, sigma_max of the teacher
    t_n              levels         N of them, Karras spacing with rho = 7
    Phi              heun_step      one step of the teacher from t_{n+1} to t_n

Deviations: (a) the distance is the squared error of actions; the paper's best is a perceptual one
of images. (b) Adam; the paper has rectified Adam. (c) the network is the teacher's MLP, also its
initial value (as in the paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from algorithms.blocks.critics import polyak_update
from algorithms.blocks.layers import frozen_copy
from algorithms.blocks.optim import Adam, gradients
from algorithms.teachers import restored, teacher_config, teacher_stages

TEACHER = Pretrained("diffusion_bc")


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's where images do not matter."""

    steps: int = 20_000  # gradient steps (ours: as many as vdd's iterations)
    teacher: Pretrained = TEACHER  # an EDM: {algorithm: diffusion_bc, config: {form: edm}}
    batch_size: int = 1024  # as vdd's (ours); 512 in the paper
    lr: float = 1e-4  # Adam (ours: vdd's); 4e-4 on CIFAR-10
    num_levels: int = 18  # N (paper, CIFAR-10 with Heun's rule)
    rho: float = 7.0  # spacing of the levels (paper, after EDM)
    target_decay: float = 0.95  # mu, weight of the old target (paper, ImageNet; 0 on CIFAR-10)
    ema_decay: float = 0.999  # of the network that acts (ours: the teacher's); 0.9999 on CIFAR-10

    def __post_init__(self) -> None:
        if self.num_levels < 2:
            raise ValueError(f"num_levels is {self.num_levels}; expected at least 2")
        teacher = teacher_config(self.teacher)
        if getattr(teacher, "form", "") != "edm":
            raise ValueError(
                f"teacher {self.teacher.algorithm} has a chain of discrete levels; consistency "
                "distillation follows the paths of an EDM: algorithm diffusion_bc, form edm"
            )


class ConsistencyDistillation(nn.Module):
    """Learner and policy; see the module's docstring."""

    levels: Tensor  # ascending, [N]

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        (given,) = (inputs or {}).values()
        policy = restored(config.teacher, spec, given.state)
        self._teacher = (policy,)  # in a tuple: its weights are not part of our state
        self.scales = policy.preconditioning
        self.bounds, self.normalizer = policy.bounds, frozen_copy(policy.normalizer)
        self.actor = frozen_copy(policy.ema_actor)
        self.target, self.ema_actor = frozen_copy(self.actor), frozen_copy(self.actor)
        self.optim = Adam(self.actor, config.lr)
        levels = self.scales.karras_sigmas(config.num_levels, config.rho)[:-1].flip(0)
        self.register_buffer("levels", levels, persistent=False)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        grads, metrics = gradients(self.actor, lambda actor: self.loss(actor, batch, rng))
        metrics["grad_norm"] = self.optim.step(self.actor, grads)
        polyak_update(self.target, self.actor, 1.0 - self.config.target_decay)
        polyak_update(self.ema_actor, self.actor, 1.0 - self.config.ema_decay)
        return metrics

    def loss(self, actor: Any, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """E |f(a + t_{n+1} z; t_{n+1}) - f^-(Phi(a + t_{n+1} z); t_n)|^2, mean over all, [K]."""
        (teacher,) = self._teacher
        clean, obs = teacher.unit(batch.action), self.normalizer(batch.obs)
        n = rng.integers(self.config.num_levels - 1, clean.shape[1])  # [K, B]
        lower, upper = self.levels[n], self.levels[n + 1]
        noisy = clean + upper.unsqueeze(-1) * rng.normal(*clean.shape[1:])
        earlier = self.heun_step(noisy, upper, lower, obs)
        target = self.consistency(self.target, earlier, lower, obs)
        error = self.consistency(actor, noisy, upper, obs) - target.detach()
        per_seed = error.square().mean(dim=(1, 2))
        return per_seed, {"consistency_loss": per_seed}

    def heun_step(self, noisy: Tensor, upper: Tensor, lower: Tensor, obs: Tensor) -> Tensor:
        """The teacher's path from level `upper` to `lower` [K, B], by Heun's rule."""
        (teacher,) = self._teacher
        high, low = upper.unsqueeze(-1), lower.unsqueeze(-1)
        slope = (noisy - teacher.denoise(noisy, upper, obs)) / high
        euler = noisy + (low - high) * slope
        corrected = (euler - teacher.denoise(euler, lower, obs)) / low
        return noisy + (low - high) * 0.5 * (slope + corrected)

    def consistency(self, actor: Any, noisy: Tensor, sigma: Tensor, obs: Tensor) -> Tensor:
        """f(noisy; sigma): the identity at sigma_min, [K, B, A]."""
        (teacher,) = self._teacher
        data, above = self.scales.sigma_data, sigma - self.scales.sigma_min
        _, _, c_in = self.scales.scalings(sigma)
        c_skip = data**2 / (above.square() + data**2)
        c_out = data * above * c_in
        output = teacher.network(actor, obs)(c_in.unsqueeze(-1) * noisy, sigma.log() / 4.0)
        return c_skip.unsqueeze(-1) * noisy + c_out.unsqueeze(-1) * output

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """f of pure noise, one network evaluation: [K, N, O] -> [K, N, A]."""
        sigma = self.levels[-1:].view(1, 1)
        noise = sigma.unsqueeze(-1) * rng.normal(obs.shape[1], self.bounds.low.shape[0])
        return self.bounds.stretch(
            self.consistency(self.ema_actor, noise, sigma, self.normalizer(obs))
        )


def stages(config: Config) -> tuple[Train | Make, ...]:
    before = teacher_stages(config.teacher)
    needs = (before[-1].name,)
    return (*before, Train("student", ConsistencyDistillation, config, config.steps, needs))


recipe = Recipe(
    name="consistency_distillation",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "consistency_distillation.yaml",
    summary="One-step consistency distillation of an EDM diffusion policy",
    paper="arXiv:2303.01469",
)
