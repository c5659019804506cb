import math

import pytest
import torch

from algorithms.blocks.entropy import MULTIPLIER_MAX, LogScalar, entropy_loss
from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Rng, Stream


def scalar(start: float) -> LogScalar:
    return LogScalar(Rng.at_step([0, 1], 0, Stream.TEST), start)


def test_a_learned_number_is_the_exponential_of_its_parameter_up_to_a_bound():
    assert scalar(0.5).value().tolist() == pytest.approx([math.exp(0.5)] * 2)
    assert scalar(200.0).value().tolist() == [MULTIPLIER_MAX] * 2


@pytest.mark.parametrize("start", [-200.0, 0.0, 200.0])
def test_the_temperature_comes_back_from_any_extreme(start):
    """The loss is linear in the logarithm: its gradient is minus (mean log pi + target entropy)."""
    log_pi = torch.tensor([1.0, -5.0])
    coef = scalar(start)
    grads, metrics = gradients(coef, lambda stand_in: entropy_loss(stand_in, log_pi, 2.0))
    assert grads["log"].flatten().tolist() == pytest.approx([-3.0, 3.0])
    torch.testing.assert_close(metrics["entropy_coef"], coef.value())
