"""First losses of a tiny fixed trial per algorithm and revision.

A change here is a change of numbers: bump the recipe's `revision`, run
`python tests/test_golden.py [name ...]`, and explain in the commit.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
from algorithms.api import Pretrained
from algorithms.blocks.rng import Rng, Stream
from algorithms.testing import cases
from tests import guided

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
SMALL = diffusion_ql.Config(hidden_dim=32, batch_size=32, clip_norm=1.0, ema_start=10)
SMALL_IDQL = idql.Config(
    hidden_dim=32, batch_size=32, actor_batch_size=32, num_candidates=8, steps=STEPS
)
CORL_IQL = {"value_in_use": "previous", "q_loss": "mean", "normalize_obs": True}
LAGRANGE = {"lagrange": True, "target_gap": 0.8, "max_backup": True, "critic_layers": 5}
SMALL_BANDIT = bandit_policies.Config(hidden_dim=32, batch_size=32)
SMALL_DIFFUSION_BC = diffusion_bc.Config(hidden_dim=32, batch_size=32)
TEACHER = Pretrained("diffusion_bc", config={"hidden_dim": 32, "batch_size": 32})
SMALL_VDD = vdd.Config(
    teacher=TEACHER, hidden_dim=32, batch_size=32, num_experts=4, gate_states=32, steps=STEPS
)
SMALL_DOSER = doser.Config(
    hidden_dim=32,
    batch_size=32,
    diffusion_batch_size=32,
    dynamics_batch_size=32,
    percentile=50.0,
    num_candidates=3,
    sampler_steps=2,
)
TRIALS = {
    **{
        f"bandit_policy_{policy}_{guidance}": (
            bandit_policies.recipe,
            replace(SMALL_BANDIT, policy=policy, guidance=guidance),
        )
        for policy, guidance in (("cvae", "q"), ("gaussian", "q"), ("mmd", "none"), ("mmd", "q"))
    },
    "bc": (bc.recipe, bc.Config(hidden_dim=32, batch_size=32)),
    "bc_gaussian": (bc.recipe, bc.Config(hidden_dim=32, batch_size=32, head="gaussian")),
    "consistency_distillation": (
        consistency_distillation.recipe,
        consistency_distillation.Config(teacher=TEACHER, batch_size=32),
    ),
    "diffusion_bc": (diffusion_bc.recipe, SMALL_DIFFUSION_BC),
    "diffusion_bc_ddpm": (diffusion_bc.recipe, replace(SMALL_DIFFUSION_BC, form="ddpm")),
    "diffusion_ql": (diffusion_ql.recipe, SMALL),
    "diffusion_ql_bc_only": (diffusion_ql.recipe, replace(SMALL, bc_only=True)),
    "diffusion_ql_max_q": (diffusion_ql.recipe, replace(SMALL, max_q_backup=True)),
    "edp": (
        edp.recipe,
        edp.Config(hidden_dim=32, batch_size=32, clip_norm=1.0, ema_start=10, num_candidates=8),
    ),
    "doser": (doser.recipe, SMALL_DOSER),
    "doser_paper": (
        doser.recipe,
        replace(
            SMALL_DOSER,
            candidates="sampled",
            ood_rows=16,
            backup="behaviour",
            id_value="target",
            reduction="sum",
            detector="stratified",
        ),
    ),
    "doser_uniform": (doser.recipe, replace(SMALL_DOSER, treatment="uniform", detector="cvae")),
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
        ),
    ),
    "idql_quantile": (
        idql.recipe,
        replace(SMALL_IDQL, critic_objective="quantile", actor_objective="soft_adv"),
    ),
    "cql": (cql.recipe, cql.Config(hidden_dim=32, batch_size=32)),
    "cql_lagrange": (cql.recipe, cql.Config(hidden_dim=32, batch_size=32, **LAGRANGE)),
    "iql": (iql.recipe, iql.Config(hidden_dim=32, batch_size=32)),
    "iql_corl": (iql.recipe, iql.Config(hidden_dim=32, batch_size=32, **CORL_IQL)),
    "policy_guided": (policy_guided.recipe, guided.SMALL),
    "policy_guided_world_model": (
        policy_guided.recipe,
        replace(guided.SMALL, agent="iql", training_data="world_model"),
    ),
    "rebrac": (rebrac.recipe, rebrac.Config(hidden_dim=32, batch_size=32)),
    "vdd": (vdd.recipe, replace(SMALL_VDD, initial_means="kmeans")),
    "vdd_em": (vdd.recipe, replace(SMALL_VDD, objective="em", covariance="diagonal")),
    "vdd_imc": (vdd.recipe, replace(SMALL_VDD, objective="imc")),
    "td3_bc": (td3_bc.recipe, td3_bc.Config(hidden_dim=32, batch_size=32)),
}


def trial(name: str) -> dict:
    recipe, config = TRIALS[name]
    *_, case = cases(recipe, config, seeds=(0,))  # what it needs is trained for a few steps
    case = replace(case, steps=STEPS)
    learner = case.build()
    history = case.train(learner)
    rng = Rng.at_step(case.seeds, STEPS, Stream.EVALUATION)
    with torch.no_grad():
        action = learner.act(torch.linspace(-1, 1, 24).view(1, 8, 3), rng)
    names = dict.fromkeys(name for metrics in history for name in metrics)
    return {
        "revision": recipe.revision,
        "metrics": {key: [m[key].item() for m in history if key in m] for key in names},
        "action": action.flatten().tolist(),
    }


def check(name: str) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    found = trial(name)
    assert found["revision"] == golden["revision"], "regenerate: python tests/test_golden.py"
    assert found["metrics"].keys() == golden["metrics"].keys()
    for key, values in golden["metrics"].items():
        # Kernels differ between processors in the last digits; a change of method does not.
        assert found["metrics"][key] == pytest.approx(values, rel=1e-3, abs=1e-5), key
    assert found["action"] == pytest.approx(golden["action"], abs=1e-3)


@pytest.mark.parametrize("name", TRIALS)
def test_numbers_of_this_revision_have_not_changed(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_another_processor_finds_the_same_numbers(name, monkeypatch):
    """Logarithm and cosine that differ in the last bit: nothing hashes or ranks what they make."""

    def normal(self: Rng, *shape: int) -> Tensor:
        values = exact(self, *shape)
        last_bit = (torch.arange(values.numel()).view(values.shape) % 3 - 1) * 2.0**-23
        return values * (1.0 + last_bit)

    exact = Rng.normal
    monkeypatch.setattr(Rng, "normal", normal)
    check(name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for trial_name in sys.argv[1:] or TRIALS:
        path = FOLDER / f"{trial_name}.json"
        path.write_text(json.dumps(trial(trial_name), indent=1) + "\n")
        print(path)
