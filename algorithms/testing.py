"""Checks that any algorithm must pass to be run by the harness, ours or a third party's.

    from algorithms.testing import check_recipe

    def test_contract():
        check_recipe(recipe, recipe.config(hidden_dim=16, batch_size=8))

`check_recipe` runs the quick checks on every `Train` stage; `check_compiled` compiles the step for
the CPU, which takes a minute. The parts can be called alone on a `Case`. All of them build learners
of a few seeds on a tiny in-memory dataset, so pass a small config. A broken rule raises
`ContractError`, which says what was seen, which rule it breaks and what usually causes it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.api import (
    Batch,
    DatasetSpec,
    Make,
    Metrics,
    Policy,
    Recipe,
    StageInput,
    Statistics,
    Train,
    phase_of,
)
from algorithms.blocks import products
from algorithms.blocks.rng import Rng, RowRng, Stream
from algorithms.blocks.windows import window_starts

State = dict[str, Tensor]
# Here because dynamo does not trace `fields`; without the optional `next_action`.
COLUMNS = tuple(f.name for f in fields(Batch) if f.default is MISSING)
GRID = 256.0  # observations of the tiny dataset are multiples of 1 / GRID


class ContractError(AssertionError):
    """An algorithm breaks a rule of the contract."""


class TinyDataset:
    """Random episodes in memory; implements `algorithms.api.Dataset`.

    Args:
        episode_length: steps of each episode; the last is truncated, or terminated in every second.
        bound: actions are uniform in [-bound, bound].
    """

    def __init__(
        self,
        obs_dim: int = 3,
        action_dim: int = 2,
        num_episodes: int = 6,
        episode_length: int = 10,
        bound: float = 1.0,
        seed: int = 0,
    ) -> None:
        rng = Rng.at_step([seed], 0, Stream.TEST)
        size = num_episodes * episode_length
        # Logarithm and cosine differ between processors in the last bit. On a grid observations are
        # the same bits everywhere: a world model chooses its held-out rows by their hash.
        drawn = rng.normal(num_episodes, episode_length + 1, obs_dim)[0]
        observations = (GRID * drawn).round() / GRID
        self.obs = observations[:, :-1].reshape(size, obs_dim)
        self.next_obs = observations[:, 1:].reshape(size, obs_dim)
        self.action = bound * (2.0 * rng.uniform(size, action_dim)[0] - 1.0)
        self.reward = rng.normal(size)[0]
        last = torch.arange(size) % episode_length == episode_length - 1
        odd = (torch.arange(size) // episode_length) % 2 == 1
        self.terminated = (last & odd).float()
        self.truncated = (last & ~odd).float()
        self.next_action = torch.where(last[:, None], 0.0, self.action.roll(-1, 0))
        self.episode_length, self.num_episodes = episode_length, num_episodes
        self.synthetic: Batch | None = None
        self.fraction = 0.0
        returns = self.reward.view(num_episodes, episode_length).sum(dim=1)
        std, mean = torch.std_mean(self.obs, dim=0, correction=0)
        self.spec = DatasetSpec(
            id="test/tiny-v0",
            digest=f"tiny-{seed}",
            obs_dim=obs_dim,
            action_dim=action_dim,
            action_low=(-bound,) * action_dim,
            action_high=(bound,) * action_dim,
            num_steps=size,
            num_episodes=num_episodes,
            statistics=Statistics(
                obs_mean=tuple(mean.tolist()),
                obs_std=tuple(std.tolist()),
                reward_mean=self.reward.mean().item(),
                reward_std=self.reward.std().item(),
                return_min=returns.min().item(),
                return_max=returns.max().item(),
            ),
        )

    def _rows(self, index: Tensor, names: tuple[str, ...] = COLUMNS) -> Batch:
        return Batch(**{name: getattr(self, name)[index] for name in names})

    def transitions(self, rng: Rng, batch_size: int, next_action: bool = False) -> Batch:
        count = round(self.fraction * batch_size)
        names = (*COLUMNS, "next_action") if next_action else COLUMNS
        batch = self._rows(rng.integers(self.spec.num_steps, batch_size - count), names)
        if self.synthetic is None or count == 0:
            return batch
        extra = self.synthetic
        pick = rng.integers(extra.reward.shape[1], count)  # [K, count]
        seed = torch.arange(pick.shape[0])[:, None]
        return Batch(
            **{
                name: torch.cat((getattr(batch, name), getattr(extra, name)[seed, pick]), dim=1)
                for name in names
            }
        )

    def rows(self, index: Tensor, next_action: bool = False) -> Batch:
        names = (*COLUMNS, "next_action") if next_action else COLUMNS
        return replace(self._rows(index, names), index=index)

    def segments(self, rng: Rng, batch_size: int, length: int, stride: int | None = None) -> Batch:
        if not 1 <= length <= self.episode_length:
            raise ValueError(f"length is {length}; episodes have {self.episode_length} steps")
        if stride is None:
            episode = rng.integers(self.num_episodes, batch_size)
            start = rng.integers(self.episode_length - length + 1, batch_size)
            first = episode * self.episode_length + start
        else:
            starts = self._starts(length, stride)
            first = starts[rng.integers(starts.shape[0], batch_size)]
        return self._rows(first.unsqueeze(-1) + torch.arange(length))

    @torch.compiler.assume_constant_result
    def _starts(self, length: int, stride: int) -> Tensor:
        lengths = [self.episode_length] * self.num_episodes
        ends = self.terminated.numpy(), self.truncated.numpy()
        return torch.from_numpy(window_starts(lengths, *ends, length, stride))

    def mixed(self, synthetic: Batch, fraction: float) -> TinyDataset:
        other = copy.copy(self)
        other.synthetic, other.fraction = synthetic, fraction
        return other


@dataclass(frozen=True)
class Case:
    """One `Train` stage with what it needs to run."""

    stage: Train
    dataset: Any = field(default_factory=TinyDataset)
    inputs: Mapping[str, Mapping[int, StageInput]] = field(default_factory=dict)  # per seed
    seeds: tuple[int, ...] = (3, 11, 4_000_000_000)
    steps: int = 3

    def build(self, seeds: Sequence[int] | None = None) -> Any:
        """A fresh learner."""
        seeds = self.seeds if seeds is None else seeds
        inputs = {name: _join([by_seed[s] for s in seeds]) for name, by_seed in self.inputs.items()}
        return self.stage.learner(self.stage.config, self.dataset.spec, tuple(seeds), inputs)

    def train(
        self,
        learner: Any,
        seeds: Sequence[int] | None = None,
        start: int = 0,
        wrap: Callable[[Any], Any] = lambda step: step,
    ) -> list[Metrics]:
        """`steps` updates from step `start`, with refreshes; `wrap` may compile the step."""
        seed_tensor = torch.tensor(self.seeds if seeds is None else seeds)

        def one_step(step: Tensor, phase: tuple[int, ...]) -> Metrics:
            rng = Rng(seed_tensor, step, Stream.TRAIN)
            return learner.update(learner.sample(self.dataset, rng), rng, *phase)

        wrapped = wrap(one_step)
        refresh_every = getattr(learner, "refresh_every", 0)
        history = []
        with torch.no_grad():
            for i in range(start, start + self.steps):
                if refresh_every and i % refresh_every == 0:
                    step = torch.full_like(seed_tensor, i)
                    learner.refresh(self.dataset, Rng(seed_tensor, step, Stream.MAKE))
                metrics = wrapped(torch.full_like(seed_tensor, i), phase_of(learner, i))
                history.append({name: value.clone() for name, value in metrics.items()})
        return history


def _join(inputs: Sequence[StageInput]) -> StageInput:
    state = {k: torch.cat([i.state[k] for i in inputs]) for k in inputs[0].state}
    return replace(inputs[0], state=state)


def _state(learner: Any) -> State:
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


def _seed_of(state: State, index: int) -> State:
    return {name: value[index : index + 1] for name, value in state.items()}


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rule: str) -> None:
    """Raises unless both are equal bit for bit (nan equals nan)."""
    if found.keys() != expected.keys():
        names = ", ".join(sorted(found.keys() ^ expected.keys()))
        raise ContractError(f"{rule}: these names are on one side only: {names}")
    for name, value in found.items():
        other = expected[name]
        if not torch.equal(torch.nan_to_num(value), torch.nan_to_num(other)) or not torch.equal(
            torch.isnan(value), torch.isnan(other)
        ):
            gap = (value.double() - other.double()).abs().max().item()
            raise ContractError(f"{rule}: {name} differs by up to {gap:.3g}")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: with more, a sum may be split according to the size of the stack."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_shapes(case: Case) -> None:
    """State and metrics are led by K and finite; parameters ask for no gradient."""
    learner = case.build()
    num_seeds = len(case.seeds)
    if not isinstance(learner, nn.Module):
        raise ContractError(
            f"{type(learner).__name__} is not an nn.Module; state must be registered"
        )
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            raise ContractError(
                f"parameter {name} requires grad; build it with blocks.layers.constant, "
                "gradients come from blocks.optim.gradients"
            )
    for name, value in learner.state_dict().items():
        if value.dim() == 0 or value.shape[0] != num_seeds:
            raise ContractError(
                f"state {name} has shape {tuple(value.shape)}; expected the first dimension to be "
                f"the {num_seeds} seeds. Constants go into buffers with persistent=False"
            )
    for metrics in case.train(learner):
        if not metrics:
            raise ContractError("update returned no metrics; expected at least a loss")
        for name, value in metrics.items():
            if value.shape != (num_seeds,) or not value.is_floating_point():
                raise ContractError(
                    f"metric {name} is {value.dtype} of shape {tuple(value.shape)}; "
                    f"expected floats of shape ({num_seeds},)"
                )
            if not torch.isfinite(value).all():
                raise ContractError(f"metric {name} is {value.tolist()} on the tiny dataset")
            if value.requires_grad:
                raise ContractError(f"metric {name} still hangs on an autograd graph")
    for name, parameter in learner.named_parameters():
        if parameter.grad is not None:
            raise ContractError(f"parameter {name} has a .grad; nothing may call backward()")


def check_determinism(case: Case) -> None:
    """A seed repeats its numbers, another seed has others; torch's generator is unused."""
    before = torch.random.get_rng_state()
    first, second = case.build(), case.build()
    metrics, again = case.train(first), case.train(second)
    for one, two in zip(metrics, again, strict=True):
        _same(two, one, "the same seeds must give the same metrics")
    _same(_state(second), _state(first), "the same seeds must give the same state")
    if not torch.equal(before, torch.random.get_rng_state()):
        raise ContractError("torch's global generator moved; draw every number from the Rng")
    fresh = _state(case.build())
    if len(case.seeds) > 1 and all(torch.equal(v[0], v[1]) for v in fresh.values()):
        raise ContractError("two seeds start with equal states; initialise from the given seeds")


