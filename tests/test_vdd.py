"""Variational diffusion distillation: the surrogate, its fixed points, the gate, one-pass acting.

Teachers here are exact: their scores are written down, so that what a student must become is known.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from algorithms import diffusion_bc, vdd
from algorithms.api import Pretrained, StageInput
from algorithms.blocks.mixtures import Mixture
from algorithms.blocks.optim import gradients
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import TinyDataset
from tests.bandit import train

SEEDS = (0, 1)
TEACHER = Pretrained("diffusion_bc", config={"hidden_dim": 16, "act_steps": 2})
SMALL = {
    "teacher": TEACHER,
    "hidden_dim": 16,
    "gate_hidden_dim": 16,
    "batch_size": 16,
    "num_samples": 16,
    "lr": 1e-2,
    "initial_std": 0.5,
}
WEIGHTS = torch.tensor([0.6, 0.3, 0.1])
MEANS = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
COVARIANCES = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.2]], [[0.2, -0.05], [-0.05, 0.3]]]
)


class Exact(nn.Module):
    """The score of a density, written down; stands where the teacher's would be."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, action, obs, uniform):
        return self.score(action, obs, uniform)


def dataset_of(constant: bool = True) -> TinyDataset:
    dataset = TinyDataset(num_episodes=20)
    if constant:
        dataset.obs = torch.zeros_like(dataset.obs)
    return dataset


def student(score=None, dataset=None, samples=None, seeds=SEEDS, **changes) -> vdd.VDD:
    """A student; `samples` are actions [N, A] of the teacher at the state 0."""
    config = vdd.Config(**{**SMALL, **changes})
    dataset = dataset or dataset_of()
    count = len(seeds)
    if samples is None:
        samples = torch.zeros(8, 2)
    given = {
        "obs": torch.zeros(count, len(samples), dataset.spec.obs_dim),
        "action": samples.expand(count, -1, -1).unsqueeze(2),
    }
    inputs = {"samples": StageInput(None, given)}
    if config.objective == "vdd":
        stage = diffusion_bc.recipe.stages(config.teacher.config_of(diffusion_bc.recipe))[-1]
        policy = stage.learner(replace(stage.config), dataset.spec, seeds)
        inputs["policy"] = StageInput(stage.config, policy.state_dict())
    learner = vdd.VDD(config, dataset.spec, seeds, inputs)
    if score is not None:
        learner.score = Exact(score)
    return learner


def target() -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(MEANS, COVARIANCES))


def score_of(density, scale: float = 1.0):
    """Its gradient, by autograd."""

    def score(action, obs, uniform):
        with torch.enable_grad():
            at = action.detach().requires_grad_()
            return torch.autograd.grad(density.log_prob(at).sum(), at)[0]

    return score


def gaussian_mixture_score(weights, means, covariances):
    """The score of a mixture of Gaussians, written out: usable inside `torch.func`."""
    precision = torch.linalg.inv(covariances)
    constant = weights.log() - 0.5 * torch.logdet(covariances)

    def score(action, obs, uniform):
        offset = action.unsqueeze(-2) - means  # [..., C, A]
        pull = (precision @ offset.unsqueeze(-1)).squeeze(-1)
        share = torch.softmax(constant - 0.5 * (offset * pull).sum(dim=-1), dim=-1)
        return -(share.unsqueeze(-1) * pull).sum(dim=-2)

    return score


def at_zero(learner: vdd.VDD) -> Mixture:
    with torch.no_grad():
        return learner.mixture(torch.zeros(len(learner.experts.mean.layers[0].weight), 1, 3))


# -------------------------------------------------------------------------------- the objective


def test_the_score_of_the_tests_is_right():
    x = Rng.at_step((0,), 0, Stream.TEST).normal(50, 2)[0]
    found = gaussian_mixture_score(WEIGHTS, MEANS, COVARIANCES)(x, None, None)
    torch.testing.assert_close(found, score_of(target())(x, None, None))


def test_the_surrogate_has_the_gradient_of_the_reverse_kl():
    """Reference: the exact gradient of KL(q || p) on a grid."""
    means, covariances = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), COVARIANCES[:2]
    weights = torch.tensor([0.7, 0.3])
    density = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    learner = student(
        gaussian_mixture_score(weights, means, covariances),
        num_experts=2,
        num_samples=2000,
        seeds=(0,),
        initial_bound=0.7,
    )
    obs = torch.zeros(1, 16, 3)
    rng = Rng.at_step((0,), 0, Stream.TEST)
    batch = dataset_of().transitions(rng, 16)
    with torch.no_grad():
        found, _ = gradients(
            learner.experts, lambda experts: learner.expert_loss(experts, obs, batch, rng)
        )
    axis = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(axis, axis)
    log_p = density.log_prob(grid)

    def divergence(experts):
        log_q = learner.mixture_of(experts, obs[:, :1]).log_prob(grid[None, None])[:, 0]
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1) * (axis[1] - axis[0]) ** 2, {}

    exact, _ = gradients(learner.experts, divergence)
    for name in ("mean.layers.1.bias", "scale.layers.1.bias"):
        assert exact[name].abs().max() > 0.05
        # The surrogate is a mean over experts, the divergence a sum.
        torch.testing.assert_close(2 * found[name], exact[name], atol=2e-2, rtol=0)


