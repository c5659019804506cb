"""Teachers: samplers and scores against Gaussians, borrowed stages, and what shares what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_catalog import experiment

from algorithms import diffusion_bc
from algorithms.api import Pretrained
from algorithms.blocks.rng import Rng, Stream
from algorithms.teachers import Levels, Score, teacher_stages
from algorithms.testing import TinyDataset
from harness.artifacts import ArtifactStore
from harness.home import Home
from harness.plan import make_plan
from harness.registry import Registry
from harness.spec import SpecError
from tests import inline

SEEDS = (0, 1)
MEAN, STD = 0.3, 0.1
SMALL = diffusion_bc.Config(hidden_dim=16, batch_size=16)


def exact_policy(**changes) -> diffusion_bc.DiffusionBC:
    """A policy whose network is the best one for actions N(MEAN, STD^2), whatever the state."""
    config = replace(SMALL, **changes)
    policy = diffusion_bc.DiffusionBC(config, TinyDataset().spec, SEEDS)

    def noise(noisy, t, obs):  # of a chain: E[noise | noisy]
        kept = policy.diffusion.alpha_bars[t].unsqueeze(-1)
        variance = kept * STD**2 + 1.0 - kept
        return (1.0 - kept).sqrt() * (noisy - kept.sqrt() * MEAN) / variance

    def raw(scaled, level, obs):  # F of an EDM, from E[clean | noisy]
        sigma = (level / diffusion_bc.TIME_SCALE * 4.0).exp()
        skip, out, scale = (c.unsqueeze(-1) for c in policy.preconditioning.scalings(sigma))
        noisy = scaled / scale
        square = sigma.square().unsqueeze(-1)
        clean = (STD**2 * noisy + square * MEAN) / (STD**2 + square)
        return (clean - skip * noisy) / out

    policy.__dict__["exact"] = noise if config.form == "ddpm" else raw
    del policy._modules["ema_actor"]
    policy.ema_actor = policy.exact
    return policy


def moments(levels: list[float], start: float, sampler: str) -> tuple[float, float]:
    """Mean and std that a sampler makes of noise N(0, start^2).

    Every step multiplies the distance from MEAN (and may add noise), so that what is left of the
    start's wrong mean stays in the result: with sigma_max 1 a few per cent.
    """
    left, variance = 1.0, start**2
    for sigma, following in itertools.pairwise(levels):

        def slope(at: float) -> float:  # (x - D) / sigma over x - MEAN
            return at / (STD**2 + at**2)

        down = following
        if sampler == "ancestral":
            down = following**2 / sigma
        factor = 1.0 + (down - sigma) * slope(sigma)
        if sampler == "heun" and following > 0:
            factor = 1.0 + (following - sigma) * 0.5 * (slope(sigma) + slope(following) * factor)
        left, variance = factor * left, factor**2 * variance + following**2 - down**2
    return MEAN * (1.0 - left), variance**0.5


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"act_steps": 40, "sampler": "ddim"}, 0.02),
        ({"act_steps": 12, "sampler": "heun", "spacing": "karras"}, 0.02),
        ({"act_steps": 60, "sampler": "ancestral"}, 0.02),
        ({"form": "ddpm", "act_steps": 50, "sampler": "ddim"}, 0.02),
        ({"form": "ddpm", "act_steps": 50, "sampler": "ancestral"}, 0.025),
        ({"form": "ddpm", "act_steps": 25, "sampler": "heun"}, 0.02),
        ({"act_steps": 1}, 0.1),  # one step gives nearly the mean
        ({"form": "ddpm", "act_steps": 1}, 0.1),
    ],
)
def test_every_sampler_of_both_forms_draws_from_the_gaussian(changes, near):
    policy = exact_policy(**changes)
    with torch.no_grad():
        action = policy.act(torch.zeros(2, 4000, 3), Rng.at_step(SEEDS, 0, Stream.EVALUATION))
    levels = policy.levels.tolist()
    start = levels[0] if policy.config.form == "edm" else (1.0 + levels[0] ** 2) ** 0.5
    mean, std = moments(levels, start, policy.config.sampler)
    assert std == pytest.approx(STD, abs=near)
    assert mean == pytest.approx(MEAN, abs=0.04)
    torch.testing.assert_close(action.mean(dim=1), torch.full((2, 2), mean), atol=0.006, rtol=0)
    torch.testing.assert_close(action.std(dim=1), torch.full((2, 2), std), atol=0.004, rtol=0)


def test_training_of_both_forms_has_the_loss_of_its_equation():
    """The exact network's loss is below that of any other, so also of the untrained one."""
    dataset = TinyDataset(num_episodes=200)
    dataset.action = MEAN + STD * Rng.at_step((0,), 0, Stream.TEST).normal(2000, 2)[0]
    rng = Rng.at_step(SEEDS, 0, Stream.TRAIN)
    batch = dataset.transitions(rng, 1024)
    for form in ("edm", "ddpm"):
        policy = exact_policy(form=form)
        with torch.no_grad():
            best, _ = policy.loss(policy.ema_actor, batch, Rng.at_step(SEEDS, 1, Stream.TRAIN))
            other, _ = policy.loss(policy.actor, batch, Rng.at_step(SEEDS, 1, Stream.TRAIN))
        assert (best < 0.8 * other).all(), form


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("form", ["edm", "ddpm"])
def test_the_score_is_the_gaussians(form, unbiased):
    """EDM, unbiased: of N(m, s^2 + sigma^2). Released DDPM: of N(sqrt(ab) m, ab s^2 + 1 - ab)."""
    teacher = Pretrained("diffusion_bc", config={"form": form, "hidden_dim": 16})
    levels = Levels.of(teacher, 0.2, 0.5)
    spec = TinyDataset().spec
    state = diffusion_bc.DiffusionBC(replace(SMALL, form=form), spec, SEEDS).state_dict()
    score = Score(teacher, levels, spec, state, unbiased)
    policy = exact_policy(form=form)
    score._teacher = (policy, policy.ema_actor)
    rng = Rng.at_step(SEEDS, 0, Stream.TEST)
    action, uniform = 0.5 * rng.normal(4, 3, 5, 2), rng.uniform(4, 3, 5)
    with torch.no_grad():
        found = score(action, torch.zeros(2, 4, 3), uniform)
    if form == "edm":
        sigma = 0.2 + 0.3 * uniform
    else:
        sigma = score.sigmas[(uniform * len(score.sigmas)).long()]
        assert sigma.min() >= 0.2
        assert sigma.max() <= 0.5
    sigma = sigma.unsqueeze(-1)
    expected = -(action - MEAN) / (STD**2 + sigma**2)
    if form == "ddpm" and not unbiased:
        kept = 1.0 / (1.0 + sigma**2)
        expected = -(action - kept.sqrt() * MEAN) / (kept * STD**2 + 1.0 - kept)
    if form == "edm":  # predictions are clipped to the bounds; here none is out there
        assert action.abs().max() < 3
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_a_teacher_with_bounds_of_its_own_is_asked_in_its_own_units():
    """Diffusion-QL does not scale actions: d log p / d u = reach * d log p / d a."""
    from algorithms.diffusion_ql import DiffusionQL

    config = {"denoise_steps": 50, "hidden_dim": 16}
    teacher = Pretrained("diffusion_ql", config=config)
    spec = replace(TinyDataset().spec, action_low=(-1.0, 0.0), action_high=(3.0, 0.5))
    stage = teacher_stages(teacher)[-1]
    policy = DiffusionQL(stage.config, spec, SEEDS)
    score = Score(teacher, Levels.of(teacher, 0.2, 0.5), spec, policy.state_dict(), True)
    middle, reach = torch.tensor([1.0, 0.25]), torch.tensor([2.0, 0.25])
    rng = Rng.at_step(SEEDS, 0, Stream.TEST)
    unit, uniform, obs = rng.normal(4, 2, 2), rng.uniform(4, 2), rng.normal(4, 3)
    with torch.no_grad():
        found = score(unit, obs, uniform)
        sigma = score.sigmas[(uniform * len(score.sigmas)).long()]
        t = (sigma.unsqueeze(-1) - policy.diffusion.sigmas).abs().argmin(dim=-1)
        kept = policy.diffusion.alpha_bars[t].sqrt().unsqueeze(-1)
        noisy = kept * (middle + reach * unit)
        noise = policy.actor(noisy, t, obs.unsqueeze(2).expand(-1, -1, 2, -1))
    torch.testing.assert_close(found, -reach * noise / sigma.unsqueeze(-1))