def check_stacking(case: Case) -> None:
    """A seed trained in a stack equals the same seed alone, bit for bit.

    Use widths and batch sizes that are multiples of 16: eager `mish` and its like treat the last
    few numbers of a tensor, fewer than 32, with scalar code that may round differently.
    """
    with one_thread():
        stacked = case.build()
        metrics = case.train(stacked)
        for i, seed in enumerate(case.seeds):
            solo = case.build([seed])
            alone = case.train(solo, [seed])
            rule = f"seed {seed} in a stack of {len(case.seeds)} must equal itself alone"
            _same(_seed_of(_state(stacked), i), _state(solo), rule)
            for together, single in zip(metrics, alone, strict=True):
                _same({k: v[i : i + 1] for k, v in together.items()}, single, rule)


def check_resuming(case: Case) -> None:
    """Saving, loading into a fresh learner and continuing equals never stopping, bit for bit."""
    learner = case.build()
    case.train(learner)
    saved = _state(learner)
    expected = case.train(learner, start=case.steps)
    resumed = case.build()
    resumed.load_state_dict(saved)
    found = case.train(resumed, start=case.steps)
    rule = "a resumed run must equal an uninterrupted one (is all changing state registered?)"
    for one, two in zip(found, expected, strict=True):
        _same(one, two, rule)
    _same(_state(resumed), _state(learner), rule)


