"""The published settings: every row is reachable, every key exists, the table is the table."""

from __future__ import annotations

from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import NoneType

import pytest
import yaml

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
from harness.datasets.catalog import resolve
from harness.registry import hparams_for

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = [
    bandit_policies.recipe,
    bc.recipe,
    consistency_distillation.recipe,
    cql.recipe,
    diffusion_bc.recipe,
    diffusion_ql.recipe,
    edp.recipe,
    doser.recipe,
    idql.recipe,
    iql.recipe,
    iql.corl_recipe,
    policy_guided.recipe,
    rebrac.recipe,
    td3_bc.recipe,
    vdd.recipe,
]
MINARI = [
    *(f"D4RL/antmaze/{m}-v1" for m in ("umaze", "umaze-diverse", "medium-play", "medium-diverse")),
    *(f"D4RL/antmaze/large-{m}-v1" for m in ("play", "diverse")),
    *(f"D4RL/{h}/{m}-v2" for h in ("pen", "door") for m in ("human", "cloned", "expert")),
    *(f"D4RL/kitchen/{m}-v2" for m in ("complete", "partial", "mixed")),
    *(f"D4RL/pointmaze/{m}-v2" for m in ("open", "umaze", "medium", "large")),
    *(f"mujoco/{e}/{m}-v0" for e in ("hopper", "walker2d") for m in ("simple", "medium", "expert")),
    *(f"surrogate/hopper/{m}-v0" for m in ("medium", "medium-replay")),
    "generated/pointmaze/umaze-v0",
    "generated/bandit2d-v0",
    "generated/ring2d-v0",
]

# name: lr, q_coef, max_q_backup, reward, thousands of steps, clip_norm, top_k. Typed from the
# reference independently of the YAML file.
TABLE = """
halfcheetah-medium-v2 3e-4 1 no none 2000 9 1
hopper-medium-v2 3e-4 1 no none 2000 9 2
walker2d-medium-v2 3e-4 1 no none 2000 1 1
halfcheetah-medium-replay-v2 3e-4 1 no none 2000 2 0
hopper-medium-replay-v2 3e-4 1 no none 2000 4 2
walker2d-medium-replay-v2 3e-4 1 no none 2000 4 1
halfcheetah-medium-expert-v2 3e-4 1 no none 2000 7 0
hopper-medium-expert-v2 3e-4 1 no none 2000 5 2
walker2d-medium-expert-v2 3e-4 1 no none 2000 5 1
antmaze-umaze-v0 3e-4 0.5 no cql_antmaze 1000 2 2
antmaze-umaze-diverse-v0 3e-4 2 yes cql_antmaze 1000 3 2
antmaze-medium-play-v0 1e-3 2 yes cql_antmaze 1000 2 1
antmaze-medium-diverse-v0 3e-4 3 yes cql_antmaze 1000 1 1
antmaze-large-play-v0 3e-4 4.5 yes cql_antmaze 1000 10 2
antmaze-large-diverse-v0 3e-4 3.5 yes cql_antmaze 1000 7 1
pen-human-v1 3e-5 0.15 no normalize 1000 7 2
pen-cloned-v1 3e-5 0.1 no normalize 1000 8 2
kitchen-complete-v0 3e-4 0.005 no none 250 9 2
kitchen-partial-v0 3e-4 0.005 no none 1000 10 2
kitchen-mixed-v0 3e-4 0.005 no none 1000 10 0
"""


def known_names() -> list[str]:
    file = REPOSITORY / "results" / "published" / "d4rl_reference_scores.csv"
    return [line.split(",")[0] for line in file.read_text().splitlines()[1:]] + MINARI


