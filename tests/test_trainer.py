"""The step loop: chunks, divergence, slicing by seed and continuing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from algorithms.blocks.rng import Rng, Stream
from harness import datasets
from harness.datasets import DataSpec
from harness.trainer import (
    STEP_KEY,
    Trainer,
    check_precision,
    resolve_compile,
    resolve_cuda_graphs,
    resolve_device,
)

CPU = torch.device("cpu")


class Counter(nn.Module):
    """A learner whose state and metrics are known in closed form."""

    def __init__(self, num_seeds, nan_at=None):
        super().__init__()
        self.register_buffer("total", torch.zeros(num_seeds))
        self.nan_at = nan_at  # (seed index, step)

    def sample(self, dataset, rng):
        return None

    def update(self, batch, rng):
        self.total += rng.step + 1.0  # 1, 2, 3, ...
        loss = self.total.clone()
        if self.nan_at is not None:
            index, step = self.nan_at
            bad = (torch.arange(len(loss)) == index) & (rng.step + 1 >= step)
            loss = torch.where(bad, torch.nan, loss)
        return {"fine": torch.ones_like(loss), "loss": loss}


def test_metrics_are_means_over_the_chunk_and_steps_count_up():
    trainer = Trainer(Counter(2), None, [0, 1], CPU, False)
    first, second = trainer.advance(3), trainer.advance(2)
    assert (first.step, second.step) == (3, 5)
    assert first.metrics["loss"] == [pytest.approx((1 + 3 + 6) / 3)] * 2
    assert second.metrics["loss"] == [pytest.approx((10 + 15) / 2)] * 2
    assert first.diverged == {}


def test_a_divergence_names_the_seed_the_step_and_the_metric():
    trainer = Trainer(Counter(3, nan_at=(1, 5)), None, [7, 8, 9], CPU, False)
    assert trainer.advance(4).diverged == {}
    chunk = trainer.advance(4)
    assert list(chunk.diverged) == [1]
    assert (chunk.diverged[1].step, chunk.diverged[1].metric) == (5, "loss")
    assert "loss is not finite at step 5" in str(chunk.diverged[1])


def test_a_seed_above_a_limit_of_its_learner_diverges_and_the_others_go_on():
    learner = Counter(2)
    learner.limits = {"loss": 5.0, "no such metric": 0.0}
    learner.total[1] = -100.0
    chunk = Trainer(learner, None, [7, 8], CPU, False).advance(4)  # totals 1, 3, 6, 10
    assert list(chunk.diverged) == [0]
    assert str(chunk.diverged[0]) == "loss is above 5 at step 3"


def test_metrics_of_a_wrong_shape_are_refused():
    class Wrong(Counter):
        def update(self, batch, rng):
            return {"loss": torch.zeros(5)}

    with pytest.raises(ValueError, match=r"must have shape \[K\]"):
        Trainer(Wrong(2), None, [0, 1], CPU, False).advance(1)


class Alternating(Counter):
    """Steps 0, 3, 6, ... return another metric than the others."""

    period = 3

    def update(self, batch, rng, phase):
        self.total += 10.0**phase
        loss = rng.step + 1.0
        return {"loss": loss} if phase else {"loss": loss, "rare": torch.where(loss > 3, loss, 0)}


def test_phases_follow_the_trainers_own_step_also_after_a_resume():
    whole = Trainer(Alternating(2), None, [0, 1], CPU, False)
    first = whole.advance(4)
    assert first.metrics == {"loss": [2.5, 2.5], "rare": [2.0, 2.0]}  # (0 + 4) / 2
    assert whole.learner.total.tolist() == [112.0, 112.0]
    states = [whole.seed_state(i) for i in range(2)]
    resumed = Trainer(Alternating(2), None, [0, 1], CPU, False)
    resumed.load_seed_states(states)
    assert resumed.advance(1).metrics == whole.advance(1).metrics == {"loss": [5.0, 5.0]}
    assert resumed.learner.total.tolist() == whole.learner.total.tolist() == [122.0, 122.0]


def test_a_metric_of_one_phase_only_can_diverge():
    class Sick(Alternating):
        def update(self, batch, rng, phase):
            metrics = super().update(batch, rng, phase)
            return metrics if phase else metrics | {"rare": torch.tensor([1.0, torch.inf])}

    chunk = Trainer(Sick(2), None, [0, 1], CPU, False).advance(7)
    assert list(chunk.diverged) == [1]
    assert (chunk.diverged[1].step, chunk.diverged[1].metric) == (1, "rare")


@pytest.mark.parametrize("kind", [Counter, Alternating])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_chunk_that_was_stopped_ends_as_if_it_had_not_been(kind, stop_after, monkeypatch):
    monkeypatch.setattr("harness.trainer.STOP_CHECK_S", -1.0)  # ask before every step
    whole = Trainer(kind(2), None, [0, 1], CPU, False)
    stopped = Trainer(kind(2), None, [0, 1], CPU, False)
    for learner in (whole.learner, stopped.learner):
        if kind is Counter:
            learner.nan_at = (1, 2)
    expected = whole.advance(7)
    assert stopped.advance(7, lambda: stopped.steps_done == stop_after) is None
    assert stopped.steps_done == stop_after
    resumed = Trainer(stopped.learner, None, [0, 1], CPU, False)
    # Files keep no order of tensors.
    states = [dict(sorted(stopped.seed_state(i).items(), reverse=True)) for i in range(2)]
    resumed.load_seed_states(states)
    chunk = resumed.advance(7 - stop_after)
    assert chunk.step == expected.step == 7
    assert repr(chunk.metrics) == repr(expected.metrics)  # nan equals nan
    assert chunk.diverged == expected.diverged
    assert not any(name.startswith("trainer.open") for name in resumed.seed_state(0))


@pytest.mark.parametrize("kind", [Counter, Alternating])
@pytest.mark.parametrize("opened", [(0, 5), (5, 0), (0, 3), (4, 2)])
def test_seeds_whose_chunks_began_at_different_steps_keep_their_own_means(
    kind, opened, monkeypatch
):
    """Both are at step 5; 5 is one whose chunk has just ended."""
    monkeypatch.setattr("harness.trainer.STOP_CHECK_S", -1.0)  # ask before every step

    def state(seed, began):
        trainer = Trainer(kind(1), None, [seed], CPU, False)
        if began:
            trainer.advance(began)
        if began < 5:
            assert trainer.advance(9, lambda: trainer.steps_done == 5) is None
        return trainer.seed_state(0)

    states = [state(seed, began) for seed, began in enumerate(opened)]
    joined = Trainer(kind(2), None, [0, 1], CPU, False)
    joined.load_seed_states(states)
    kept = [joined.seed_state(i) for i in range(2)]  # as it is while the chunk is open
    again = Trainer(kind(2), None, [0, 1], CPU, False)
    again.load_seed_states(kept)
    chunks = [joined.advance(3), again.advance(3)]
    for seed in range(2):
        alone = Trainer(kind(1), None, [seed], CPU, False)
        alone.load_seed_states([states[seed]])
        expected = {name: mean for name, (mean,) in alone.advance(3).metrics.items()}
        for chunk in chunks:
            assert {name: means[seed] for name, means in chunk.metrics.items()} == expected
            assert chunk.diverged == {}


def test_a_metric_that_one_seeds_part_of_a_chunk_has_not_is_nan_for_it(monkeypatch):
    monkeypatch.setattr("harness.trainer.STOP_CHECK_S", -1.0)
    early, late = (Trainer(Alternating(1), None, [seed], CPU, False) for seed in (0, 1))
    assert early.advance(9, lambda: early.steps_done == 4) is None
    late.advance(4)
    joined = Trainer(Alternating(2), None, [0, 1], CPU, False)
    joined.load_seed_states([early.seed_state(0), late.seed_state(0)])
    metrics = joined.advance(1).metrics
    assert metrics["loss"] == [3.0, 5.0]
    assert metrics["rare"][0] == 2.0  # (0 + 4) / 2
    assert math.isnan(metrics["rare"][1])


def make_trainer(bandit, seeds, compile_step=False, name="bc", **config):
    from harness.registry import Registry

    recipe = Registry().get(name)
    stage = recipe.stages(recipe.config(batch_size=8, hidden_dim=16, **config))[-1]
    dataset = datasets.load(bandit, DataSpec())
    learner = stage.learner(stage.config, dataset.spec, seeds, {})
    return Trainer(learner, dataset, seeds, CPU, compile_step)


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["bc", "diffusion_ql"])
def test_seeds_taken_out_of_stacks_continue_bitwise(bandit, name):
    """Three seeds from two different stacks, stacked anew, equal an uninterrupted run."""
    whole = make_trainer(bandit, [3, 1, 4], name=name)
    whole.advance(6)
    left, right = make_trainer(bandit, [4, 3], name=name), make_trainer(bandit, [1], name=name)
    left.advance(2)
    right.advance(2)
    anew = make_trainer(bandit, [3, 1, 4], name=name)
    anew.load_seed_states([left.seed_state(1), right.seed_state(0), left.seed_state(0)])
    assert anew.steps_done == 2
    anew.advance(1)
    anew.advance(3)
    for index in range(3):
        assert_equal_states(whole.seed_state(index), anew.seed_state(index))


def test_states_of_another_learner_or_another_step_are_refused(bandit):
    trainer = make_trainer(bandit, [0, 1])
    state = trainer.seed_state(0)
    with pytest.raises(ValueError, match="missing"):
        trainer.load_seed_states([state, dict(list(state.items())[1:])])
    later = dict(state) | {STEP_KEY: state[STEP_KEY] + 1}
    with pytest.raises(ValueError, match="different steps"):
        trainer.load_seed_states([state, later])
    with pytest.raises(ValueError, match="1 states for a stack of 2"):
        trainer.load_seed_states([state])


@pytest.mark.slow
def test_the_compiled_step_equals_the_eager_one_and_does_not_depend_on_the_stack(bandit):
    eager = make_trainer(bandit, [3, 1], name="diffusion_ql", denoise_steps=2)
    stacked = make_trainer(bandit, [3, 1], True, name="diffusion_ql", denoise_steps=2)
    alone = make_trainer(bandit, [3], True, name="diffusion_ql", denoise_steps=2)
    for trainer in (eager, stacked, alone):
        trainer.advance(5)
    assert_equal_states(stacked.seed_state(0), alone.seed_state(0))
    for name, value in eager.seed_state(1).items():
        torch.testing.assert_close(value, stacked.seed_state(1)[name], rtol=1e-3, atol=1e-5)


def test_a_refresh_sees_the_step_and_the_dataset_and_its_result_is_part_of_the_state():
    class Refreshing(Counter):
        def refresh(self, dataset, rng):
            self.total.copy_(dataset + rng.step)

    trainer = Trainer(Refreshing(1), 100, [0], CPU, False)
    trainer.advance(4)
    trainer.refresh()
    assert trainer.seed_state(0)["total"].tolist() == [104.0]


def test_devices_and_compile_modes_are_checked():
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            resolve_device("cuda")
    assert resolve_compile("off", CPU, 10**9) == (False, "")
    assert resolve_compile("auto", CPU, 10) == (False, "")
    with pytest.raises(ValueError, match="expected auto, on or off"):
        resolve_compile("yes", CPU, 10)


def test_without_a_compiler_training_is_eager_with_a_notice(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled, notice = resolve_compile("on", CPU, 10**9)
    assert not compiled
    assert "g++" in notice


def test_a_step_draws_from_its_own_numbers():
    """The trainer hands out the draws of (seed, step), whatever was done before."""

    class Recorder(Counter):
        def __init__(self):
            super().__init__(2)
            self.seen = []

        def update(self, batch, rng):
            self.seen.append(rng.normal(3))
            return {"loss": self.total}

    learner = Recorder()
    Trainer(learner, None, [5, 6], CPU, False).advance(3)
    expected = Rng.at_step([5, 6], 2, Stream.TRAIN).normal(3)
    assert torch.equal(learner.seen[2], expected)


def test_tf32_is_refused_where_it_would_be_float32_under_another_name():
    check_precision("mixed", CPU)
    check_precision("tf32", torch.device("cuda:1"))
    with pytest.raises(ValueError, match="tf32 exists on CUDA devices only and this one is cpu"):
        check_precision("tf32", CPU)


def test_cuda_graphs_need_cuda_and_a_compiled_step_and_say_so():
    cuda = torch.device("cuda")
    assert resolve_cuda_graphs(True, cuda, True) == (True, "")
    assert resolve_cuda_graphs(False, CPU, False) == (False, "")
    assert resolve_cuda_graphs(True, CPU, True) == (
        False,
        "run.cuda_graphs has no effect: the device is cpu",
    )
    assert resolve_cuda_graphs(True, cuda, False)[1].endswith("the step is not compiled")