def check_strict_loading(case: Case) -> None:
    """A state with a missing or an extra key is refused."""
    learner = case.build()
    state = _state(learner)
    name = next(iter(state))
    missing = {k: v for k, v in state.items() if k != name}
    extra = {**state, "no_such_tensor": state[name]}
    for wrong, what in ((missing, f"without {name}"), (extra, "with no_such_tensor")):
        try:
            learner.load_state_dict(wrong)
        except (KeyError, RuntimeError, ValueError):
            continue
        raise ContractError(f"a state {what} was loaded; expected load_state_dict to raise")


def check_isolation(case: Case) -> None:
    """A seed that is nan leaves the others as they would be without it, bit for bit."""
    if len(case.seeds) < 2:
        raise ValueError(f"isolation needs at least 2 seeds; the case has {len(case.seeds)}")
    healthy, sick = case.build(), case.build()
    with torch.no_grad():
        for parameter in sick.parameters():
            parameter[0] = float("nan")
    case.train(healthy)
    case.train(sick)
    for i in range(1, len(case.seeds)):
        _same(
            _seed_of(_state(sick), i),
            _seed_of(_state(healthy), i),
            f"seed {case.seeds[i]} changed because seed {case.seeds[0]} was nan",
        )


def check_one_graph(case: Case) -> None:
    """The step traces as one graph, is traced once for each phase, and equals eager."""
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    traced, eager = case.build(), case.build()
    try:
        found = case.train(
            traced, wrap=lambda step: torch.compile(step, fullgraph=True, backend=backend)
        )
    except torch._dynamo.exc.Unsupported as error:
        raise ContractError(
            "the step does not trace as one graph; no .item(), no Python branch on a tensor, no "
            f"shapes that depend on data. torch says: {error}"
        ) from error
    expected = len({phase_of(eager, step) for step in range(case.steps)})
    if graphs != expected:
        raise ContractError(
            f"the step was traced {graphs} times in {case.steps} steps; expected {expected}: once, "
            "or once for each phase of a learner with a `period`. A Python number "
            "that changes with the step becomes a constant of the graph: use a tensor"
        )
    for one, two in zip(found, case.train(eager), strict=True):
        _same(one, two, "a traced step must equal the eager one")
    _same(_state(traced), _state(eager), "a traced step must equal the eager one")


