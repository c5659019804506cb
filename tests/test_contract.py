"""The contract over every registered algorithm, and the contract against broken ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from algorithms import (
    bandit_policies,
    bc,
    consistency_distillation,
    cql,
    diffusion_bc,
    diffusion_ql,
    doser,
    edp,
    idql,
    iql,
    policy_guided,
    rebrac,
    td3_bc,
    vdd,
)
from algorithms.api import Pretrained, Recipe, Train
from algorithms.blocks.layers import MLP
from algorithms.blocks.optim import Adam, gradients
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import (
    CHECKS,
    ContractError,
    TinyDataset,
    cases,
    check_compiled,
    check_one_graph,
    check_policy,
    check_recipe,
)
from tests import guided

SMALL_BC = bc.Config(hidden_dim=16, batch_size=16)
SMALL_QL = diffusion_ql.Config(
    hidden_dim=16, batch_size=16, denoise_steps=3, num_candidates=4, clip_norm=1.0
)
SMALL_EDP = edp.Config(
    hidden_dim=16,
    batch_size=16,
    schedule="vp",
    denoise_steps=10,
    evaluations=5,
    num_candidates=4,
    clip_norm=1.0,
)
SMALL_IDQL = idql.Config(
    hidden_dim=32,
    batch_size=48,
    actor_batch_size=48,
    num_blocks=2,
    time_dim=64,
    cond_dim=32,
    denoise_steps=3,
    num_candidates=4,
)
SMALL_DOSER = doser.Config(
    hidden_dim=16,
    batch_size=16,
    diffusion_batch_size=16,
    dynamics_batch_size=16,
    num_candidates=3,
    sampler_steps=2,
)
CORL_IQL = {
    "value_in_use": "previous",
    "q_loss": "mean",
    "orthogonal_init": False,
    "normalize_obs": True,
    "deterministic": True,
    "dropout_rate": 0.1,
}
# Two samples of eight rows: the batch of 16 that is safe, see above.
SMALL_BANDIT = bandit_policies.Config(hidden_dim=16, batch_size=8, mmd_samples=2)
SMALL_DIFFUSION_BC = diffusion_bc.Config(hidden_dim=16, batch_size=16)
TEACHER = Pretrained("diffusion_bc", config={"hidden_dim": 16, "batch_size": 16, "act_steps": 2})
SMALL_VDD = vdd.Config(
    teacher=TEACHER,
    hidden_dim=16,
    gate_hidden_dim=16,
    batch_size=16,
    num_experts=4,
    gate_states=16,
)
CONFIGS = {
    **{
        f"bandit_policy_{policy}_{guidance}": (
            bandit_policies.recipe,
            replace(SMALL_BANDIT, policy=policy, guidance=guidance),
        )
        for policy in ("gaussian", "cvae", "mmd")
        for guidance in ("none", "q")
    },
    "bandit_policy_perturbed": (
        bandit_policies.recipe,
        replace(SMALL_BANDIT, policy="cvae", guidance="q", act_perturbed=True),
    ),
    "bc": (bc.recipe, SMALL_BC),
    "bc_gaussian": (bc.recipe, replace(SMALL_BC, head="gaussian", sample_actions=True)),
    "consistency_distillation": (
        consistency_distillation.recipe,
        consistency_distillation.Config(teacher=TEACHER, batch_size=16, num_levels=4),
    ),
    "diffusion_bc": (
        diffusion_bc.recipe,
        replace(SMALL_DIFFUSION_BC, act_steps=2, sampler="heun", spacing="karras"),
    ),
    "diffusion_bc_ddpm": (
        diffusion_bc.recipe,
        replace(SMALL_DIFFUSION_BC, form="ddpm", sampler="ancestral", act_steps=3),
    ),
    "diffusion_ql": (diffusion_ql.recipe, SMALL_QL),
    "edp": (edp.recipe, SMALL_EDP),
    "edp_ddpm100": (edp.recipe, replace(SMALL_EDP, sampler="ancestral")),
    "diffusion_ql_bc_only": (diffusion_ql.recipe, replace(SMALL_QL, bc_only=True)),
    "diffusion_ql_paper": (
        diffusion_ql.recipe,
        replace(
            SMALL_QL,
            q_normalizer="dataset",
            candidate_choice="none",
            lr_decay="cosine",
            max_q_backup=True,
        ),
    ),
    "doser": (doser.recipe, SMALL_DOSER),
    "doser_cvae": (doser.recipe, replace(SMALL_DOSER, treatment="uniform", detector="cvae")),
    "doser_paper": (
        doser.recipe,
        replace(
            SMALL_DOSER,
            candidates="sampled",
            ood_rows=8,
            backup="behaviour",
            id_value="target",
            reduction="sum",
            detector="stratified",
        ),
    ),
    "doser_release": (
        doser.recipe,
        replace(
            SMALL_DOSER,
            candidates="sampled",
            sampler="release",
            dynamics_members=2,
            dynamics_gate=True,
            state_levels=2,
            policy_every=3,
            treatment="no_compensation",
        ),
    ),
    "idql": (idql.recipe, SMALL_IDQL),
    "idql_dec2023": (
        idql.recipe,
        replace(
            SMALL_IDQL,
            actor_updates=1,
            activation="silu",
            weight_decay=1e-4,
            value_input_norm=True,
            critic_objective="exponential",
            candidate_choice="implicit",
            actor_objective="exp_adv",
        ),
    ),
    "cql": (cql.recipe, cql.Config(hidden_dim=16, batch_size=16, num_actions=3)),
    "cql_lagrange": (
        cql.recipe,
        cql.Config(
            hidden_dim=16,
            batch_size=16,
            num_actions=2,
            lagrange=True,
            max_backup=True,
            backup_entropy=True,
            orthogonal_init=False,
            normalize_obs=False,
        ),
    ),
    "iql": (iql.recipe, iql.Config(hidden_dim=16, batch_size=16)),
    "iql_corl": (iql.recipe, iql.Config(hidden_dim=16, batch_size=16, **CORL_IQL)),
    "rebrac": (rebrac.recipe, rebrac.Config(hidden_dim=16, batch_size=16)),
    "vdd": (
        vdd.recipe,
        replace(SMALL_VDD, initial_means="kmeans", act_noise=True, correct_covariance=True),
    ),
    "vdd_chain": (  # a teacher with a critic and a chain, demonstrations for the gate
        vdd.recipe,
        replace(
            SMALL_VDD,
            teacher=Pretrained(
                "diffusion_ql",
                config={"hidden_dim": 16, "batch_size": 16, "denoise_steps": 20},
            ),
            gate_data="demonstrations",
            covariance="diagonal",
            ddpm_score="unbiased",
            expert_choice="argmax",
        ),
    ),
    "vdd_em": (vdd.recipe, replace(SMALL_VDD, objective="em", initial_means="kmeans")),
    "vdd_imc": (vdd.recipe, replace(SMALL_VDD, objective="imc", covariance="diagonal")),
    "td3_bc": (td3_bc.recipe, td3_bc.Config(hidden_dim=16, batch_size=16)),
    "td3_bc_every_3rd": (
        td3_bc.recipe,
        td3_bc.Config(hidden_dim=16, batch_size=16, policy_every=3, normalize_obs=False),
    ),
}


GUIDED = {
    "guided": guided.SMALL,
    "guided_as_in_the_code": replace(
        guided.SMALL,
        agent="iql",
        guidance="additive",
        guidance_normalize=True,
        guidance_denoised=True,
        predict_from_unchurned=True,
    ),
    "guided_whole_gradient": replace(
        guided.SMALL, guidance_jacobian="network", final_row="next_obs", stride=None
    ),
    "unguided": replace(guided.SMALL, agent="iql", training_data="unguided"),
    "world_model": replace(guided.SMALL, training_data="world_model"),
    "real": replace(guided.SMALL, training_data="real"),
}


VARIANTS = {**CONFIGS, **{name: (policy_guided.recipe, config) for name, config in GUIDED.items()}}
NUMBERS = (*(check for check in CHECKS if check is not check_one_graph), check_policy)
# Tracing takes ten times as long as all other checks: one configuration of each algorithm.
TRACED = {recipe.name: name for name, (recipe, _) in reversed(VARIANTS.items())}
TRACED |= {recipe.name: name for name, (recipe, _) in VARIANTS.items() if name == recipe.name}
TRACED["bandit_policy"] = "bandit_policy_gaussian_q"


@pytest.mark.parametrize("name", VARIANTS)
def test_contract_holds(name):
    check_recipe(*VARIANTS[name], checks=NUMBERS)


@pytest.mark.parametrize(
    "name",
    [
        name if name in TRACED.values() else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_every_step_is_one_graph(name):
    check_recipe(*VARIANTS[name], checks=[check_one_graph])


def test_asymmetric_action_bounds_are_kept():
    dataset = TinyDataset()
    dataset.spec = replace(dataset.spec, action_low=(-1.0, 0.0), action_high=(2.0, 0.5))
    names = ("bc", "bc_gaussian", "cql", "diffusion_ql", "idql", "iql", "rebrac", "td3_bc")
    names += ("diffusion_bc_ddpm", "vdd_chain")
    for name in (*names, *(name for name in CONFIGS if name.startswith("bandit_policy"))):
        *_, last = cases(*CONFIGS[name], dataset)
        check_policy(last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bc", "diffusion_ql", "idql"])
def test_compiled_step_equals_eager_and_stack_equals_solo(name):
    for case in cases(*CONFIGS[name]):
        check_compiled(case)


# A checker that cannot fail proves nothing: each of these learners breaks one rule.


@dataclass(frozen=True)
class BrokenConfig:
    steps: int = 1
    flaw: str = ""


class Broken(nn.Module):
    def __init__(self, config, spec, seeds, inputs=None):
        super().__init__()
        self.config = config
        if config.flaw == "ignores seeds":
            seeds = [0] * len(seeds)
        rng = Rng.at_step(seeds, 0, Stream.INITIALISATION)
        self.actor = MLP(rng, (spec.obs_dim, 16, spec.action_dim))
        self.optim = Adam(self.actor, 1e-3)
        self.calls = 0
        self.offset = torch.zeros(len(seeds))
        if config.flaw == "constant in state":
            self.register_buffer("bound", torch.ones(()))
        if config.flaw == "requires grad":
            self.actor.layers[0].weight.requires_grad_(True)

    def sample(self, dataset, rng):
        return dataset.transitions(rng, 16)

    def update(self, batch, rng):
        flaw = self.config.flaw

        def loss(actor):
            error = (actor(batch.obs) - batch.action).square().mean(dim=(1, 2))
            if flaw == "mixes seeds":
                error = error * error.mean()
            if flaw == "unregistered state":
                error = error * (1.0 + self.offset)
            return error, {"loss": error if flaw != "metric of wrong shape" else error.mean()}

        grads, metrics = gradients(self.actor, loss)
        self.optim.step(self.actor, grads)
        if flaw == "unregistered state":
            self.offset = self.offset + 0.1
        if flaw == "host number":
            metrics["loss"] = metrics["loss"] * float(metrics["loss"].sum())
        if flaw == "global generator":
            metrics["loss"] = metrics["loss"] + torch.rand(())
        if flaw == "python counter":
            self.calls += 1
            metrics["loss"] = metrics["loss"] * self.calls
        return metrics

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=self.config.flaw != "lenient loading")

    def act(self, obs, rng):
        action = self.actor(obs).clamp(-1.0, 1.0)
        if self.config.flaw == "out of bounds":
            action = action + 3.0
        if self.config.flaw == "act mixes seeds":
            action = (action * action.abs().mean()).clamp(-1.0, 1.0)
        return action


FLAWS = {
    "ignores seeds": "initialise from the given seeds",
    "constant in state": "persistent=False",
    "requires grad": "requires grad",
    "mixes seeds": "must equal itself alone",
    "unregistered state": "registered",
    "metric of wrong shape": "expected floats of shape",
    "host number": "one graph|must equal itself alone",
    "global generator": "same metrics",
    "python counter": "traced|resumed",
    "lenient loading": "expected load_state_dict to raise",
    "out of bounds": "actions outside",
    "act mixes seeds": "must not depend on the stack",
}


def broken_recipe() -> Recipe:
    return Recipe("broken", 1, BrokenConfig, lambda c: (Train("policy", Broken, c, c.steps),))


def test_learner_without_flaws_passes():
    check_recipe(broken_recipe())


@pytest.mark.parametrize("flaw", FLAWS)
def test_broken_learner_is_caught(flaw):
    with pytest.raises(ContractError, match=FLAWS[flaw]):
        check_recipe(broken_recipe(), BrokenConfig(flaw=flaw))
