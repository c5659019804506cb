"""Experiment files: what they may say, how they resolve, and what identifies a trial."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_catalog import PLUGIN, SmallCatalog, experiment

from harness.datasets import DataSpec
from harness.registry import Registry
from harness.spec import (
    EvaluationSpec,
    RunOptions,
    SpecError,
    TrialSpec,
    data_to_dict,
    load_experiment,
    parse_seeds,
)
from harness.typed import (
    FieldError,
    canonical_json,
    config_from_dict,
    config_to_dict,
    content_hash,
)

ROOT = Path(__file__).parents[1]

BASE = """
name: small
algorithms:
  plain: {algorithm: two_stage}
  fast: {algorithm: two_stage, config: {student_lr: 0.5}}
datasets: ["generated/*", hopper-medium-v2]
seeds: 0-2
"""


@pytest.fixture(scope="module")
def registry() -> Any:
    sys.path.insert(0, str(PLUGIN))
    yield Registry()
    sys.path.remove(str(PLUGIN))


@pytest.fixture
def load(tmp_path: Path, registry: Registry) -> Any:
    def call(text: str = BASE, *overrides: str, catalog: SmallCatalog | None = None) -> Any:
        return experiment(tmp_path, text, *overrides, registry=registry, catalog=catalog)

    return call


# ------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (10, (10,)),
        ("10", (10,)),
        ("0-9", tuple(range(10))),
        ("0,1,2", (0, 1, 2)),
        (" 0-3 , 7 ", (0, 1, 2, 3, 7)),
        ([4, "6-7", 0], (4, 6, 7, 0)),
        (["1,2", 5], (1, 2, 5)),
        (2**32 - 1, (2**32 - 1,)),
        ("3-3", (3,)),
    ],
)
def test_seeds_are_read(value: Any, expected: tuple[int, ...]) -> None:
    assert parse_seeds(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9-0", "the range '9-0' is descending; ranges are ascending: 0-9"),
        ("0,1,0", "seed 0 appears more than once"),
        ("0-3,2", "seed 2 appears more than once"),
        (-1, "seed -1 is outside 0 to 4294967295"),
        ("-1", "cannot read seeds from '-1'"),
        (2**32, "outside 0 to 4294967295"),
        ("", "cannot read seeds from ''"),
        ("1,,2", "cannot read seeds from ''"),
        ("a", "cannot read seeds from 'a'"),
        ("0-", "cannot read seeds from '0-'"),
        ("1.5", "cannot read seeds from '1.5'"),
        ("٣", "cannot read seeds"),
        (1.0, "expected seeds, got 1.0"),
        (True, "expected seeds, got True"),
        ([True], "cannot read seeds from True"),
        ([], "no seeds given"),
        ({"a": 1}, "expected seeds"),
        ("0-99999999", "has 100000000 seeds; is that meant"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(value: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        parse_seeds(value)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20, unique=True))
def test_any_unique_seeds_survive_as_list_and_as_text(seeds: list[int]) -> None:
    assert parse_seeds(seeds) == tuple(seeds)
    assert parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


# ------------------------------------------------------------------------------ typed config fields


@dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclass(frozen=True)
class Everything:
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    name: str = "x"
    mode: Literal["off", "on", 3] = "off"
    maybe: float | None = None
    either: int | str = 0
    widths: tuple[int, ...] = (2, 3)
    pair: tuple[float, str] = (1.0, "a")
    table: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("values", "attribute", "expected"),
    [
        ({"rate": 2}, "rate", 2.0),
        ({"maybe": 3}, "maybe", 3.0),
        ({"maybe": None}, "maybe", None),
        ({"rate": -0.0}, "rate", 0.0),
        ({"mode": 3}, "mode", 3),
        ({"either": "a"}, "either", "a"),
        ({"either": 7}, "either", 7),
        ({"widths": []}, "widths", ()),
        ({"widths": [5]}, "widths", (5,)),
        ({"pair": [1, "b"]}, "pair", (1.0, "b")),
        ({"table": {"a": 1}}, "table", {"a": 1.0}),
        ({"inner": {"width": 9}}, "inner", Inner(9)),
    ],
)
def test_values_that_fit_their_field_are_taken(
    values: dict[str, Any], attribute: str, expected: Any
) -> None:
    found = getattr(config_from_dict(Everything, values), attribute)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, float):
        assert math.copysign(1.0, found) == math.copysign(1.0, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": 1}, r"here\.flag: expected bool, got 1 \(int\)"),
        ({"flag": "true"}, r"here\.flag: expected bool, got 'true'"),
        ({"count": True}, r"here\.count: expected int, got True \(bool\)"),
        ({"count": 2.0}, r"here\.count: expected int, got 2\.0 \(float\)\. Write 2"),
        ({"count": 2.5}, r"here\.count: expected int, got 2\.5"),
        ({"count": "2"}, r"here\.count: expected int, got '2'"),
        ({"count": None}, r"here\.count: expected int, got null"),
        ({"rate": True}, r"here\.rate: expected float, got True"),
        ({"rate": "1e-3"}, r"here\.rate: expected float, got '1e-3' \(str\)"),
        ({"rate": math.nan}, r"here\.rate: nan is not a finite number"),
        ({"maybe": math.inf}, r"here\.maybe: inf is not a finite number. Use null"),
        ({"rate": 10**400}, r"here\.rate: 1000+ is not a finite number"),
        ({"name": 3}, r"here\.name: expected str, got 3"),
        ({"name": False}, r"here\.name: expected str, got False .*on, off, yes or no .* quotes"),
        ({"mode": "onn"}, r"here\.mode: expected one of 'off', 'on', 3, got 'onn'.*mean 'on'\?"),
        ({"mode": True}, r"here\.mode: expected one of .* put it in quotes"),
        ({"mode": 3.0}, r"here\.mode: expected one of"),
        ({"either": 1.5}, r"here\.either: expected int \| str, got 1\.5"),
        ({"widths": 3}, r"here\.widths: expected a list, got 3"),
        ({"widths": [1, "2"]}, r"here\.widths\[1\]: expected int, got '2'"),
        ({"pair": [1.0]}, r"here\.pair: expected 2 values, got 1"),
        ({"table": {"a": "b"}}, r"here\.table\.a: expected float, got 'b'"),
        ({"inner": {"widht": 1}}, r"here\.inner\.widht: unknown key 'widht'. Did you mean 'width'"),
        ({"inner": 3}, r"here\.inner: expected a mapping, got 3"),
        ({"coutn": 1}, r"here\.coutn: unknown key 'coutn'. Did you mean 'count'\? Known: count"),
        ({"RATE": 1}, r"Did you mean 'rate'"),
        ({1: 2}, "keys must be strings, got 1"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_place(values: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        config_from_dict(Everything, values, "here")


floats = st.floats(allow_nan=False, allow_infinity=False)
everythings = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    rate=floats,
    name=st.text(),
    mode=st.sampled_from(["off", "on", 3]),
    maybe=st.none() | floats,
    either=st.integers() | st.text(),
    widths=st.lists(st.integers()).map(tuple),
    pair=st.tuples(floats, st.text()),
    table=st.dictionaries(st.text(), floats),
    inner=st.builds(Inner, st.integers()),
)


@given(everythings)
def test_a_config_survives_the_way_through_json(config: Everything) -> None:
    plain = config_to_dict(config)
    assert config_from_dict(Everything, json.loads(json.dumps(plain))) == config
    assert config_to_dict(config_from_dict(Everything, plain)) == plain


def test_numbers_take_their_declared_type_before_they_are_hashed() -> None:
    as_written = Everything(rate=1, maybe=-0.0)  # type: ignore[arg-type]
    assert canonical_json(config_to_dict(as_written)) == canonical_json(
        config_to_dict(Everything(rate=1.0, maybe=0.0))
    )


# ---------------------------------------------------------------------------------- canonical JSON


def test_canonical_json_is_what_it_says() -> None:
    value = {"b": [1, 1.0, 0.1, 1e22, -0.0, None, True], "a": {"z": "µ", "y": (1,)}}
    assert canonical_json(value) == (
        '{"a":{"y":[1],"z":"\\u00b5"},"b":[1,1.0,0.1,1e+22,0.0,null,true]}'
    )
    known = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert content_hash({}) == known  # sha256 of "{}"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@given(values, st.randoms(use_true_random=False))
def test_key_order_does_not_matter_and_every_number_survives(value: Any, rng: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(shuffled(value, rng)) == text
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("value", [math.nan, {"a": [math.inf]}, {1: 2}, {"a": object()}, b"x"])
def test_what_json_cannot_hold_is_not_hashed(value: Any) -> None:
    with pytest.raises(FieldError):
        content_hash(value)


# ----------------------------------------------------------------------------------- trial identity

TRIAL = TrialSpec(
    algorithm="a",
    revision=1,
    dataset_id="d-v0",
    dataset_digest="0" * 64,
    data={"reward": "none"},
    config={"lr": 0.1, "steps": 10},
    seed=0,
    evaluation=EvaluationSpec(environment={"env_id": "E-v0"}, simulator="mujoco 3.11.0"),
    label="A",
)


def test_the_label_is_not_part_of_the_identity() -> None:
    assert dataclasses.replace(TRIAL, label="B").id == TRIAL.id
    assert len(TRIAL.id) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "b"},
        {"revision": 2},
        {"dataset_id": "d-v1"},
        {"dataset_digest": "1" * 64},
        {"data": {"reward": "normalize"}},
        {"config": {"lr": 0.1, "steps": 11}},
        {"config": {"lr": 0.1000000000000001, "steps": 10}},
        {"seed": 1},
        {"precision": "mixed"},
        {"evaluation": dataclasses.replace(TRIAL.evaluation, every=1)},
        {"evaluation": dataclasses.replace(TRIAL.evaluation, episodes=1)},
        {"evaluation": dataclasses.replace(TRIAL.evaluation, first_env_seed=1)},
        {"evaluation": dataclasses.replace(TRIAL.evaluation, environment={"env_id": "E-v1"})},
        {"evaluation": dataclasses.replace(TRIAL.evaluation, simulator="mujoco 3.3.7")},
    ],
)
def test_everything_else_is_part_of_the_identity(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(TRIAL, **change)
    assert changed.id != TRIAL.id
    assert (changed.variant_id == TRIAL.variant_id) == (list(change) == ["seed"])
    assert set(TRIAL.identity()) == {f.name for f in dataclasses.fields(TrialSpec)} - {"label"}


def test_a_trial_survives_pickling_with_its_id() -> None:
    again = pickle.loads(pickle.dumps(TRIAL))
    assert again == TRIAL
    assert (again.id, hash(again)) == (TRIAL.id, hash(TRIAL))


# --------------------------------------------------------------------------------------- resolution


def test_an_experiment_is_the_product_of_datasets_algorithms_and_seeds(load: Any) -> None:
    found = load()
    assert len(found.trials) == 3 * 2 * 3
    assert len({trial.id for trial in found.trials}) == 18
    assert len({trial.variant_id for trial in found.trials}) == 6
    first = found.trials[0]
    assert (first.label, first.algorithm, first.revision) == ("plain", "two_stage", 3)
    assert first.config["student_lr"] == 0.1
    assert first.evaluation.environment == {"env_id": "Line-v0", "max_episode_steps": 300}
    assert first.evaluation.simulator == "mujoco 3.11.0"
    assert first.data["reward"] == "none"
    assert found.trials[3].config["student_lr"] == 0.5
    assert [trial.seed for trial in found.trials[:3]] == [0, 1, 2]
    origin = found.origins[-1]
    assert (origin.dataset_id, origin.requested) == ("mujoco/hopper/medium-v0", "hopper-medium-v2")
    assert (origin.relation, origin.note) == ("different", "other behaviour policies")
    assert origin.hparams == "config defaults"


LAYERS = """
name: small
algorithms:
  plain: {algorithm: two_stage, config: {student_lr: 2}, data: {discount: 0.5}}
  other: {algorithm: two_stage}