def check_policy(case: Case, num_observations: int = 8) -> None:
    """Actions have the right shape, lie within bounds, change nothing, and mind no other seed."""
    spec, num_seeds = case.dataset.spec, len(case.seeds)
    learner = case.build()
    case.train(learner)
    if not isinstance(learner, Policy):
        raise ContractError(
            f"{type(learner).__name__} has no act(obs, rng); the last stage needs it"
        )
    before = _state(learner)
    seeds = torch.tensor(case.seeds)
    obs = Rng(seeds, torch.zeros_like(seeds), Stream.TEST).normal(num_observations, spec.obs_dim)
    obs = 3.0 * obs

    def act(policy: Any, of: Sequence[int], observed: Tensor) -> Tensor:
        tensor = torch.tensor(of)
        rng = Rng(tensor, torch.full_like(tensor, 7), Stream.EVALUATION, torch.tensor(2))
        with torch.no_grad():
            return policy.act(observed, rng)

    with one_thread():
        action = act(learner, case.seeds, obs)
        if action.shape != (num_seeds, num_observations, spec.action_dim):
            raise ContractError(
                f"act returned shape {tuple(action.shape)} for observations {tuple(obs.shape)}; "
                f"expected {(num_seeds, num_observations, spec.action_dim)}"
            )
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        if not ((action >= low) & (action <= high)).all():
            raise ContractError(
                f"actions outside {spec.action_low} to {spec.action_high}: {action}"
            )
        _same({"action": act(learner, case.seeds, obs)}, {"action": action}, "act must repeat")
        _same(_state(learner), before, "act must not change the state")
        for i, seed in enumerate(case.seeds):
            solo = case.build([seed])
            solo.load_state_dict(_seed_of(before, i))
            alone = act(solo, [seed], obs[i : i + 1])
            rule = f"act of seed {seed} must not depend on the stack"
            _same({"action": alone}, {"action": action[i : i + 1]}, rule)
        _check_rows(learner, seeds, obs)


def _check_rows(learner: Any, seeds: Tensor, obs: Tensor) -> None:
    """A row's action depends on its episode only, to rounding, not on the rows beside it."""

    def act(rows: list[int]) -> Tensor:
        episode = torch.tensor(rows).expand(len(seeds), -1)
        rng = RowRng(seeds, torch.zeros_like(seeds), Stream.EVALUATION, episode, episode * 0)
        with torch.no_grad():
            return learner.act(obs[:, rows], rng)

    rows = list(range(obs.shape[1]))
    gap = (act(rows)[:, rows[1:]] - act(rows[1:])).abs().max().item()
    if not gap < 1e-4:
        raise ContractError(
            f"actions of {len(rows) - 1} rows change by up to {gap:.3g} when another is added; "
            "every row is an episode of its own"
        )


CHECKS = (
    check_shapes,
    check_determinism,
    check_stacking,
    check_resuming,
    check_strict_loading,
    check_isolation,
    check_one_graph,
)


