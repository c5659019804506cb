"""Action values, state values and the targets they are regressed on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from algorithms.api import Rng
from algorithms.blocks.layers import MLP, LayerNorm
from algorithms.blocks.optim import per_seed


class QEnsemble(nn.Module):
    """E independent q networks per seed.

    Maps obs [K, *rows, O] and action [K, *rows, A] to [K, E, *rows].

    Args:
        hidden_dims: widths of the hidden layers.
        orthogonal_gain, output_gain: as in `MLP`.
    """

    def __init__(
        self,
        rng: Rng,
        obs_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int],
        activation: str = "relu",
        num_critics: int = 2,
        layer_norm: bool = False,
        orthogonal_gain: float | None = None,
        output_gain: float | None = None,
    ) -> None:
        super().__init__()
        self.net = MLP(
            rng,
            (obs_dim + action_dim, *hidden_dims, 1),
            activation,
            ensemble=num_critics,
            layer_norm=layer_norm,
            orthogonal_gain=orthogonal_gain,
            output_gain=output_gain,
        )

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((obs, action), dim=-1).unsqueeze(1)).squeeze(-1)

    def member(self, index: int, obs: Tensor, action: Tensor) -> Tensor:
        """One network's values, [K, *rows], without evaluating the others."""
        own = {name: p[:, index : index + 1] for name, p in self.net.named_parameters()}
        x = torch.cat((obs, action), dim=-1).unsqueeze(1)
        return functional_call(self.net, own, (x,)).squeeze(-1).squeeze(1)


class Value(nn.Module):
    """One state-value network per seed: obs [K, *rows, O] -> [K, *rows].

    Args:
        layer_norm: in the hidden layers.
        input_norm: layer norm of the observation, eps 1e-6 (IDQL's later code).
    """

    def __init__(
        self,
        rng: Rng,
        obs_dim: int,
        hidden_dims: Sequence[int],
        activation: str = "relu",
        layer_norm: bool = False,
        input_norm: bool = False,
        orthogonal_gain: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(rng, obs_dim, eps=1e-6) if input_norm else nn.Identity()
        sizes = (obs_dim, *hidden_dims, 1)
        self.net = MLP(
            rng, sizes, activation, layer_norm=layer_norm, orthogonal_gain=orthogonal_gain
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(self.norm(obs)).squeeze(-1)


def td_target(reward: Tensor, terminated: Tensor, next_v: Tensor, discount: float) -> Tensor:
    """reward + discount * (1 - terminated) * next_v; a truncated step still bootstraps."""
    return reward + discount * (1.0 - terminated) * next_v


def squared_td_error(q: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch, summed over the E critics: [K, E, B], [K, B] -> [K]."""
    return (q - target.unsqueeze(1)).square().mean(dim=-1).sum(dim=-1)


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Element-wise |expectile - 1[difference < 0]| * difference**2 (Kostrikov et al., 2022, Eq. 5).

    0.5 is half the squared error; above 0.5 positive differences weigh more.
    """
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    return weight * difference.square()


def quantile_loss(difference: Tensor, quantile: float) -> Tensor:
    """Element-wise |quantile - 1[difference < 0]| * |difference| (an option of IDQL)."""
    return torch.where(difference < 0, quantile - 1.0, quantile) * difference


def exponential_loss(difference: Tensor, scale: float, cap: float = 6.0) -> Tensor:
    """Element-wise (E - 1) * difference, E = min(exp(scale * difference), cap) held constant.

    Its gradient is that of exp(scale u) - scale u, over `scale`, with the exponential capped
    (IDQL's code). The value itself means nothing.
    """
    excess = torch.expm1((scale * difference).clamp(max=math.log(cap)))
    return excess.detach() * difference


def implicit_weights(
    difference: Tensor, objective: str, parameter: float, cap: float = 6.0, floor: float = 1e-6
) -> Tensor:
    """Weights |f'(u)| / |u| of the policy a value loss f implies, u = q - v: any shape to the same.

    V minimises E[f(Q - V)] over the behaviour where it is the mean of Q under behaviour times
    these weights (IDQL's implied actor); up to a constant factor, not normalised.

    Args:
        objective: expectile | quantile | exponential; f is the loss of that name above.
        parameter: its expectile, quantile or scale.
        cap: of `exponential_loss`.
        floor: |u| is at least this, so that a candidate at V has a finite weight.
    Raises:
        ValueError: for an unknown objective.
    """
    if objective == "expectile":
        return torch.where(difference < 0, 1.0 - parameter, parameter)
    size = difference.abs().clamp(min=floor)
    if objective == "quantile":
        return torch.where(difference < 0, 1.0 - parameter, parameter) / size
    if objective == "exponential":  # the sign is kept, so that the limit at u = 0 is `parameter`
        moved = torch.where(difference < 0, -size, size)
        return torch.expm1((parameter * moved).clamp(max=math.log(cap))).abs() / size
    raise ValueError(
        f"objective is {objective!r}; expected one of expectile, quantile, exponential"
    )


def max_q_backup(q: Tensor) -> Tensor:
    """Value of the best of C candidates: max per critic first, then min over critics.

    CQL's option of that name, as Diffusion-QL uses it: [K, E, C, B] -> [K, B].
    """
    return q.amax(dim=2).amin(dim=1)


def normalized_q_loss(q: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    """Minus the mean q of one of two critics over its scale, which is held constant: [K].

    Args:
        q: at the policy's actions, [K, 2, B].
        scale: of each critic, [K, 2]. Diffusion-QL's code divides by the *other* critic's mean |q|,
            `q.abs().mean(-1).flip(1)`.
        first: whether the first critic is the one, bool [K].
    """
    chosen = torch.where(first, q[:, 0].mean(dim=-1), q[:, 1].mean(dim=-1))
    return -chosen / torch.where(first, scale[:, 0], scale[:, 1]).detach()


def polyak_update(
    target: nn.Module, online: nn.Module, tau: float, where: Tensor | None = None
) -> None:
    """Moves `target` towards `online` in place: target += tau * (online - target).

    Also the exponential moving average of a policy, with tau = 1 - ema_decay.

    Args:
        tau: weight of the online parameters, in [0, 1]; 1 copies.
        where: bool [K]; seeds that are False keep their target bit for bit.
    Raises:
        ValueError: if the two modules have different parameters.
    """
    targets, onlines = dict(target.named_parameters()), dict(online.named_parameters())
    if targets.keys() != onlines.keys():
        names = ", ".join(sorted(targets.keys() ^ onlines.keys()))
        raise ValueError(f"target and online have different parameters, in only one: {names}")
    for name, value in targets.items():
        moved = value + tau * (onlines[name] - value)
        value.copy_(moved if where is None else torch.where(per_seed(where, value), moved, value))
