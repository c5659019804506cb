"""The rows of the results database, as values: what a run leaves behind, and nothing derived.

Raw returns are kept per episode; normalised scores and the choice of a checkpoint are made when
reading. Times are ISO 8601 in UTC with a trailing 'Z'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Status = Literal["running", "done", "failed", "diverged", "interrupted"]
FINISHED: tuple[Status, ...] = ("done", "diverged")
"""Outcomes: a run with one of them is not continued."""
R = TypeVar("R")


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset's content, by digest, and the references its scores are normalised with."""

    dataset_id: str
    digest: str
    env_id: str
    relation: str  # "original", "regenerated", "different", "generated", "local": see the catalog
    ref_min: float | None
    ref_max: float | None
    ref_source: str  # names the reference set; "" without references
    num_steps: int
    num_episodes: int
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRecord:
    """Algorithm x dataset x config x seed: the unit of identity and of results."""

    trial_id: str  # sha256 of the canonical spec
    variant_id: str  # the same hash without the seed: trials that may be pooled
    label: str  # display name of the method; not part of the identity
    algorithm: str
    revision: int
    dataset_id: str
    dataset_digest: str
    data: Mapping[str, Any]  # data transforms
    config: Mapping[str, Any]  # fully resolved
    seed: int
    evaluation: Mapping[str, Any]
    simulator: str  # e.g. "mujoco 3.11.0"; rows of different simulators are never pooled
    created_at: str
    precision: str = "float32"  # of the matrix products: float32 | tf32 | mixed (bfloat16)


@dataclass(frozen=True)
class RunRecord:
    """One attempt at a trial. Resuming from its own checkpoint continues the same run."""

    run_id: str
    trial_id: str
    attempt: int  # from 1
    status: Status
    started_at: str
    ended_at: str | None
    git_commit: str  # "" outside a checkout
    git_dirty: bool
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    device: str
    compiled: bool
    stack: tuple[int, ...]  # the seeds that shared the process
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds: train, evaluate, compile
    steps_done: int = 0
    segments: tuple[Mapping[str, Any], ...] = ()  # one entry for each process that worked on it
    error: str | None = None  # for diverged: step and metric; for failed: the last traceback


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation episode, raw."""

    run_id: str
    step: int
    episode: int
    env_seed: int
    episode_return: float
    length: int
    mode: int | None = None  # which solution of the task, where the environment tells


@dataclass(frozen=True)
class MetricRecord:
    """The mean of one training metric over the chunk that ended at `step`."""

    run_id: str
    step: int
    name: str
    value: float


@dataclass(frozen=True)
class ArtifactRecord:
    """A published stage."""

    stage_id: str
    run_id: str | None
    stage: str
    path: str  # relative to the artifact store's root
    sha256: str  # of the manifest
    num_bytes: int
    created_at: str


@dataclass(frozen=True)
class LatencyRecord:
    """How long a trained policy of one seed takes to act, measured after the run.

    What was timed is `act` alone, from observations on the device to actions on it.
    """

    run_id: str
    measured_at: str
    batch: int  # observations in a call
    compiled: bool  # whether the call was compiled; else op by op
    device: str
    threads: int  # of the process, for work on the CPU
    calls: int  # timed, after warm-up; all rounds together
    median_ms: float  # of a call, over all rounds
    p99_ms: float  # of a call: at most 1 % of the calls were slower; the slowest of up to 99
    round_medians_ms: tuple[float, ...]  # one for each round, between which others were measured
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


@dataclass(frozen=True)
class DetectionRecord:
    """How well a detector of out-of-distribution actions told one kind from the data's."""

    dataset_id: str
    dataset_digest: str
    detector: str
    config: Mapping[str, Any]  # of the detector, and what else the number depends on
    seed: int
    against: str  # uniform, perturbed, or a policy's label
    count: int  # actions of each kind
    auroc: float
    aupr: float
    fpr95: float  # false positive rate at 95 % true positives
    created_at: str
    git_commit: str
    git_dirty: bool


Record = (
    DatasetRecord
    | TrialRecord
    | RunRecord
    | EvalRecord
    | MetricRecord
    | ArtifactRecord
    | LatencyRecord
    | DetectionRecord
)


_TUPLES: dict[type, tuple[str, ...]] = {
    RunRecord: ("stack", "segments"),
    LatencyRecord: ("round_medians_ms",),
}


def from_json(kind: type[R], values: Mapping[str, Any]) -> R:
    """A record from its fields as JSON keeps them, where tuples are lists.

    Raises:
        KeyError, TypeError: if a field is missing, unknown or not a list where a list belongs.
    """
    lists = {name: tuple(values[name]) for name in _TUPLES.get(kind, ())}
    return kind(**{**values, **lists})