# ------------------------------------------------------------------------------------ the plan

SPEC = """
name: teachers
algorithms:
  teacher: {algorithm: NAME, config: CONFIG}
  student: {algorithm: vdd, config: {teacher: {algorithm: NAME, config: CONFIG}}}
  quick: {algorithm: vdd, config: {lr: 1.0e-3, teacher: {algorithm: NAME, config: CONFIG}}}
  few: {algorithm: vdd, config: {num_experts: 2, teacher: {algorithm: NAME, config: CONFIG}}}
datasets: [hopper-medium-v2]
seeds: 0-2
evaluation: {every: 1000}
"""


def plan_of(folder: Path, text: str, *overrides: str):
    loaded = experiment(folder, text, *overrides, registry=Registry())
    return make_plan(loaded, None, ArtifactStore(folder / "artifacts"), folder / "work", Registry())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("diffusion_bc", "{}"),
        ("diffusion_bc", "{form: ddpm, lr: 5.0e-4}"),
        ("diffusion_ql", "{denoise_steps: 50}"),
        ("idql", "{denoise_steps: 50}"),
    ],
)
def test_students_and_the_teachers_own_trial_share_one_training(tmp_path, name, config):
    """Also with the settings and the reward transform that its file has for the dataset."""
    text = SPEC.replace("NAME", name).replace("CONFIG", config)
    plan = plan_of(tmp_path, text)
    names = [(stage.algorithm, stage.name) for stage in plan.stages.values()]
    counts = {key: names.count(key) for key in names}
    assert counts == {(name, "policy"): 3, ("vdd", "samples"): 3, ("vdd", "student"): 9}
    alone = plan_of(tmp_path, text, "algorithms=[teacher]")
    assert set(alone.stages) < set(plan.stages)
    trials = {t.label: t for t in plan.trials}
    assert trials["student"].config["teacher"]["config"] == trials["teacher"].config
    assert trials["student"].data == trials["teacher"].data
    first = next(iter(alone.stages.values()))
    assert first.recipe_config == Registry().get(name).config(**trials["teacher"].config)