datasets: [generated/line-v0, generated/loop-v0]
seeds: 7
steps: 50
config: {student_lr: 1, teacher_lr: 1}
data: {reward: normalize}
evaluation: {every: 10, episodes: 3}
cases:
  - {algorithm: plain, dataset: "*loop*", steps: 60, config: {student_lr: 3}}
  - {dataset: "*loop*", config: {student_lr: 4}, data: {reward: none}, evaluation: {every: 20}}
"""


def settings_of(found: Any) -> dict[tuple[str, str], Any]:
    return {
        (t.label, t.dataset_id.split("/")[1][:4]): (
            t.config["steps"],
            t.config["student_lr"],
            t.config["teacher_lr"],
            t.data["reward"],
            t.data["discount"],
            t.evaluation.every,
            t.evaluation.episodes,
        )
        for t in found.trials
    }


def test_later_layers_win(load: Any) -> None:
    assert settings_of(load(LAYERS)) == {
        ("plain", "line"): (50, 2.0, 1.0, "normalize", 0.5, 10, 3),
        ("other", "line"): (50, 1.0, 1.0, "normalize", 0.99, 10, 3),
        ("plain", "loop"): (60, 4.0, 1.0, "none", 0.5, 20, 3),
        ("other", "loop"): (50, 4.0, 1.0, "none", 0.99, 20, 3),
    }


def test_the_command_line_beats_cases_and_the_specific_beats_the_general(load: Any) -> None:
    found = load(
        LAYERS,
        "steps=5",
        "config.student_lr=8",
        "algorithms.plain.config.student_lr=9",
        "evaluation.every=500",
        "data.reward=iql_antmaze",
    )
    assert settings_of(found) == {
        ("plain", "line"): (5, 9.0, 1.0, "iql_antmaze", 0.5, 500, 3),
        ("other", "line"): (5, 8.0, 1.0, "iql_antmaze", 0.99, 500, 3),
        ("plain", "loop"): (5, 9.0, 1.0, "iql_antmaze", 0.5, 500, 3),
        ("other", "loop"): (5, 8.0, 1.0, "iql_antmaze", 0.99, 500, 3),
    }


PRESETS = """
name: presets
algorithms:
  later: {algorithm: idql, preset: dec2023, config: {tau: 0.1}}
  by_hand:
    algorithm: idql
    config: {batch_size: 512, actor_batch_size: 512, actor_updates: 1, activation: silu, tau: 0.1,
             time_dim: 128, cond_dim: 256, weight_decay: 1e-4, value_input_norm: true,
             num_candidates: 64}
    steps: 3000000
