"""What only a CUDA device can show; run with `-m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from algorithms.blocks.layers import set_precision
from harness import datasets
from harness.cuda_graphs import WARM_UP_CALLS, GraphedStep
from harness.datasets import DataSpec
from harness.registry import Registry
from harness.trainer import Trainer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
STEPS = 2 * (WARM_UP_CALLS + 3)  # both phases of a learner with two are recorded and replayed
LEARNERS = ["bc", "td3_bc", "iql", "diffusion_ql", "idql"]


def trainer_of(bandit, name, seeds, device=CUDA, compiled=True, graphs=False):
    recipe = Registry().get(name)
    stage = recipe.stages(recipe.config(batch_size=32, hidden_dim=32))[-1]
    dataset = datasets.load(bandit, DataSpec(), device)
    learner = stage.learner(stage.config, dataset.spec, seeds, {}).to(device)
    return Trainer(learner, dataset, seeds, device, compiled, graphs)


def close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name].cpu(), second[name].cpu(), **tolerance)


@pytest.mark.parametrize("name", LEARNERS)
def test_replayed_steps_are_the_compiled_steps_bit_for_bit(bandit, name):
    called, replayed = (trainer_of(bandit, name, [3, 5], graphs=on) for on in (False, True))
    metrics = [trainer.advance(STEPS).metrics for trainer in (called, replayed)]
    assert replayed.graphed.refused == ""
    assert len(replayed.graphed._graphs) == getattr(replayed.learner, "period", 1)
    assert metrics[0] == metrics[1]
    for index in range(2):
        close(called.seed_state(index), replayed.seed_state(index), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_state_loaded_between_replays_is_continued_from(bandit, name):
    whole = trainer_of(bandit, name, [3], graphs=True)
    whole.advance(STEPS)
    state = whole.seed_state(0)
    whole.advance(4)
    expected = whole.seed_state(0)
    whole.load_seed_states([state])
    whole.advance(4)
    close(whole.seed_state(0), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_gpu_trains_as_the_cpu_does(bandit, name):
    gpu = trainer_of(bandit, name, [3, 5], graphs=True)
    cpu = trainer_of(bandit, name, [3, 5], torch.device("cpu"), compiled=False)
    first, second = gpu.advance(STEPS), cpu.advance(STEPS)
    for metric, values in second.metrics.items():
        assert first.metrics[metric] == pytest.approx(values, rel=2e-3, abs=2e-4), metric


def test_a_step_that_reads_from_the_device_is_refused_and_still_done():
    total = torch.zeros(2, device=CUDA)

    def step(phase):
        total.add_(1.0)
        return ("loss",), (total * total.sum().item()).unsqueeze(0)

    graphed = GraphedStep(step)
    for count in range(1, WARM_UP_CALLS + 4):
        _, values = graphed(())
        torch.cuda.synchronize()
        assert total.tolist() == [count, count]
        assert values.tolist() == [[2.0 * count**2] * 2]
    assert graphed.refused


def test_tensorfloat_rounds_products_and_float32_does_not():
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512, device=CUDA)
    exact = a.double() @ b.double()
    errors = {}
    for precision in ("tf32", "float32"):
        set_precision(torch.nn.Module(), precision)
        errors[precision] = (a @ b - exact).abs().max().item()
    assert errors["float32"] < 1e-3 < errors["tf32"]
