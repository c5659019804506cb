"""What an experiment is made of once it is resolved, and what identifies a trial."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.typed import FieldError, canonical_json, config_to_dict, content_hash

Precision = Literal["float32", "tf32", "mixed"]


class SpecError(FieldError):
    """An experiment that cannot be resolved; the message begins with the file and the key."""


@dataclass(frozen=True)
class EvaluationSpec:
    """How a trial's policy is evaluated; part of the trial's identity.

    Attributes:
        every: gradient steps between evaluations; the last step is always evaluated.
        episodes: per evaluation; episode e always starts from env seed `first_env_seed + e`.
        environment: what `EnvironmentSpec.describe()` says; filled at resolution.
        simulator: such as "mujoco 3.11.0"; filled at resolution.
    """

    every: int = 5000
    episodes: int = 10
    first_env_seed: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)
    simulator: str = ""

    def __post_init__(self) -> None:
        for name in ("every", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.first_env_seed < 2**31:
            raise ValueError(f"first_env_seed is {self.first_env_seed}; expected 0 to 2**31 - 1")

    def __hash__(self) -> int:
        return hash(canonical_json(self))


@dataclass(frozen=True)
class TrialSpec:
    """Algorithm x dataset x config x seed, fully resolved: the unit of identity and of results.

    `data` and `config` are plain mappings with a value for every field, as `config_to_dict`
    makes them. Neither the label nor the stack a trial runs in is part of its identity.
    `precision` is of the matrix products: see `algorithms.blocks.layers.set_precision`.
    """

    algorithm: str
    revision: int
    dataset_id: str
    dataset_digest: str
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    seed: int
    evaluation: EvaluationSpec
    label: str = ""
    precision: Precision = "float32"

    @functools.cached_property
    def id(self) -> str:
        """sha256 of the canonical JSON of everything but the label."""
        return content_hash(self.identity())

    @functools.cached_property
    def variant_id(self) -> str:
        """The same hash without the seed: trials that may be pooled."""
        return content_hash({k: v for k, v in self.identity().items() if k != "seed"})

    def identity(self) -> dict[str, Any]:
        """Exactly what is hashed, as JSON values."""
        return {
            "algorithm": self.algorithm,
            "revision": self.revision,
            "dataset_id": self.dataset_id,
            "dataset_digest": self.dataset_digest,
            "data": dict(self.data),
            "config": dict(self.config),
            "seed": self.seed,
            "precision": self.precision,
            "evaluation": config_to_dict(self.evaluation),
        }

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class RunOptions:
    """The `run:` block: how a sweep is executed, never part of an identity.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        compile: compile the training step: auto (where it pays), on, off.
        compile_act: where the step is compiled, compile acting in evaluations as well. Takes 20 to
            50 s (minutes for long chains) and saves a third to a half of each policy call.
        cuda_graphs: on a GPU, replay the compiled step as a CUDA graph: one launch for a step.
        cpus_per_stack, gpus_per_stack: resources of one worker process; fractions share a device.
        max_stack: most seeds trained together in one process; auto chooses it for each stage from
            memory and from what can run at once (`harness.memory.stack_size`).
        log_every: gradient steps per chunk; metrics are means over a chunk.
        checkpoint_every: gradient steps between checkpoints.
        max_failures: how often a crashed stack is retried within one sweep.
        max_concurrent: most stacks at once; 0 is as many as fit.
        max_envs: most environments stepped at once per seed; returns do not depend on it.
        stale_after_s: a training without a gradient or environment step for so long is ended and
            tried again; longer than the first step's compilation. 0 is never.
        storage: URL (fsspec's) of what nodes have in common where they share no home folder, see
            `harness.storage`; empty is HARNESS_STORAGE, or a shared home.
    """

    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    compile_act: bool = False
    cuda_graphs: bool = False
    cpus_per_stack: float = 1.0
    gpus_per_stack: float = 0.0
    max_stack: int | Literal["auto"] = 16
    log_every: int = 500
    checkpoint_every: int = 5000
    max_failures: int = 3
    max_concurrent: int = 0
    max_envs: int = 32
    stale_after_s: float = 3600.0
    storage: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_stack", 1),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("max_failures", 0),
            ("max_concurrent", 0),
            ("max_envs", 1),
            ("gpus_per_stack", 0),
            ("stale_after_s", 0),
        ):
            if getattr(self, name) != "auto" and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.cpus_per_stack <= 0:
            raise ValueError(f"cpus_per_stack is {self.cpus_per_stack}; expected more than 0")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu, cuda or cuda:N")

    def on_gpu(self, found: int = 0) -> bool:
        """Whether stacks train on a GPU, as these options say.

        Args:
            found: GPUs of the machine they run on; 0 if it is not looked at.
        """
        wanted = self.gpus_per_stack > 0 or found > 0
        return self.device.startswith("cuda") or (self.device == "auto" and wanted)


@dataclass(frozen=True)
class Origin:
    """Where the settings of one algorithm on one dataset come from, for people to read.

    Attributes:
        requested: the name the experiment uses; `relation` is that of the dataset to it.
        hparams: which block of the hyperparameter file applied.
        changed: what lies over that block and differs from it: "experiment" or "command line" ->
            setting -> value.
    """

    label: str
    algorithm: str
    dataset_id: str
    requested: str
    relation: str
    hparams: str
    note: str = ""
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What an experiment is to show: that one of its methods is above another.

    Attributes:
        better, than: labels of algorithms.
        text: the claim in words; by default "<better> is above <than>".
        margin: the difference exceeds so many points; negative: "not worse by more than".
        datasets: glob over dataset ids.
    """

    better: str
    than: str
    text: str = ""
    margin: float = 0.0
    datasets: str = "*"


@dataclass(frozen=True)
class Experiment:
    """Everything an experiment file asks for."""

    name: str
    trials: tuple[TrialSpec, ...]
    run: RunOptions
    source: Mapping[str, Any]  # the file with the overrides in it
    origins: tuple[Origin, ...] = ()
    description: str = ""
    claims: tuple[Claim, ...] = ()


def data_spec_class() -> type:
    """The dataclass of a spec's `data` block."""
    from harness.datasets import DataSpec

    return DataSpec


def data_to_dict(data: Any) -> dict[str, Any]:
    """The transforms as a trial's identity holds them.

    Without `held_out` where nothing is: it is younger than many a run, whose ids stay as they were.
    The default `discount`, where it ranks nothing, is 0.99 there: the default of these runs.
    """
    values = config_to_dict(data)
    if values["top_fraction"] == values["discount"] == 1.0:
        values["discount"] = 0.99
    if not values["held_out"]:
        del values["held_out"]
    return values