datasets: [hopper-medium-v2]
seeds: 0
"""


def test_a_preset_lies_between_the_datasets_block_and_the_experiment(load: Any) -> None:
    (trial,) = load(PRESETS, "algorithms=later").trials
    assert trial.config["steps"] == 3_000_000  # the preset's
    assert trial.data["reward"] == "trajectory_range"  # the dataset's
    assert trial.config["tau"] == 0.1  # the experiment's
    (shorter,) = load(PRESETS, "algorithms=later", "steps=7").trials
    assert (shorter.config["steps"], shorter.config["batch_size"]) == (7, 512)
    (other,) = load(PRESETS, "algorithms=later", "algorithms.later.preset=idql-1").trials
    assert (other.config["steps"], other.config["num_candidates"]) == (1_000_000, 64)
    (none,) = load(PRESETS, "algorithms=later", "algorithms.later.preset=null").trials
    assert none.config["steps"] == 1_500_000


def test_identity_follows_from_the_values_and_not_from_the_presets_name(load: Any) -> None:
    (later,) = load(PRESETS, "algorithms=later").trials
    (by_hand,) = load(PRESETS, "algorithms=by_hand").trials
    assert later.id == by_hand.id
    with pytest.raises(SpecError, match="the same trials as"):
        load(PRESETS)


def test_the_plan_says_which_preset_applied(load: Any) -> None:
    (origin,) = load(PRESETS, "algorithms=later").origins
    assert re.search(r"\+ preset dec2023 \(.*; official code of December 2023", origin.hparams)


def test_the_plan_says_what_was_changed_of_the_table_and_by_whom(load: Any) -> None:
    found = load(LAYERS, "config.teacher_lr=8", "algorithms.other.config.student_lr=0.1")
    changed = {(o.label, o.dataset_id.split("/")[1][:4]): o.changed for o in found.origins}
    assert changed["plain", "loop"] == {
        "experiment": {"data.discount": 0.5, "steps": 60, "student_lr": 4.0},
        "command line": {"teacher_lr": 8.0},
    }
    assert changed["other", "line"] == {  # student_lr is what it is by default
        "experiment": {"data.reward": "normalize", "steps": 50},
        "command line": {"teacher_lr": 8.0},
    }
    later, by_hand = load(PRESETS, "algorithms.by_hand.config.tau=0.2").origins
    assert later.changed == {"experiment": {"tau": 0.1}}
    assert by_hand.changed["experiment"]["num_candidates"] == 64
    assert "steps" not in load(PRESETS, "algorithms=later", "steps=3000000").origins[0].changed


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("dec2032", r"algorithms\.later\.preset: 'idql' has no preset 'dec2032'\. Did you mean"),
        ("[dec2023]", r"algorithms\.later\.preset: expected str"),
    ],
)
def test_a_preset_that_does_not_exist_is_refused(load: Any, preset: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(PRESETS, "algorithms=later", f"algorithms.later.preset={preset}")
    with pytest.raises(SpecError, match=r"'two_stage' has no preset 'x'\. Known: none"):
        load(BASE, "algorithms.plain.preset=x")


def test_overrides_reach_lists_labels_and_whole_keys(load: Any) -> None:
    narrowed = load(LAYERS, "seeds=0,4-5", "datasets=generated/line-v0")  # the cases may rest
    assert [trial.seed for trial in narrowed.trials] == [0, 4, 5] * 2
    assert len(load(LAYERS, "algorithms=other").trials) == 2  # no case is left for `plain`
    chosen = load(LAYERS, "algorithms=[plain]").trials
    assert {t.label for t in chosen} == {"plain"}
    assert chosen[0].config["student_lr"] == 2.0  # the file's block is kept
    assert {t.label for t in load(LAYERS, "algorithms=plain,other").trials} == {"plain", "other"}
    assert settings_of(load(LAYERS, "cases[1].config.student_lr=6"))["other", "loop"][1] == 6.0
    assert settings_of(load(LAYERS, "cases=[]"))["plain", "loop"][1] == 2.0
    added = load(LAYERS, "algorithms.new={algorithm: two_stage, config: {student_lr: 7}}")
    assert settings_of(added)["new", "loop"][1] == 7.0
    assert load(LAYERS, "run={max_stack: 3}", "run.compile=off").run == RunOptions(
        max_stack=3, compile="off"
    )
    assert load(LAYERS, "name=other").name == "other"
    assert load(LAYERS, "seeds=3").source["seeds"] == 3


def test_a_seed_is_the_number_that_is_written(load: Any) -> None:
    for text, seeds in (("010", [10]), ("[010, 2]", [10, 2]), ("08", [8]), ("007-009", [7, 8, 9])):
        found = load(BASE, f"seeds={text}").trials
        assert list(dict.fromkeys(trial.seed for trial in found)) == seeds
    for text in ("0x10", "1_0", "1:30", "0o10"):
        with pytest.raises(SpecError, match=r"command line: seeds: cannot read seeds from"):
            load(BASE, f"seeds={text}")
    for text in ("010", "[1, 010]", "0x10", "1:30"):
        with pytest.raises(
            SpecError, match=r"spec\.yaml: seeds: YAML reads .* Write plain decimal"
        ):
            load(BASE.replace("seeds: 0-2", f"seeds: {text}"))
    assert load(BASE.replace("seeds: 0-2", "seeds: '010'")).trials[0].seed == 10


def test_an_override_may_refer_to_the_file(load: Any) -> None:
    text = BASE + "steps: 40\n"
    assert load(text, "evaluation.every=${steps}").trials[0].evaluation.every == 40
    assert load(text, "evaluation.every=${steps}", "steps=60").trials[0].evaluation.every == 60
    with pytest.raises(SpecError, match="stepz"):
        load(text, "evaluation.every=${stepz}")


def test_interpolations_refer_to_other_keys(load: Any) -> None:
    text = BASE + "steps: 40\nevaluation: {every: '${steps}'}\n"
    assert load(text).trials[0].evaluation.every == 40
    assert load(text, "steps=60").trials[0].evaluation.every == 60
    with pytest.raises(SpecError, match=r"spec\.yaml: .*stepz"):
        load(BASE + "steps: ${stepz}\n")


def test_identity_does_not_depend_on_how_a_value_was_given(load: Any) -> None:
    def ids(text: str, *overrides: str) -> set[str]:
        return {trial.id for trial in load(text, *overrides).trials}

    one = "name: n\nalgorithms: [two_stage]\ndatasets: [generated/line-v0]\nseeds: 0-1\n"
    expected = ids(one)
    assert ids(one, "steps=40") == expected  # the default
    assert ids(one + "config: {student_lr: 0.10, steps: 40}") == expected
    assert ids(one + "evaluation: {episodes: 10}") == expected
    assert ids(one + "cases: [{dataset: '*', data: {discount: 0.99}}]") == expected
    assert ids(one + "run: {device: cpu, max_stack: 1, log_every: 7}") == expected
    renamed = one.replace("[two_stage]", "{other label: {algorithm: two_stage}}")
    assert ids(renamed.replace("name: n", "name: m")) == expected
    assert ids("\n".join(reversed(one.splitlines()))) == expected
    assert ids(one, "seeds=0-5") > expected
    for change in ("steps=41", "evaluation.every=1", "data.reward=normalize"):
        assert not ids(one, change) & expected
    for catalog in (
        SmallCatalog({"generated/line-v0": "f" * 64}),
        SmallCatalog(simulator="mujoco 3.3.7"),
    ):
        assert not {t.id for t in load(one, catalog=catalog).trials} & expected


def test_a_name_given_in_full_is_kept_over_the_globs(load: Any) -> None:
    for order in ('["*hopper*", hopper-medium-v2]', '[hopper-medium-v2, "*hopper*"]'):
        found = load(BASE, f"datasets={order}")
        assert [o.requested for o in found.origins] == ["hopper-medium-v2"] * 2


@pytest.mark.parametrize(
    ("extra", "overrides", "message"),
    [
        ("stepz: 3", (), r"spec\.yaml: stepz: unknown key 'stepz'\. Did you mean 'steps'"),
        ("steps: 1e6", (), r"spec\.yaml: steps: expected int, got 1000000\.0.*Write 1000000"),
        ("steps: 0", (), r"spec\.yaml: plain on generated/line-v0: steps is 0; expected at least"),
        ("config: {q_coef: 1}", (), r"spec\.yaml: config\.q_coef: unknown key 'q_coef'"),
        ("config: {student_lr: x}", (), r"spec\.yaml: config\.student_lr: expected float"),
        ("config: {student_lr: .nan}", (), r"config\.student_lr: nan is not a finite number"),
        ("config: {steps: 1}\nsteps: 2", (), r"steps: given here and in config\.steps"),
        ("data: {rewrad: none}", (), r"data\.rewrad: unknown key .* mean 'reward'"),
        ("data: {reward: big}", (), r"plain on generated/line-v0\.data: .*reward is 'big'"),
        ("evaluation: {evry: 3}", (), r"evaluation\.evry: unknown key .* mean 'every'"),
        ("evaluation: {every: 0}", (), r"\.evaluation: every is 0; expected at least 1"),
        ("evaluation: {simulator: x}", (), r"evaluation\.simulator: follows from the dataset"),
        ("run: {device: tpu}", (), r"spec\.yaml: run: device is 'tpu'; expected auto, cpu"),
        ("run: {compile: maybe}", (), r"run\.compile: expected one of 'auto', 'on', 'off'"),
        ("run: {max_stack: 0}", (), r"run: max_stack is 0; expected at least 1"),
        ("run: {cpus: 1}", (), r"run\.cpus: unknown key 'cpus'\. Did you mean 'cpus_per_stack'|Kn"),
        ("cases: {a: 1}", (), r"cases: expected a list"),
        ("cases: [{algoritm: x}]", (), r"cases\[0\]\.algoritm: unknown key .* mean 'algorithm'"),
        (
            "cases: [{dataset: '*nope*'}]",
            (),
            r"cases\[0\]: .*: '\*nope\*' is none of the datasets",
        ),
        (
            "cases: [{algorithm: bc}]",
            (),
            r"cases\[0\]: .*: 'bc' is none of the algorithms plain",
        ),
        ("cases: [{config: {zz: 1}}]", (), r"cases\[0\]\.config\.zz: unknown key"),
        (
            "cases: [{algorithm: plain, dataset: '*zz*'}]",
            ("algorithms=plain",),
            r"cases\[0\]: .*: '\*zz\*' is none of the datasets generated/line-v0",
        ),
        ("description: [1]", (), r"description: expected str"),
        ("config: 3", (), r"spec\.yaml: config: expected a mapping, got 3"),
        ("x: !!python/object/apply:os.getcwd []", (), r"spec\.yaml: not valid YAML: .*tag"),
        ("seeds: 0", (), r"not valid YAML: .*duplicate key seeds"),
        ("steps: ???", (), r"spec\.yaml: .*[Mm]issing"),
        ("", ("step=3",), r"command line: unknown key 'step'\. Did you mean 'steps'"),
        ("", ("steps",), r"command line: 'steps' is not an override; expected key=value"),
        ("", ("=3",), r"is not an override"),
        ("", ("config..x=3",), r"is not an override"),
        ("", ("steps=abc",), r"command line: steps: expected int, got 'abc'"),
        ("", ("steps=[",), r"command line: 'steps=\[': not valid YAML"),
        ("", ("config={student_lr: 1, student_lr: 2}",), r"duplicate key student_lr"),
        ("", ("config.student_lrr=1",), r"command line: config\.student_lrr: .* mean 'student_lr'"),
        ("", ("evaluation.evry=1",), r"evaluation\.evry: unknown key"),
        ("", ("algorithms.pln.config.steps=3",), r"no algorithm 'pln'\. Did you mean 'plain'"),
        ("", ("algorithms.plain.config.lr=3",), r"algorithms\.plain\.config\.lr: unknown key 'lr'"),
        ("", ("algorithms=[two_stge]",), r"unknown algorithm 'two_stge'\. Did you mean 'two_st"),
        ("", ("algorithms=[]",), r"algorithms: no algorithm given"),
        ("", ("algorithms=[plain, plain]",), r"'plain' appears twice"),
        ("", ("algorithms.x={algorithm: two_stage}",), r"the same trials as algorithms\.plain"),
        ("", ("algorithms.plain.steps=3", "algorithms.plain.config.steps=3"), r"give one"),
        ("", ("seeds=3-1",), r"command line: seeds: the range '3-1' is descending"),
        ("", ("seeds=",), r"seeds is empty"),
        ("", ("datasets=[]",), r"datasets is empty"),
        ("", ("datasets=[nope-v0]",), r"command line: datasets\[0\]: unknown dataset 'nope-v0'"),
        ("", ("datasets=['nope*']",), r"datasets\[0\]: no stored dataset matches 'nope\*'"),
        ("", ("datasets=[3]",), r"datasets\[0\]: expected a dataset's name, got 3"),
        ("", ("datasets={a: 1}",), r"datasets: expected a list"),
        (
            "",
            ("datasets=[hopper-medium-v2, mujoco/hopper/medium-v0]",),
            r"datasets\[1\]: .* already in the list as 'hopper-medium-v2'",
        ),
        ("", ("cases[3].steps=1",), r"cases has 0 entries, counted from 0; '3' is none"),
        ("", ("name=a/b",), r"name: 'a/b' is not a plain name"),
        ("", ("steps.x=3", "config.x=3"), r"unknown key|expected"),
        ("", ("algorithms.plain.evaluation.every=3",), r"plain\.evaluation: unknown key"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_place(
    load: Any, extra: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        load(f"{BASE}{extra}\n", *overrides)


@pytest.mark.parametrize("rate", ["0", "-1"])
def test_a_learning_rate_that_is_not_positive_is_refused(load: Any, rate: str) -> None:
    with pytest.raises(
        SpecError, match=r"config\.student_lr is .*; expected a learning rate above"
    ):
        load(BASE, f"config.student_lr={rate}")
    teacher = f"config={{teacher: {{config: {{lr: {rate}}}}}}}"
    with pytest.raises(SpecError, match=r"config\.teacher\.config\.lr is .*; expected a learning"):
        load(BASE, "algorithms={vdd: {}}", teacher)


@pytest.mark.parametrize("key", ["name", "algorithms", "datasets", "seeds"])
def test_a_missing_key_is_named(load: Any, key: str) -> None:
    lines = {
        "name": "name: n",
        "algorithms": "algorithms: [two_stage]",
        "datasets": "datasets: generated/line-v0",
        "seeds": "seeds: 0",
    }
    load("\n".join(lines.values()))
    del lines[key]
    with pytest.raises(SpecError, match=f"spec.yaml: {key} is missing"):
        load("\n".join(lines.values()))


@pytest.mark.parametrize("text", ["- a", "abc", "3", "a: [", "\t", "a: &x [*x]"])
def test_a_file_that_is_no_experiment_is_refused(load: Any, text: str) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        load(text)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: no such file"):
        load_experiment(tmp_path / "none.yaml", registry=registry)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read as text"):
        load_experiment(tmp_path / "bytes.yaml", registry=registry)
    with pytest.raises(SpecError, match="is a folder; expected a YAML file"):
        load_experiment(tmp_path, registry=registry)


def test_what_is_empty_is_said_to_be(load: Any) -> None:
    for text in ("", "# nothing yet\n", "{}"):
        with pytest.raises(SpecError, match=r"spec\.yaml is empty; an experiment needs name, "):
            load(text)
    with pytest.raises(SpecError, match=r"spec\.yaml: datasets is empty"):
        load("name: n\nalgorithms: [two_stage]\ndatasets: []\nseeds: 0")


def test_all_datasets_that_cannot_be_used_are_named_at_once(load: Any) -> None:
    from harness.datasets import DatasetError

    class Absent(SmallCatalog):
        def digest(self, dataset_id: str) -> str:
            if "generated" in dataset_id:
                raise DatasetError(f"{dataset_id} is not stored")
            return super().digest(dataset_id)

    with pytest.raises(DatasetError, match=r"2 of 3 cannot be used(?s:.*)line-v0(?s:.*)loop-v0"):
        load(BASE, catalog=Absent())


@given(
    steps=st.integers(1, 10**7),
    lr=st.floats(1e-8, 10.0),
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True),
    every=st.integers(1, 10**6),
)
def test_a_value_from_file_or_command_line_is_the_same_trial(
    tmp_path_factory: Any, registry: Registry, steps: int, lr: float, seeds: list[int], every: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    start = "name: n\nalgorithms: [two_stage]\ndatasets: generated/line-v0\n"
    in_file = start + (
        f"seeds: {seeds}\nsteps: {steps}\nconfig: {{student_lr: {lr!r}}}\n"
        f"evaluation: {{every: {every}}}\n"
    )
    overrides = (
        f"seeds={','.join(map(str, seeds))}",
        f"config.steps={steps}",
        f"algorithms.two_stage.config.student_lr={lr!r}",
        f"evaluation.every={every}",
    )
    written = experiment(folder, in_file, registry=registry)
    given_ = experiment(folder, start + "seeds: 1\n", *overrides, registry=registry)
    assert [t.id for t in written.trials] == [t.id for t in given_.trials]
    assume(lr != 0.1)
    assert written.trials[0].config["student_lr"] == lr


# ---------------------------------------------------------------------------------------- the rest


def test_planning_modules_import_nothing_heavy() -> None:
    code = (
        "import sys; import harness.spec, harness.plan, harness.registry, harness.artifacts; "
        "import harness.spool; heavy = 'torch ray pandas minari seaborn omegaconf numpy'.split(); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_experiments_we_ship_fit_the_algorithms_and_the_catalog(path: Path) -> None:
    from harness import datasets

    class WithoutData(SmallCatalog):
        """Our real names; the data themselves need not be on disk."""

        def resolve(self, name: str) -> Any:
            return datasets.resolve(name)

        def match(self, pattern: str) -> list[str]:
            raise AssertionError(f"{pattern!r}: what a glob matches depends on the machine")

        def evaluation_environment(self, dataset_id: str) -> Any:
            from small_catalog import Environment

            return Environment(self.resolve(dataset_id).env_id)

    found = load_experiment(path, (), Registry(), WithoutData())
    assert found.name == path.stem
    assert found.description
    assert {trial.algorithm for trial in found.trials} <= set(Registry().names())


def test_an_experiment_on_real_data_resolves(registry: Registry, monkeypatch: Any) -> None:
    stored = ROOT.parent / "shared" / "data" / "minari"
    if not (stored / "local" / "door" / "human-v0").is_dir():
        pytest.skip(f"needs the datasets in {stored}")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(stored))
    found = load_experiment(
        ROOT / "experiments" / "quickstart.yaml",
        ["datasets=[local/door/human-v0, 'surrogate/*/medium-v0']", "algorithms=[two_stage]"],
        registry,
    )
    by_dataset = {trial.dataset_id: trial for trial in found.trials}
    assert set(by_dataset) == {
        "local/door/human-v0",
        "surrogate/halfcheetah/medium-v0",
        "surrogate/hopper/medium-v0",
    }
    hopper = by_dataset["surrogate/hopper/medium-v0"]
    assert len(hopper.dataset_digest) == 64
    assert hopper.evaluation.environment["env_id"] == "Hopper-v5"
    assert hopper.evaluation.simulator.startswith("mujoco ")


def test_the_default_discount_keeps_old_ids_where_it_ranks_no_episodes():
    assert data_to_dict(DataSpec()) == {
        "reward": "none",
        "truncated_last_step": "drop",
        "top_fraction": 1.0,
        "discount": 0.99,
    }  # what stored runs have
    best = [data_to_dict(DataSpec(top_fraction=0.1, discount=value)) for value in (1.0, 0.99)]
    assert [data["discount"] for data in best] == [1.0, 0.99]
