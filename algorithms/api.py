"""The types an algorithm is written against: nothing here knows Ray, a database or Minari.

Shape letters: `K` seeds (always leading), `B` batch, `L` segment length, `O` obs dim, `A` action
dim, `N` environments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Metrics = dict[str, Tensor]
"""Name to a tensor of shape [K], one value per seed."""


@dataclass(frozen=True)
class Batch:
    """Float32 transitions, leading [K, B], or segments, leading [K, B, L].

    `terminated` and `truncated` are 0/1 floats. Bootstrapping uses `discount * (1 - terminated)`:
    `next_obs` is the real next observation also where `truncated` is 1.
    """

    obs: Tensor  # [K, B, O]
    action: Tensor  # [K, B, A]
    reward: Tensor  # [K, B]
    next_obs: Tensor  # [K, B, O]
    terminated: Tensor  # [K, B]
    truncated: Tensor  # [K, B]
    next_action: Tensor | None = None  # [K, B, A], only if asked for; see `Dataset.transitions`
    index: Tensor | None = None  # [K, B], int64, where the rows are; only from `Dataset.rows`


@dataclass(frozen=True)
class Statistics:
    """Statistics of the transitions a learner can draw, after the spec's data transforms."""

    obs_mean: tuple[float, ...]
    obs_std: tuple[float, ...]  # population standard deviation
    reward_mean: float
    reward_std: float
    return_min: float  # smallest and largest undiscounted return of a whole episode
    return_max: float


@dataclass(frozen=True)
class DatasetSpec:
    """What a learner may know of its dataset when it is built."""

    id: str
    digest: str  # sha256 over content
    obs_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    num_steps: int  # transitions that can be drawn
    num_episodes: int
    statistics: Statistics


class Rng(Protocol):
    """Counter-based random numbers; a draw is a function of (seed, stream, step, site).

    The site is the position of the call within one step, so a step must make the same calls in
    the same order every time.
    """

    @property
    def step(self) -> Tensor:
        """Number of gradient steps done before this one, int64 [K]."""

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in [0, 1), shape [K, *shape]."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32, shape [K, *shape]."""

    def integers(self, high: int, *shape: int) -> Tensor:
        """Int64 in [0, high), shape [K, *shape]."""


class Dataset(Protocol):
    """Read-only transitions, resident on the learner's device."""

    spec: DatasetSpec

    def transitions(self, rng: Rng, batch_size: int, next_action: bool = False) -> Batch:
        """Uniform draws with replacement, independent for each seed: [K, B, ...].

        Args:
            next_action: also the action the data take at `next_obs`. There is none where the
                episode ends (`terminated` or `truncated` is 1); it is zero there.
        """

    def rows(self, index: Tensor, next_action: bool = False) -> Batch:
        """The transitions at `index` [K, B], int64 in [0, spec.num_steps), with `Batch.index`.

        `rows(rng.integers(spec.num_steps, batch_size))` is `transitions(rng, batch_size)`; what is
        precomputed for every transition is found by `index`.
        """

    def segments(self, rng: Rng, batch_size: int, length: int, stride: int | None = None) -> Batch:
        """Windows of consecutive steps that never cross an episode border: [K, B, L, ...].

        Uniform over all of them; with `stride`, over those of `blocks.windows.window_starts`.
        """

    def mixed(self, synthetic: Batch, fraction: float) -> Dataset:
        """A dataset whose batches hold `fraction` synthetic rows (synthetic is led by K)."""