@cache
def _parsed(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def blocks(recipe) -> list[dict]:
    content = _parsed(recipe.hparams)
    return [content["default"], *content["datasets"]]


def presets(recipe) -> dict[str, dict]:
    return _parsed(recipe.hparams).get("presets", {})


def first_match(recipe, name: str) -> dict:
    for block in blocks(recipe)[1:]:
        if any(fnmatchcase(name, pattern) for pattern in block["match"]):
            return block
    return blocks(recipe)[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_every_block_builds_a_config_and_names_its_source(recipe):
    types = {f.name: (type(f.default),) for f in fields(recipe.config)}
    types |= {
        f.name: (type(f.default), NoneType) for f in fields(recipe.config) if "None" in f.type
    }
    for block in [*blocks(recipe), *presets(recipe).values()]:
        assert set(block) <= {"match", "config", "data", "source"}
        assert len(block["source"]) > 10
        recipe.config(**block["config"])
        for key, value in block["config"].items():
            assert type(value) in types[key], f"{key}: {value!r} in {block.get('match')}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_every_block_is_the_first_to_match_some_known_name(recipe):
    names = known_names()
    for block in blocks(recipe)[1:]:
        reached = [n for n in names if first_match(recipe, n) == block]
        assert reached, f"no known dataset reaches {block['match']}"


@pytest.mark.parametrize("row", TABLE.strip().splitlines(), ids=lambda r: r.split()[0])
def test_diffusion_ql_uses_the_published_row(row):
    name, lr, q_coef, max_q, reward, thousands, clip_norm, top_k = row.split()
    block = first_match(diffusion_ql.recipe, name)
    config = diffusion_ql.Config(**block["config"])
    assert config.lr == float(lr)
    assert config.q_coef == float(q_coef)
    assert config.max_q_backup == (max_q == "yes")
    assert config.clip_norm == float(clip_norm)
    assert config.steps == 1000 * int(thousands)
    assert block["data"] == ({} if reward == "none" else {"reward": reward})
    assert block["source"].endswith(f"offline selection: cloning-loss-{int(top_k) + 1}")


@pytest.mark.parametrize(
    ("minari", "d4rl"),
    [
        ("surrogate/hopper/medium-v0", "hopper-medium-v2"),
        ("surrogate/hopper/medium-replay-v0", "hopper-medium-replay-v2"),
        ("D4RL/antmaze/umaze-v1", "antmaze-umaze-v0"),
        ("D4RL/antmaze/umaze-diverse-v1", "antmaze-umaze-diverse-v0"),
        ("D4RL/pen/human-v2", "pen-human-v1"),
        ("D4RL/kitchen/mixed-v2", "kitchen-mixed-v0"),
    ],
)
def test_a_minari_set_uses_the_row_of_its_d4rl_counterpart(minari, d4rl):
    recipe = diffusion_ql.recipe
    assert first_match(recipe, minari) == first_match(recipe, d4rl) != blocks(recipe)[0]


@pytest.mark.parametrize("name", ["hopper-random-v2", "mujoco/hopper/expert-v0"])
def test_a_dataset_without_published_settings_gets_the_default_and_it_says_so(name):
    block = first_match(diffusion_ql.recipe, name)
    assert block == blocks(diffusion_ql.recipe)[0]
    assert "no published settings" in block["source"]


@pytest.mark.parametrize(
    "name", ["door-human-v1", "local/pen/expert-v0", "D4RL/relocate/cloned-v2"]
)
def test_adroit_without_published_settings_gets_those_of_adroit_and_it_says_so(name):
    pen = first_match(diffusion_ql.recipe, "pen-human-v1")
    block = first_match(diffusion_ql.recipe, name)
    assert (block["config"], block["data"]) == (pen["config"], pen["data"])
    assert "no published settings" in block["source"]
    assert first_match(edp.recipe, name)["data"] == {"reward": "min_max"}
    config = rebrac.Config(**first_match(rebrac.recipe, name)["config"])
    assert (config.lr, config.critic_lr, config.batch_size) == (3e-4, 3e-4, 256)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["D4RL/pointmaze/umaze-v2", "D4RL/pointmaze/large-dense-v2"])
def test_pointmaze_keeps_the_step_that_holds_the_reward_under_all_its_names(recipe, name):
    """Minari's sets also have a D4RL name, whose own sets are cut elsewhere."""
    if not any("*pointmaze*" in block["match"] for block in blocks(recipe)[1:]):
        pytest.skip("no settings for PointMaze")
    entry = resolve(name)
    assert entry.legacy_id is not None
    found = hparams_for(recipe, [name, entry.id, entry.legacy_id])
    assert found.data["truncated_last_step"] == "keep"


@pytest.mark.parametrize(
    ("name", "expectile", "candidates", "reward"),
    [
        *((f"{e}-{d}-v2", 0.7, 128, "trajectory_range")
          for e in ("halfcheetah", "hopper", "walker2d")
          for d in ("medium", "medium-replay", "medium-expert")),
        *((f"antmaze-{m}", 0.9, 32, "iql_antmaze")
          for m in ("umaze-v0", "umaze-diverse-v0", "medium-play-v2", "large-diverse-v2")),
        ("surrogate/hopper/medium-v0", 0.7, 128, "trajectory_range"),
        ("surrogate/halfcheetah/medium-v0", 0.7, 128, "trajectory_range"),
        ("D4RL/antmaze/large-play-v1", 0.9, 32, "iql_antmaze"),
        ("pen-human-v1", 0.7, 128, None),
        ("local/pen/expert-v0", 0.7, 128, None),
        ("D4RL/kitchen/mixed-v2", 0.7, 128, None),
    ],
)  # fmt: skip
def test_idql_uses_the_values_of_the_domain(name, expectile, candidates, reward):
    block = first_match(idql.recipe, name)
    config = idql.Config(**block["config"])
    assert (config.expectile, config.num_candidates) == (expectile, candidates)
    assert block["data"] == ({} if reward is None else {"reward": reward})
    assert (config.steps, config.actor_updates) == (1_500_000, 2)


# name: critic updates, actor updates, critic batch, actor batch; after the paper and the code.
IDQL_PROTOCOLS = {
    "idql-a": (1_500_000, 3_000_000, 256, 1024),
    "idql-1": (1_000_000, 2_000_000, 256, 1024),
    "dec2023": (3_000_000, 3_000_000, 512, 512),
}


@pytest.mark.parametrize("name", IDQL_PROTOCOLS)
def test_idql_presets_are_the_published_protocols(name):
    config = idql.Config(**presets(idql.recipe)[name]["config"])
    found = (config.steps, config.steps * config.actor_updates)
    assert (*found, config.batch_size, config.actor_batch_size) == IDQL_PROTOCOLS[name]
    assert config.num_candidates == (128 if name == "idql-a" else 64)


def test_every_idql_protocol_has_a_preset_and_idql_a_is_the_default():
    assert set(presets(idql.recipe)) == set(IDQL_PROTOCOLS)
    assert idql.Config(**presets(idql.recipe)["idql-a"]["config"]) == idql.Config()


@pytest.mark.parametrize(
    ("name", "expectile", "inv_temperature", "dropout_rate", "reward"),
    [
        ("walker2d-random-v2", 0.7, 3.0, 0.0, "trajectory_range"),
        ("hopper-medium-v2", 0.7, 3.0, 0.0, "trajectory_range"),
        ("surrogate/hopper/medium-v0", 0.7, 3.0, 0.0, "trajectory_range"),
        ("antmaze-large-play-v0", 0.9, 10.0, 0.0, "iql_antmaze"),
        ("D4RL/antmaze/umaze-v1", 0.9, 10.0, 0.0, "iql_antmaze"),
        ("pen-human-v0", 0.7, 0.5, 0.1, "none"),
        ("kitchen-partial-v0", 0.7, 0.5, 0.1, "none"),
    ],
)
def test_iql_uses_the_official_codes_row(name, expectile, inv_temperature, dropout_rate, reward):
    block = first_match(iql.recipe, name)
    config = iql.Config(**block["config"])
    found = (config.expectile, config.inv_temperature, config.dropout_rate)
    assert found == (expectile, inv_temperature, dropout_rate)
    assert block["data"].get("reward", "none") == reward


@pytest.mark.parametrize(
    ("name", "expectile", "inv_temperature", "changes", "reward"),
    [
        ("halfcheetah-medium-v2", 0.7, 3.0, {}, "none"),
        ("hopper-random-v2", 0.7, 3.0, {}, "none"),
        ("maze2d-umaze-v1", 0.7, 3.0, {}, "none"),
        ("hopper-medium-v2", 0.7, 3.0, {"deterministic": True, "tau": 0.001}, "corl_locomotion"),
        ("hopper-medium-replay-v2", 0.7, 3.0, {"deterministic": True, "tau": 0.001},
         "corl_locomotion"),
        ("hopper-medium-expert-v2", 0.5, 6.0, {}, "none"),
        ("door-cloned-v1", 0.8, 3.0, {"dropout_rate": 0.1}, "none"),
        ("antmaze-umaze-v2", 0.9, 10.0, {}, "iql_antmaze"),
    ],
)  # fmt: skip
def test_iql_corl_adds_its_row_to_its_variant(name, expectile, inv_temperature, changes, reward):
    default, block = blocks(iql.corl_recipe)[0], first_match(iql.corl_recipe, name)
    expected = iql.Config(
        value_in_use="previous",
        q_loss="mean",
        log_std_min=-20.0,
        action_margin=0.0,
        orthogonal_init=False,
        normalize_obs=True,
        expectile=expectile,
        inv_temperature=inv_temperature,
        **changes,
    )
    assert iql.Config(**default["config"], **block["config"]) == expected
    assert block["data"].get("reward", "none") == reward


# name: bc_coef, critic_bc_coef
REBRAC = """
halfcheetah-random-v2 0.001 0.1
halfcheetah-medium-v2 0.001 0.01
halfcheetah-expert-v2 0.01 0.01
halfcheetah-medium-expert-v2 0.01 0.1
halfcheetah-medium-replay-v2 0.01 0.001
halfcheetah-full-replay-v2 0.001 0.1
hopper-random-v2 0.001 0.01
hopper-medium-v2 0.01 0.01
hopper-expert-v2 0.1 0.1
hopper-medium-expert-v2 0.1 0.01
hopper-medium-replay-v2 0.05 0.5
hopper-full-replay-v2 0.01 0.01
walker2d-random-v2 0.01 0
walker2d-medium-v2 0.05 0.1
walker2d-expert-v2 0.01 0.5
walker2d-medium-expert-v2 0.01 0.01
walker2d-medium-replay-v2 0.05 0.01
walker2d-full-replay-v2 0.01 0.01
antmaze-umaze-v2 0.003 0.002
antmaze-umaze-diverse-v2 0.003 0.001
antmaze-medium-play-v2 0.001 0.0005
antmaze-medium-diverse-v2 0.001 0
antmaze-large-play-v2 0.002 0.001
antmaze-large-diverse-v2 0.002 0.002
pen-human-v1 0.1 0.5
pen-cloned-v1 0.05 0.5
pen-expert-v1 0.01 0.01
door-human-v1 0.1 0.1
door-cloned-v1 0.01 0.1
door-expert-v1 0.05 0.01
hammer-human-v1 0.01 0.5
hammer-cloned-v1 0.1 0.5
hammer-expert-v1 0.01 0.01
relocate-human-v1 0.1 0.01
relocate-cloned-v1 0.1 0.01
relocate-expert-v1 0.05 0.01
maze2d-umaze-v1 0.003 0.001
maze2d-medium-v1 0.003 0.001
maze2d-large-v1 0.003 0.001
"""


@pytest.mark.parametrize("row", REBRAC.strip().splitlines(), ids=lambda r: r.split()[0])
def test_rebrac_uses_the_published_row_of_its_group(row):
    name, bc_coef, critic_bc_coef = row.split()
    block = first_match(rebrac.recipe, name)
    config = rebrac.Config(**block["config"])
    assert (config.bc_coef, config.critic_bc_coef) == (float(bc_coef), float(critic_bc_coef))
    group = (config.lr, config.critic_lr, config.batch_size, config.discount)
    if name.startswith(("halfcheetah", "hopper", "walker2d")):
        assert group == (1e-3, 1e-3, 1024, 0.99)
    elif name.startswith("antmaze"):
        assert group == (3e-4, 5e-5, 256, 0.999)
    else:
        assert group == (3e-4, 3e-4, 256, 0.99)
    assert block["data"] == ({"reward": "times_100"} if name.startswith("antmaze") else {})


ANTMAZE_CQL = {"lagrange": True, "target_gap": 0.8, "max_backup": True, "gap_min": -200.0,
               "critic_layers": 5, "normalize_obs": False}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cql_coef", "lr", "changes", "reward"),
    [
        ("walker2d-full-replay-v2", 10.0, 3e-5, {}, "none"),
        ("hopper-medium-v2", 10.0, 3e-5, {}, "corl_locomotion"),
        ("hopper-medium-replay-v2", 10.0, 3e-5, {}, "none"),
        ("antmaze-medium-play-v2", 5.0, 1e-4, ANTMAZE_CQL, "corl_antmaze"),
        ("relocate-human-v1", 1.0, 1e-4, {}, "none"),
        ("maze2d-large-v1", 10.0, 3e-5, {"lagrange": True, "target_gap": 5.0}, "none"),
    ],
)
def test_cql_uses_corls_row_of_the_group(name, cql_coef, lr, changes, reward):
    block = first_match(cql.recipe, name)
    assert cql.Config(**block["config"]) == cql.Config(cql_coef=cql_coef, lr=lr, **changes)
    assert block["data"].get("reward", "none") == reward


