"""Values and targets against hand-computed numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.blocks.critics import (
    QEnsemble,
    Value,
    expectile_loss,
    max_q_backup,
    polyak_update,
    squared_td_error,
    td_target,
)
from algorithms.blocks.layers import MLP, frozen_copy
from algorithms.blocks.rng import Rng, Stream


def init(seeds=(0, 1, 2)):
    return Rng.at_step(seeds, 0, Stream.INITIALISATION)


def test_q_members_are_independent_networks_of_obs_and_action():
    critic = QEnsemble(init(), 4, 2, (8, 8), "mish")
    rng = Rng.at_step((0, 1, 2), 0, Stream.TEST)
    obs, action = rng.normal(5, 4), rng.normal(5, 2)
    q = critic(obs, action)
    assert q.shape == (3, 2, 5)
    for k, e in ((0, 0), (2, 1)):
        x = torch.cat((obs[k], action[k]), dim=-1)
        for i, layer in enumerate(critic.net.layers):
            x = x @ layer.weight[k, e] + layer.bias[k, e]
            x = torch.nn.functional.mish(x) if i < 2 else x
        torch.testing.assert_close(q[k, e], x[:, 0])


def test_value_has_one_number_per_observation():
    assert Value(init(), 4, (8,))(torch.zeros(3, 5, 4)).shape == (3, 5)


def test_terminated_step_does_not_bootstrap_and_truncated_step_does():
    reward, next_v = torch.tensor([[1.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    terminated = torch.tensor([[0.0, 1.0]])  # the first may be truncated: it does not matter
    torch.testing.assert_close(
        td_target(reward, terminated, next_v, 0.9), torch.tensor([[10.0, 1.0]])
    )


def test_squared_td_error_sums_over_critics_and_averages_over_the_batch():
    q = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    assert squared_td_error(q, torch.zeros(1, 2)).tolist() == [5.0]


@given(st.floats(-10, 10), st.floats(0.01, 0.99))
def test_expectile_loss_weighs_the_two_sides(difference, expectile):
    weight = expectile if difference >= 0 else 1 - expectile
    loss = expectile_loss(torch.tensor(difference, dtype=torch.float64), expectile)
    assert loss.item() == pytest.approx(weight * difference**2)


def test_max_q_backup_takes_the_max_of_each_critic_before_the_min():
    q = torch.tensor([[[[1.0], [5.0]], [[4.0], [2.0]]]])  # [K=1, E=2, C=2, B=1]
    assert max_q_backup(q).item() == 4.0  # min(max(1, 5), max(4, 2)); the other order gives 2


def test_polyak_update_moves_by_tau_and_only_where_told():
    online = MLP(init(), (3, 4, 1))
    target = frozen_copy(online)
    for parameter in online.parameters():
        parameter.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    polyak_update(target, online, 0.25, where=torch.tensor([True, False, True]))
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new[[0, 2]], old[[0, 2]] + 0.25)
        assert torch.equal(new[1], old[1])
    polyak_update(target, online, 1.0)
    for a, b in zip(online.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_polyak_update_refuses_different_networks():
    with pytest.raises(ValueError, match=r"only one: layers\.1"):
        polyak_update(MLP(init(), (3, 4, 1)), MLP(init(), (3, 1)), 0.5)