def test_without_the_responsibilities_the_gradient_is_another():
    """What repels experts: two on one mode are pushed apart, and only by log qt."""
    learner = student(
        gaussian_mixture_score(torch.ones(1), torch.zeros(1, 2), torch.eye(2).unsqueeze(0)),
        num_experts=2,
        num_samples=500,
        initial_bound=0.3,
    )
    mixture = at_zero(learner)
    apart = mixture.mean[:, 0, 1] - mixture.mean[:, 0, 0]  # [K, A]
    noise = Rng.at_step(SEEDS, 0, Stream.TEST).normal(1, 500, 2, 2)
    action = mixture.reparameterised(noise).requires_grad_()
    log_qt = mixture.log_responsibility(action.flatten(2, 3)).unflatten(2, (500, 2))
    own = torch.diagonal(log_qt, dim1=-2, dim2=-1)
    push = torch.autograd.grad(own.sum(), action)[0].mean(dim=2)[:, 0]  # [K, C, A]
    assert ((push[:, 1] * apart).sum(dim=-1) > 0).all()
    assert ((push[:, 0] * apart).sum(dim=-1) < 0).all()


def test_the_bound_is_the_divergence_at_the_posterior_and_above_it_elsewhere():
    mixture = at_zero(student(num_experts=3, initial_bound=1.0, seeds=(0,)))
    count = 20_000
    rng = Rng.at_step((0,), 0, Stream.TEST)
    action = mixture.reparameterised(rng.normal(1, count, 3, 2))  # [1, 1, S, C, A]
    log_p = MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(action)
    points = action.flatten(2, 3)
    log_expert = mixture.expert_log_prob(points).unflatten(2, (count, 3))
    log_expert = torch.diagonal(log_expert, dim1=-2, dim2=-1)

    def bound(log_qt):
        inside = (log_expert - log_p - log_qt).mean(dim=2) + mixture.log_weight
        return (mixture.log_weight.exp() * inside).sum().item()

    posterior = mixture.log_responsibility(points).unflatten(2, (count, 3))
    tight = bound(torch.diagonal(posterior, dim1=-2, dim2=-1))
    axis = torch.linspace(-8, 8, 321)
    grid = torch.cartesian_prod(axis, axis)[None, None]
    log_q = mixture.log_prob(grid)
    exact = (
        log_q.exp() * (log_q - MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(grid))
    ).sum().item() * (axis[1] - axis[0]).item() ** 2
    assert tight == pytest.approx(exact, abs=0.01)
    uniform = torch.full_like(log_expert, -math.log(3))
    assert bound(uniform) > exact + 0.05


# ---------------------------------------------------------------------------------- fixed points


def test_one_expert_becomes_the_gaussian_teacher_blurred_by_the_scores_noise():
    """V^-1 = E[(S + sigma^2)^-1], sigma ~ U[.2, .5]; corrected, S itself."""
    covariance = COVARIANCES[0]
    low, high = 0.2, 0.5

    def score(action, obs, uniform):
        sigma = low + (high - low) * uniform
        blurred = covariance + sigma.square()[..., None, None] * torch.eye(2)
        mean = torch.stack((obs[..., 0], obs[..., 1] - obs[..., 2]), dim=-1)[:, :, None, None]
        return -torch.linalg.solve(blurred, (action - mean).unsqueeze(-1)).squeeze(-1)

    dataset = dataset_of(constant=False)
    learner = student(
        score,
        dataset,
        num_experts=1,
        gate_updates=0,
        batch_size=64,
        expert_updates=1,
        steps=300,
        correct_covariance=True,
        sigma_low=low,
        sigma_high=high,
    )
    sigmas = learner.score.sigmas = torch.linspace(low, high, 64)
    train(learner, dataset, SEEDS, 300)
    obs = dataset.obs[:40].expand(2, -1, -1)
    with torch.no_grad():
        mixture = learner.mixture(obs)
        corrected = learner.corrected(mixture)
    mean = torch.stack((obs[..., 0], obs[..., 1] - obs[..., 2]), dim=-1)
    assert (mixture.mean[:, :, 0] - mean).abs().mean() < 0.05
    closed = torch.linalg.inv(
        torch.stack([torch.linalg.inv(covariance + s**2 * torch.eye(2)) for s in sigmas]).mean(0)
    )
    for found, expected in ((mixture, closed), (corrected, covariance)):
        fitted = (found.scale @ found.scale.mT)[:, :, 0].mean(dim=1)
        torch.testing.assert_close(fitted, expected.expand(2, -1, -1), atol=0.03, rtol=0)


