"""ReBRAC (Tarasov et al., NeurIPS 2023, arXiv:2305.09836).

TD3+BC revisited: deeper networks, layer norm in the critics, and a penalty on leaving the data in
the critics' target as well as in the actor's loss, each with its own weight.

    paper      here              where
    pi         actor             deterministic, tanh output scaled to the bounds
    Q          critic            two action-value networks; their min is used everywhere
    beta_1     bc_coef           (pi(s) - a)**2, summed over dimensions, in the actor's loss
    beta_2     critic_bc_coef    (a~' - a')**2, summed over dimensions, off the target's next value
    a~'        --                smoothed action of the target actor at s'
    a'         next_action       the action the data take at s'
    gamma      discount
    tau        tau               rate of all targets, in the steps that update the actor

Defaults are the official code's for gym. As there: the actor and all targets are updated in steps
1, 3, ... (counted from 1); the actor's target moves towards the actor before the step's own update,
the critics' target towards the critics after it; the norm follows the activation.
An episode's last transition has no a'. Where it terminates the target holds no next value; where it
was cut off (kept only by `truncated_last_step: keep`) the penalty is left out.
Paper and code differ in the AntMaze learning rates and two beta_2; hparams/ follow the code.
Deviations: bounds of the actions may differ by dimension; noise is in units of half their width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.api import Batch, Dataset, DatasetSpec, Metrics, Recipe, Rng, Train
from algorithms.blocks.bounds import ActionBounds
from algorithms.blocks.critics import polyak_update, squared_td_error, td_target
from algorithms.blocks.layers import MLP, LayerNorm, frozen_copy
from algorithms.blocks.normalizer import Normalizer
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng as CounterRng
from algorithms.blocks.rng import Stream
from algorithms.blocks.settings import check_positive

HIDDEN_BIAS = 0.1
ACTOR_OUTPUT, CRITIC_OUTPUT = 1e-3, 3e-3  # bounds of the last layers' uniform initialisation
NORM_EPS = 1e-6  # Flax's; PyTorch's is 1e-5


@dataclass(frozen=True)
class Config:
    """Defaults: official code, gym; the two coefficients differ by dataset, see hparams/."""

    steps: int = 1_000_000  # gradient steps; 1000 epochs x 1000
    batch_size: int = 1024  # gym; 256 elsewhere
    discount: float = 0.99  # gamma; 0.999 on AntMaze
    tau: float = 0.005  # rate of all targets, whenever the actor is updated
    lr: float = 1e-3  # actor; gym
    critic_lr: float = 1e-3  # both critics; gym
    hidden_dim: int = 256  # width of the 3 hidden layers of actor and critics
    bc_coef: float = 0.01  # beta_1; tuned by dataset, from 0.001 to 0.1
    critic_bc_coef: float = 0.01  # beta_2; tuned by dataset, from 0 to 0.5
    actor_layer_norm: bool = False  # official: only the critics have it
    critic_layer_norm: bool = True  # after the activation of each hidden layer
    policy_noise: float = 0.2  # std of the noise on the target's action, in half widths of bounds
    noise_clip: float = 0.5  # largest absolute value of that noise
    policy_every: int = 2  # steps between updates of the actor and of all targets
    normalize_q: bool = True  # divide q by its mean absolute value in the actor's loss
    normalize_obs: bool = False  # act on (s - mean) / (std + 1e-3), statistics of the dataset

    def __post_init__(self) -> None:
        check_positive(self, "policy_every")


class Network(nn.Module):
    """ReLU network whose layer norms, if any, follow the activations; the official initialisation.

    Hidden weights are uniform in +-1/sqrt(in), hidden biases constant, the last layer uniform in
    +-`output`. Maps [K, (E,) *rows, in] to [K, (E,) *rows, out].
    """

    def __init__(
        self,
        rng: Rng,
        sizes: Sequence[int],
        output: float,
        layer_norm: bool,
        ensemble: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = MLP(rng, sizes, ensemble=ensemble).layers
        layers: list[Any] = list(self.layers)
        for layer in layers[:-1]:
            layer.bias.fill_(HIDDEN_BIAS)
        for parameter in (layers[-1].weight, layers[-1].bias):  # uniform in +-1/sqrt(in) so far
            parameter.mul_(output * math.sqrt(sizes[-2]))
        self.norms = nn.ModuleList(
            LayerNorm(rng, width, ensemble, NORM_EPS) for width in sizes[1:-1] if layer_norm
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[:-1]):
            x = functional.relu(layer(x))
            if len(self.norms) > 0:
                x = self.norms[i](x)
        return self.layers[-1](x)


class ReBRAC(nn.Module):
    """Learner and policy; see the module's docstring."""

    def __init__(
        self,
        config: Config,
        spec: DatasetSpec,
        seeds: Sequence[int] | Tensor,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.period = config.policy_every
        rng = CounterRng.at_step(seeds, 0, Stream.INITIALISATION)
        hidden = (config.hidden_dim,) * 3
        self.bounds = ActionBounds(spec.action_low, spec.action_high)
        if config.normalize_obs:
            statistics = spec.statistics
            self.normalizer = Normalizer(rng.num_seeds, statistics.obs_mean, statistics.obs_std)
        sizes = (spec.obs_dim, *hidden, spec.action_dim)
        self.actor = Network(rng, sizes, ACTOR_OUTPUT, config.actor_layer_norm)
        self.actor_optim = Adam(self.actor, config.lr)
        self.target_actor = frozen_copy(self.actor)
        sizes = (spec.obs_dim + spec.action_dim, *hidden, 1)
        self.critic = Network(rng, sizes, CRITIC_OUTPUT, config.critic_layer_norm, ensemble=2)
        self.critic_optim = Adam(self.critic, config.critic_lr)
        self.target_critic = frozen_copy(self.critic)

    def sample(self, dataset: Dataset, rng: Rng) -> Batch:
        return dataset.transitions(rng, self.config.batch_size, next_action=True)

    def update(self, batch: Batch, rng: Rng, phase: int) -> Metrics:
        """The critics; in the period's first step also all targets and the actor."""
        obs, next_obs = self.normalize(batch.obs), self.normalize(batch.next_obs)
        metrics = self.update_critic(obs, batch, self.q_target(next_obs, batch, rng))
        if phase == 0:
            polyak_update(self.target_actor, self.actor, self.config.tau)  # the old actor
            metrics |= self.update_actor(obs, batch.action)
            polyak_update(self.target_critic, self.critic, self.config.tau)
        return metrics

    def q_target(self, next_obs: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """r + gamma (min Q'(s', a~') - beta_2 |a~' - a'|**2): [K, B]."""
        config = self.config
        if batch.next_action is None:
            raise ValueError("the batch has no next actions; ask `transitions` for `next_action`")
        smoothed = self.bounds.smooth(
            self.policy(self.target_actor, next_obs), rng, config.policy_noise, config.noise_clip
        )
        penalty = (smoothed - batch.next_action).square().sum(dim=-1) * (1.0 - batch.truncated)
        next_v = self.q(self.target_critic, next_obs, smoothed).amin(dim=1)
        next_v = next_v - config.critic_bc_coef * penalty
        return td_target(batch.reward, batch.terminated, next_v, config.discount)

    def update_critic(self, obs: Tensor, batch: Batch, target: Tensor) -> Metrics:
        def loss(critic: Any) -> tuple[Tensor, Metrics]:
            q = self.q(critic, obs, batch.action)  # [K, 2, B]
            per_seed = squared_td_error(q, target)
            return per_seed, {"critic_loss": per_seed, "q": q.mean(dim=(1, 2))}

        grads, metrics = gradients(self.critic, loss)
        metrics["critic_grad_norm"] = self.critic_optim.step(self.critic, grads)
        return metrics

    def update_actor(self, obs: Tensor, action: Tensor) -> Metrics:
        grads, metrics = gradients(self.actor, lambda actor: self.actor_loss(actor, obs, action))
        metrics["actor_grad_norm"] = self.actor_optim.step(self.actor, grads)
        return metrics

    def actor_loss(self, actor: Any, obs: Tensor, action: Tensor) -> tuple[Tensor, Metrics]:
        """beta_1 |pi(s) - a|**2 - lambda min Q(s, pi(s)), mean over the batch: [K].

        lambda = 1 / mean |min Q|, detached.
        """
        chosen = self.policy(actor, obs)  # [K, B, A]
        q = self.q(self.critic, obs, chosen).amin(dim=1)  # [K, B]
        q_mean = q.mean(dim=-1)
        if self.config.normalize_q:
            q_mean = q_mean / q.abs().mean(dim=-1).detach()
        bc_loss = (chosen - action).square().sum(dim=-1).mean(dim=-1)
        per_seed = self.config.bc_coef * bc_loss - q_mean
        return per_seed, {"actor_loss": per_seed, "bc_loss": bc_loss}

    @staticmethod
    def q(critic: Any, obs: Tensor, action: Tensor) -> Tensor:
        """[K, B, O] and [K, B, A] -> [K, 2, B]."""
        return critic(torch.cat((obs, action), dim=-1).unsqueeze(1)).squeeze(-1)

    def policy(self, actor: Any, obs: Tensor) -> Tensor:
        """Of normalised observations: [K, *rows, O] -> [K, *rows, A]."""
        return self.bounds.stretch(torch.tanh(actor(obs)))

    def normalize(self, obs: Tensor) -> Tensor:
        return self.normalizer(obs) if self.config.normalize_obs else obs

    def act(self, obs: Tensor, rng: Rng) -> Tensor:
        """[K, N, O] -> [K, N, A]."""
        return self.policy(self.actor, self.normalize(obs))


def stages(config: Config) -> tuple[Train, ...]:
    return (Train("policy", ReBRAC, config, config.steps),)


recipe = Recipe(
    name="rebrac",
    revision=1,
    config=Config,
    stages=stages,
    hparams=Path(__file__).parent / "hparams" / "rebrac.yaml",
    summary="TD3+BC with penalties in actor and critics, deeper networks and layer norm",
    paper="arXiv:2305.09836",
)