def test_the_students_learning_rate_leaves_the_teacher_and_its_samples_alone(tmp_path):
    text = SPEC.replace("NAME", "diffusion_bc").replace("CONFIG", "{}")
    one = plan_of(tmp_path, text, "algorithms=[student]")
    other = plan_of(tmp_path, text, "algorithms=[student]", "config.lr=0.5")
    new = [other.stages[i].name for i in other.stages if i not in one.stages]
    assert new == ["student"] * 3
    for changed in ("batch_size: 64", "lr: 0.3"):
        another = plan_of(
            tmp_path, SPEC.replace("NAME", "diffusion_bc").replace("CONFIG", f"{{{changed}}}"),
            "algorithms=[student]",
        )  # fmt: skip
        assert not set(another.stages) & set(one.stages), changed


def test_students_without_a_teacher_do_not_depend_on_one(tmp_path):
    text = SPEC.replace("NAME", "diffusion_bc").replace("CONFIG", "{}")
    text = text.replace("algorithm: vdd, config: {", "algorithm: vdd, config: {objective: em, ")
    one = plan_of(tmp_path, text, "algorithms=[student]")
    other = plan_of(
        tmp_path, text, "algorithms=[student]", "algorithms.student.config.teacher.config.lr=0.5"
    )
    assert set(one.stages) == set(other.stages)
    assert {stage.name for stage in one.stages.values()} == {"student"}