@pytest.mark.slow
def test_three_modes_are_recovered_from_a_start_on_each():
    torch.manual_seed(0)
    samples = target().sample((4000,))
    learner = student(
        gaussian_mixture_score(WEIGHTS, MEANS, COVARIANCES),
        samples=samples,
        num_experts=3,
        initial_means="kmeans",
        batch_size=32,
        expert_updates=1,
        steps=500,
    )
    assert learner.experts.mean.layers[-1].bias.abs().max() > 2  # k-means++ is out there
    start = at_zero(learner).mean[:, 0]
    assert ((start.unsqueeze(2) - MEANS).norm(dim=-1).amin(dim=1) < 1.5).all(), "one in each"
    train(learner, dataset_of(), SEEDS, 500)
    mixture = at_zero(learner)
    for k in range(len(SEEDS)):
        expert = (mixture.mean[k, 0].unsqueeze(0) - MEANS.unsqueeze(1)).norm(dim=-1).argmin(dim=1)
        assert sorted(expert.tolist()) == [0, 1, 2]
        torch.testing.assert_close(mixture.mean[k, 0, expert], MEANS, atol=0.02, rtol=0)
        scale = mixture.scale[k, 0, expert]
        torch.testing.assert_close(scale @ scale.mT, COVARIANCES, atol=0.02, rtol=0)
        torch.testing.assert_close(
            mixture.log_weight[k, 0, expert].exp(), WEIGHTS, atol=0.03, rtol=0
        )


def test_from_a_narrow_start_modes_are_lost():
    """Reverse KL seeks modes: this documents it, so that nobody asserts coverage from here."""
    learner = student(
        gaussian_mixture_score(WEIGHTS, MEANS, COVARIANCES),
        samples=MEANS,
        num_experts=3,
        gate_updates=0,
        expert_updates=1,
        steps=100,
    )
    train(learner, dataset_of(), SEEDS, 100)
    gaps = (at_zero(learner).mean[:, 0].unsqueeze(2) - MEANS).norm(dim=-1).amin(dim=1)  # [K, 3]
    assert (gaps.amax(dim=1) > 1.0).any()


def test_the_gate_alone_finds_the_weights():
    torch.manual_seed(0)
    learner = student(samples=target().sample((4000,)), num_experts=3, steps=200, batch_size=256)
    learner.experts.spread(MEANS.expand(2, -1, -1))
    for step in range(200):
        rng = Rng.at_step(SEEDS, step, Stream.TRAIN)
        batch = dataset_of().transitions(rng, 256)
        with torch.no_grad():
            pairs = learner.gate_pairs(torch.zeros(2, 256, 3), batch, rng)
            learner.update_gate(*pairs, torch.full((2,), 1.0 - step / 200))
    found = at_zero(learner).log_weight[:, 0].exp()
    torch.testing.assert_close(found, WEIGHTS.expand(2, -1), atol=0.02, rtol=0)


# ------------------------------------------------------------------------------ em and imc on data


def clusters() -> TinyDataset:
    """Actions of three clusters, whatever the state."""
    dataset = dataset_of()
    torch.manual_seed(0)
    dataset.action = (target().sample((dataset.spec.num_steps,)) / 5.0).clamp(-1, 1)
    return dataset


@pytest.mark.parametrize("objective", ["em", "imc"])
def test_em_and_imc_put_experts_on_the_clusters_of_the_data(objective):
    dataset = clusters()
    learner = student(
        dataset=dataset,
        samples=dataset.action,
        objective=objective,
        num_experts=3,
        initial_means="kmeans",
        initial_std=0.1,
        batch_size=64,
        expert_updates=1,
        steps=150,
    )
    train(learner, dataset, SEEDS, 150)
    mixture = at_zero(learner)
    gaps = (mixture.mean[:, 0].unsqueeze(2) - MEANS / 5.0).norm(dim=-1)  # [K, expert, cluster]
    assert gaps.amin(dim=2).max() < 0.08, "every expert is on a cluster"
    if objective == "em":
        assert gaps.amin(dim=1).max() < 0.08, "every cluster has an expert"
        weight = mixture.log_weight[:, 0].exp().sort(dim=-1, descending=True).values
        torch.testing.assert_close(weight, WEIGHTS.expand(2, -1), atol=0.06, rtol=0)
    else:
        std = torch.full_like(mixture.std, 0.1)
        torch.testing.assert_close(mixture.std, std, atol=0.01, rtol=0)  # not trained