def cases(
    recipe: Recipe,
    config: Any = None,
    dataset: Any = None,
    seeds: tuple[int, ...] = Case.seeds,
    full_length: bool = False,
) -> Iterator[Case]:
    """A case for each `Train` stage, with the stages it needs trained for a few steps, or made.

    Args:
        config: default `recipe.config()`; pass a small one.
        full_length: cases have the steps that their stages declare.
    """
    config = recipe.config() if config is None else config
    dataset = TinyDataset() if dataset is None else dataset
    done: dict[str, dict[int, StageInput]] = {}
    parts = recipe.stages(config)
    for stage in parts:
        if isinstance(stage, Make):
            done[stage.name] = make(stage, dataset, done, seeds)
            continue
        inputs = {name: done[name] for name in stage.needs}
        steps = stage.steps if full_length else min(Case.steps, stage.steps)
        case = Case(stage, dataset, inputs, seeds, steps)
        yield case
        if stage == parts[-1]:
            return  # nothing needs it
        learner = case.build()
        case.train(learner)
        state = _state(learner)
        done[stage.name] = {
            seed: StageInput(stage.config, _seed_of(state, i)) for i, seed in enumerate(case.seeds)
        }


class MadeArrays(State):
    """What a `Make` stage is given as `out`, in memory."""

    def array(self, name: str, values: Tensor) -> None:
        self[name] = values.clone()

    def progress(self, done: int, total: int) -> None:
        pass


def make(
    stage: Make,
    dataset: Any,
    done: Mapping[str, Mapping[int, StageInput]],
    seeds: tuple[int, ...] = Case.seeds,
) -> dict[int, StageInput]:
    """The result of a `Make` stage for each seed, which must be the same in a stack and alone.

    Raises:
        ContractError: if it is not, or an array is not led by the seeds.
    """

    def run(seeds: Sequence[int]) -> MadeArrays:
        inputs = {name: _join([done[name][seed] for seed in seeds]) for name in stage.needs}
        out = MadeArrays()
        with torch.no_grad(), one_thread():
            rng = Rng.at_step(seeds, 0, Stream.MAKE)
            stage.function(stage.config, dataset, inputs, rng, out)
        return out

    together = run(seeds)
    for name, values in together.items():
        if values.dim() == 0 or values.shape[0] != len(seeds):
            raise ContractError(
                f"array {name} of stage {stage.name} has shape {tuple(values.shape)}; expected the "
                f"first dimension to be the {len(seeds)} seeds"
            )
    for i, seed in enumerate(seeds):
        rule = f"stage {stage.name}: seed {seed} in a stack must equal itself alone"
        _same(_seed_of(together, i), run([seed]), rule)
    return {seed: StageInput(stage.config, _seed_of(together, i)) for i, seed in enumerate(seeds)}


def check_recipe(
    recipe: Recipe,
    config: Any = None,
    dataset: Any = None,
    checks: Sequence[Callable[[Case], None]] = (*CHECKS, check_policy),
) -> None:
    """Runs every quick check on every `Train` stage of a recipe, `check_policy` on the last alone.

    Borrowed stages are run, not checked: their own recipe is. Tracing (`check_one_graph`) takes
    most of the time.

    Raises:
        ContractError: naming the stage, the check and what was seen.
    """
    config = recipe.config() if config is None else config
    if not any(f.name == "steps" for f in fields(config)):
        raise ContractError(f"{recipe.name}: the config has no field `steps`")
    last = recipe.stages(config)[-1]
    for case in cases(recipe, config, dataset):
        if case.stage.recipe is not None:
            continue
        for check in checks:
            if check is check_policy and case.stage != last:
                continue
            try:
                check(case)
            except ContractError as error:
                raise ContractError(
                    f"{recipe.name}, stage {case.stage.name}, {check.__name__}: {error}"
                ) from error


def check_compiled(case: Case, tolerance: float = 1e-4) -> None:
    """The step compiled for this machine equals eager, and stack equals solo, to rounding.

    Not bit for bit: the compiler lays out loops by shape, and may add in another order for another
    K. (Diffusion-QL at its published size came out bitwise equal for K = 1 and 3; behaviour cloning
    on the tiny dataset differs by 5e-10.) Takes a minute or two: it compiles twice.

    Args:
        tolerance: largest absolute difference of a state tensor after `case.steps` steps.
    """

    def compiled(step: Any) -> Any:
        return products.compiled(step, fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    first = case.seeds[:1]
    with one_thread():
        eager, stacked, solo = case.build(), case.build(), case.build(first)
        case.train(eager)
        case.train(stacked, wrap=compiled)
        case.train(solo, first, wrap=compiled)
    state = _state(stacked)
    for other, against in (
        (_state(eager), "compiled and eager"),
        (_state(solo), "a compiled stack and compiled solo"),
    ):
        for name, value in other.items():
            gap = (value.double() - state[name][: len(value)].double()).abs().max().item()
            if not gap <= tolerance:
                raise ContractError(f"{against} differ by {gap:.3g} in {name}")