def test_few_steps_of_a_teacher_need_no_training_of_their_own(tmp_path):
    text = """
name: steps
algorithms:
  whole: {algorithm: diffusion_bc}
  one: {algorithm: diffusion_bc, config: {act_steps: 1}}
  heun: {algorithm: diffusion_bc, config: {act_steps: 4, sampler: heun}}
datasets: [generated/line-v0]
seeds: 0-1
"""
    plan = plan_of(tmp_path, text)
    found = [(s.name, s.steps, [t.label for t in s.trials]) for s in plan.stages.values()]
    trained = [entry for entry in found if entry[1]]
    assert trained == [("policy", 40_000, ["whole"])] * 2
    assert sorted(entry[2] for entry in found if not entry[1]) == [["heun"]] * 2 + [["one"]] * 2


def test_a_teacher_is_completed_merged_and_checked(tmp_path):
    text = SPEC.replace("NAME", "diffusion_ql").replace("CONFIG", "{denoise_steps: 50}")
    override = "algorithms.student.config.teacher.config.lr=0.01"
    (trial, *_) = plan_of(tmp_path, text, "algorithms=[student]", override).trials
    teacher = trial.config["teacher"]
    assert (teacher["revision"], teacher["preset"]) == (2, "")
    assert teacher["config"]["lr"] == 0.01
    assert teacher["config"]["denoise_steps"] == 50  # given in the file
    assert teacher["config"]["clip_norm"] == 9.0  # of its hyperparameters for hopper-medium-v2
    for wrong, message in (
        (
            "{algorithm: diffusion_q1}",
            r"teacher\.algorithm: .*Did you mean 'diffusion_ql'",
        ),
        ("{algorithm: bc}", "expected a diffusion policy"),
        ("{algorithm: idql}", "too coarse"),
        ("{config: {act_step: 1}}", r"teacher\.config\.act_step: .*Did you mean 'act_steps'"),
        ("{preset: dppm}", "unknown preset 'dppm'"),
    ):
        block = (
            f"name: x\nalgorithms: {{student: {{algorithm: vdd, config: {{teacher: {wrong}}}}}}}\n"
        )
        with pytest.raises(SpecError, match=message):
            plan_of(tmp_path, block + "datasets: [generated/line-v0]\nseeds: 0\n")


# ------------------------------------------------------------------------------- a whole sweep


@pytest.mark.slow
def test_a_sweep_trains_the_teacher_once_and_gives_densities(bandit, tmp_path):
    import json

    import pandas as pd
    from typer.testing import CliRunner

    from harness import cli

    spec = tmp_path / "vdd.yaml"
    small = "steps: 20, hidden_dim: 16, batch_size: 16"
    teacher = f"{{{small}, act_steps: 2}}"
    spec.write_text(f"""
name: vdd
algorithms:
  teacher: {{algorithm: diffusion_bc, config: {teacher}}}
  one: {{algorithm: diffusion_bc, config: {{{small}, act_steps: 1}}}}
  student:
    algorithm: vdd
    config: {{steps: 10, hidden_dim: 16, gate_states: 16, teacher: {{config: {teacher}}}}}
datasets: [generated/bandit2d-v0]
seeds: 0-1
evaluation: {{every: 10, episodes: 4}}
run: {{log_every: 5, compile: "off", device: cpu}}
""")
    home = Home.find(tmp_path / "runs")
    summary = inline.sweep(spec, home.root)
    assert summary.ok, summary.errors
    assert summary.trained == 5  # teacher, two ways to act, samples, student; two seeds each
    again = inline.sweep(spec, home.root)
    assert again.trained == 0
    stored = inline.rows(home.root)
    assert len(stored["artifacts"]) == 10
    runner = CliRunner()
    out = tmp_path / "actions.parquet"
    done = runner.invoke(
        cli.app, ["actions", str(spec), "--count", "8", "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["trials"] == 6
    table = pd.read_parquet(out).set_index("label")
    assert table.loc["student", ["log_density", "data_log_density"]].notna().all(axis=None)
    assert table.loc["teacher", "log_density"].isna().all()