# -------------------------------------------------------------------------------------- acting


def act(learner, count: int = 2000):
    rng = Rng.at_step(SEEDS, 0, Stream.EVALUATION)
    with torch.no_grad():
        return learner.act(torch.zeros(2, count, 3), rng)


def test_acting_is_one_pass_and_gives_means_as_often_as_the_gate_says():
    learner = student(num_experts=4, seeds=SEEDS, initial_bound=0.8)
    calls = []
    parts = (learner.experts.backbone, learner.experts.mean, learner.experts.scale, learner.gate)
    for part in parts:
        part.register_forward_hook(lambda module, given, out: calls.append(module))

    def refuse(*_):
        raise AssertionError("the teacher was asked while acting")

    learner.score = Exact(refuse)
    action = act(learner)
    assert calls == [learner.experts.backbone, learner.experts.mean, learner.gate]
    mixture = at_zero(learner)
    distance = (action.unsqueeze(2) - mixture.mean).norm(dim=-1)  # [K, N, C]
    assert distance.amin(dim=-1).max() < 1e-5
    share = torch.nn.functional.one_hot(distance.argmin(dim=-1), 4).float().mean(dim=1)
    torch.testing.assert_close(share, mixture.log_weight[:, 0].exp(), atol=0.04, rtol=0)


def test_the_most_probable_expert_acts_if_asked():
    learner = student(num_experts=4, expert_choice="argmax")
    mixture = at_zero(learner)
    best = mixture.mean_of(mixture.log_weight.argmax(dim=-1))
    torch.testing.assert_close(act(learner, 5), best.expand(-1, 5, -1))


def test_draws_have_the_density_that_is_reported():
    """E_q[log q] over draws is minus the entropy by quadrature; bounds are not [-1, 1]."""
    dataset = dataset_of()
    dataset.spec = replace(dataset.spec, action_low=(-9.0, -4.0), action_high=(3.0, 8.0))
    learner = student(
        dataset=dataset, num_experts=2, act_noise=True, initial_std=0.2, initial_bound=0.3
    )
    count = 4000
    obs = torch.zeros(2, count, 3)
    with torch.no_grad():
        drawn = learner.act_unclamped(obs, Rng.at_step(SEEDS, 0, Stream.EVALUATION))
        found = learner.log_density(obs, drawn).mean(dim=1)
        x, y = torch.linspace(-15, 9, 241), torch.linspace(-10, 14, 241)
        grid = torch.cartesian_prod(x, y).expand(2, -1, -1)
        log_q = learner.log_density(torch.zeros(2, 1, 3).expand(-1, grid.shape[1], -1), grid)
    area = (x[1] - x[0]) * (y[1] - y[0])
    torch.testing.assert_close(log_q.exp().sum(dim=1) * area, torch.ones(2), atol=1e-3, rtol=0)
    negative_entropy = (log_q.exp() * log_q).sum(dim=1) * area
    torch.testing.assert_close(found, negative_entropy, atol=0.05, rtol=0)


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": Pretrained("diffusion_ql")}, r"5 levels is too coarse.* 0\.49.*denoise_steps"),
        ({"teacher": Pretrained("idql")}, "too coarse"),
        ({"teacher": Pretrained("bc")}, "expected a diffusion policy: diffusion_bc, diffusion_ql"),
        ({"sigma_low": 0.001}, r"trained on noise from 0\.005 to 1\.0"),
        ({"sigma_high": 2.0}, "move one of the ranges"),
        ({"sigma_low": 0.5, "sigma_high": 0.2}, "sigma_low <= sigma_high"),
        ({"objective": "kl"}, "expected one of vdd, em, imc"),
        ({"objective": "em", "correct_covariance": True}, "objective em and imc use none"),
        ({"teacher": Pretrained("diffusion_bc", revision=99)}, "revision 99"),
        (
            {
                "teacher": Pretrained("diffusion_ql", config={"denoise_steps": 50}),
                "correct_covariance": True,
            },
            "needs ddpm_score: unbiased",
        ),
        (
            {
                "teacher": Pretrained("diffusion_ql", config={"denoise_steps": 50}),
                "sigma_low": 0.07,
                "sigma_high": 0.071,
            },
            r"no noise level between .* the nearest are 0\.0632 and 0\.11",
        ),
        ({"num_experts": 0}, "at least 1"),
        ({"min_std": 1.0}, "min_std < initial_std"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        vdd.Config(**changes)
