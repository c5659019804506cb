"""A third party's algorithm: teacher -> calibration -> student, in plain torch.

The teacher regresses actions on observations with a linear model. A `Make` stage measures its
mean residual on a fixed number of transitions. The student regresses the corrected teacher. Small
on purpose: it exists to exercise stages, caching, sharing and resuming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Config:
    steps: int = 40  # of the student
    teacher_steps: int = 30
    teacher_lr: float = 0.05
    student_lr: float = 0.1
    batch_size: int = 32
    calibration_size: int = 64  # transitions the residual is measured on
    shared_teacher: bool = False  # one teacher and one calibration for all seeds


@dataclass(frozen=True)
class RegressionConfig:
    lr: float
    batch_size: int


@dataclass(frozen=True)
class CalibrationConfig:
    size: int


class Linear(nn.Module):
    """obs [K, B, O] -> [K, B, A], one weight matrix per seed, trained by gradient descent."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        config: RegressionConfig,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, StageInput] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        num_seeds = len(seeds)
        self.register_buffer("weight", torch.zeros(num_seeds, spec.obs_dim, spec.action_dim))
        self.register_buffer("bias", torch.zeros(num_seeds, 1, spec.action_dim))
        for name in ("low", "high"):
            bound = torch.tensor(getattr(spec, f"action_{name}"))
            self.register_buffer(name, bound, persistent=False)
        for name in ("mean", "std"):
            statistic = torch.tensor(getattr(spec.statistics, f"obs_{name}"))
            self.register_buffer(f"obs_{name}", statistic, persistent=False)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size)

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One step down the gradient of the mean squared error, in closed form."""
        features = self.features(batch.obs)
        error = features @ self.weight + self.bias - self.target(batch)  # [K, B, A]
        scale = 2.0 * self.config.lr / error[0].numel()
        self.weight.sub_(scale * features.transpose(1, 2) @ error)
        self.bias.sub_(scale * error.sum(dim=1, keepdim=True))
        return {"loss": error.square().mean(dim=(1, 2))}

    def target(self, batch: Batch) -> Tensor:
        return batch.action

    def features(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_mean) / (self.obs_std + 1e-3)

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        action = self.features(obs) @ self.weight + self.bias
        return action.clamp(self.low, self.high)


class Student(Linear):
    """Regresses the teacher's action plus its mean residual."""

    def __init__(
        self,
        config: RegressionConfig,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, StageInput] | None = None,
    ) -> None:
        super().__init__(config, spec, seeds, inputs)
        inputs = inputs or {}
        teacher, calibration = inputs["teacher"].state, inputs["calibration"].state
        self.register_buffer("teacher_weight", teacher["weight"].clone())
        self.register_buffer("teacher_bias", teacher["bias"].clone())
        self.register_buffer("residual", calibration["residual"].clone())

    def target(self, batch: Batch) -> Tensor:
        teacher = self.features(batch.obs) @ self.teacher_weight + self.teacher_bias
        return teacher + self.residual


def calibrate(
    config: CalibrationConfig,
    dataset: Dataset,
    inputs: Mapping[str, StageInput],
    rng: Rng,
    out: Any,
) -> None:
    """Writes the teacher's mean residual, [K, 1, A]."""
    batch = dataset.transitions(rng, config.size)
    out.progress(1, 2)
    state = inputs["teacher"].state
    mean = torch.tensor(dataset.spec.statistics.obs_mean, device=batch.obs.device)
    std = torch.tensor(dataset.spec.statistics.obs_std, device=batch.obs.device)
    predicted = (batch.obs - mean) / (std + 1e-3) @ state["weight"] + state["bias"]
    out.array("residual", (batch.action - predicted).mean(dim=1, keepdim=True))


def stages(config: Config) -> tuple[Train | Make, ...]:
    per_seed = not config.shared_teacher
    teacher = RegressionConfig(config.teacher_lr, config.batch_size)
    student = RegressionConfig(config.student_lr, config.batch_size)
    calibration = CalibrationConfig(config.calibration_size)
    return (
        Train("teacher", Linear, teacher, config.teacher_steps, per_seed=per_seed),
        Make("calibration", calibrate, calibration, needs=("teacher",), per_seed=per_seed),
        Train("student", Student, student, config.steps, needs=("teacher", "calibration")),
    )


recipe = Recipe(
    name="two_stage",
    revision=3,
    config=Config,
    stages=stages,
    summary="Linear behaviour cloning through a teacher",
)