@runtime_checkable
class Learner(Protocol):
    """An `nn.Module` built as `Learner(config, dataset.spec, seeds, inputs)`.

    Everything that changes during training is a registered parameter or buffer led by K, and no
    parameter requires grad (gradients come from `blocks.optim.gradients`).

    A learner that trains on data it generates has `refresh_every: int` (0: never) and
    `refresh(dataset, rng)`, called before the step 0 and every multiple of it, outside the compiled
    step. What it generates is part of its state (buffers, filled in place), and `sample` mixes it
    in with `dataset.mixed`: a run that is resumed between two refreshes has the same data. To have
    its data measured and written (`harness synthetic`) it has `generate(dataset, rng, coef)`, which
    returns windows of transitions [K, M, H, ...], and `guidable: bool`: whether the strength of
    guidance `coef` (None: that of training) means something to it.

    A learner may also have `limits`, a mapping from names of metrics to what they may not exceed: a
    seed above one has diverged, as one that is not finite.

    What is done only in some steps (a delayed policy update) needs no branch on a tensor: with
    `period: int` the step is called as `update(batch, rng, phase)`, where `phase` is the Python int
    `step % period`, and is compiled once for each. Phases may return different metrics.
    """

    def sample(self, dataset: Dataset, rng: Rng) -> Batch: ...

    def update(self, batch: Batch, rng: Rng) -> Metrics:
        """One gradient step; no host synchronisation, no Python branch on a tensor."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any: ...


def phase_of(learner: Any, step: int) -> tuple[int, ...]:
    """What `update` is given after batch and rng: nothing, or the phase if there is a `period`."""
    period = getattr(learner, "period", None)
    return () if period is None else (step % period,)


@runtime_checkable
class Policy(Protocol):
    """The last stage's learner.

    A policy with a density has `log_density(obs, action)`: [K, N, O], [K, N, A] -> [K, N],
    differentiable in the actions; a deterministic one may give that of a Gaussian around it.
    A policy whose draws may leave the bounds can also have `act_unclamped(obs, rng)`: the draw that
    `act` moves into them, for pictures of its distribution.
    """

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """Actions within the dataset's bounds: [K, N, O] -> [K, N, A].

        Rows are independent episodes: every draw is led by N (`rng.normal(N, ...)`), so that a
        row's action depends on its own episode only, however many are played beside it.
        """


@dataclass(frozen=True)
class StageInput:
    """What a needed stage left behind, as a later stage receives it."""

    config: Any  # the needed stage's own config
    state: Mapping[str, Tensor]  # a Train's state_dict or a Make's arrays, every tensor led by K
    dataset: Dataset | None = None  # a Make's dataset, if it wrote one


@dataclass(frozen=True)
class Train:
    """A stage that learns for `steps` gradient steps.

    With 0 steps (allowed if it needs something) it only acts, in a way of its own, with what an
    earlier stage has learned.
    """

    name: str
    learner: type
    config: Any
    steps: int
    needs: tuple[str, ...] = ()
    per_seed: bool = True  # False: one result shared by all seeds
    recipe: Recipe | None = None  # whose stage it is, if not the declaring recipe's: see `borrowed`
    recipe_config: Any = None  # that recipe's config


@dataclass(frozen=True)
class Make:
    """A stage that computes: called as `function(config, dataset, inputs, rng, out)`.

    `out.array(name, tensor led by K)` keeps a result, `out.progress(done, total)` tells how far the
    work is.
    """

    name: str
    function: Callable[..., None]
    config: Any
    needs: tuple[str, ...] = ()
    per_seed: bool = True
    recipe: Recipe | None = None
    recipe_config: Any = None


@dataclass(frozen=True)
class Pretrained:
    """A config field that names another algorithm, whose trained policy this one starts from.

    In a spec it is `{algorithm: ..., preset: ..., config: {...}}`. When the spec is resolved,
    `config` is laid over that algorithm's own hyperparameters for the dataset and completed, and
    its revision is noted: the field then holds all that its own trial would.
    """

    algorithm: str = ""
    preset: str = ""  # of the algorithm's hyperparameter file; blank once resolved
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 0  # follows from what is installed; 0 before the spec is resolved

    def config_of(self, recipe: Recipe) -> Any:
        """The other algorithm's config.

        Raises:
            ValueError: if another revision of it is installed than was noted.
        """
        if self.revision not in (0, recipe.revision):
            raise ValueError(
                f"{recipe.name} is wanted at revision {self.revision}, but revision "
                f"{recipe.revision} is installed; load the experiment again"
            )
        return recipe.config(**self.config)


@dataclass(frozen=True)
class Recipe:
    """What an entry point in the group `harness.algorithms` resolves to.

    The last stage of `stages(config)` is a `Train` whose learner is also a `Policy`.
    """

    name: str
    revision: int  # bumped whenever the numbers change
    config: type  # frozen dataclass with a default for every field, `steps` among them
    stages: Callable[[Any], tuple[Train | Make, ...]]
    hparams: Path | None = None  # YAML: a default block, then per-dataset blocks
    summary: str = ""
    paper: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def borrowed(recipe: Recipe, config: Any) -> tuple[Train | Make, ...]:
    """The stages of another recipe, to stand before one's own.

    They keep their identity: what runs is a stage of that recipe, cached for its own trials and for
    all that borrow it.
    """
    return tuple(
        replace(stage, recipe=stage.recipe or recipe, recipe_config=stage.recipe_config or config)
        for stage in recipe.stages(config)
    )