# name: beta, expectile, percentile, state levels, q_min; typed from the reference.
DOSER = """
halfcheetah-medium-v2 .001 .9 99 1 -366
hopper-medium-v2 .001 .9 99 10 -125
walker2d-medium-v2 .01 .9 99 10 -471
halfcheetah-medium-replay-v2 .001 .9 99 10 -366
hopper-medium-replay-v2 .001 .9 99 1 -125
walker2d-medium-replay-v2 .001 .9 99 1 -471
halfcheetah-medium-expert-v2 .05 .7 80 1 -366
hopper-medium-expert-v2 .05 .7 80 1 -125
walker2d-medium-expert-v2 .05 .7 80 1 -471
halfcheetah-expert-v2 .05 .7 80 1 -366
hopper-expert-v2 .05 .7 80 1 -125
walker2d-expert-v2 .05 .7 80 1 -471
halfcheetah-random-v2 .001 .9 99 1 -366
hopper-random-v2 .001 .9 99 1 -125
walker2d-random-v2 .001 .9 99 1 -471
surrogate/hopper/medium-v0 .001 .9 99 10 -125
surrogate/halfcheetah/medium-v0 .001 .9 99 1 -366
local/pen/expert-v0 .05 .7 80 1 -715
"""


@pytest.mark.parametrize("row", DOSER.strip().splitlines(), ids=lambda r: r.split()[0])
def test_doser_uses_the_released_row(row):
    name, *values = row.split()
    config = doser.Config(**first_match(doser.recipe, name)["config"])
    found = (config.penalty_coef, config.expectile, config.percentile, config.state_levels)
    assert (*found, config.q_min) == tuple(float(value) for value in values)
    assert config.q_min_rule == "constant"
    fixed = (config.compensation_coef, config.compensation_scale, config.num_candidates)
    assert (*fixed, config.action_levels) == (0.001, 0.9, 10, 1)


def test_doser_leaves_q_min_to_the_rule_where_no_constant_is_known():
    for name in ("antmaze-large-play-v0", "generated/pointmaze/umaze-v0", "door-human-v1"):
        assert doser.Config(**first_match(doser.recipe, name)["config"]).q_min_rule == "data"
