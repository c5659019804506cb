"""Names of algorithms: found through entry points, checked, and traced to their package."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from small_catalog import PLUGIN

from harness.registry import (
    GROUP,
    RecipeError,
    Registry,
    UnknownAlgorithmError,
    check_hparams,
    hparams_for,
    presets_of,
)
from harness.typed import FieldError

PREAMBLE = """
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from algorithms.api import Make, Recipe, Train

class Learner:
    def sample(self, dataset, rng): ...
    def update(self, batch, rng): ...
    def act(self, obs, rng): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...

class NoPolicy:
    sample = update = state_dict = load_state_dict = Learner.sample

@dataclass(frozen=True)
class Config:
    steps: int = 10
    lr: float = 0.1

def train(c, **changes):
    return Train(**{**dict(name="policy", learner=Learner, config=c, steps=c.steps), **changes})

def make(c, **changes):
    return Make(**{**dict(name="table", function=print, config=c), **changes})

def recipe_of(config=Config, stages=lambda c: (train(c),), name="mine", revision=1, **more):
    return Recipe(name=name, revision=revision, config=config, stages=stages, **more)
"""


def install(folder: Path, package: str, source: str, name: str = "mine") -> None:
    """Puts a distribution with one module and one entry point into a folder."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(PREAMBLE + source)
    info = folder / f"{module}-0.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.5\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:recipe\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of packages on sys.path; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_third_partys_algorithm_is_found_with_its_provenance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))
    registry = Registry()
    assert {"bc", "diffusion_ql", "two_stage"} <= set(registry.names())
    recipe = registry.get("two_stage")
    assert (recipe.name, recipe.revision) == ("two_stage", 3)
    provenance = registry.describe(recipe)
    assert provenance.distribution == "two-stage-plugin"
    assert provenance.version == "1.2"
    assert provenance.module == "two_stage_plugin"
    assert registry.get("two_stage") is recipe


def test_listing_names_imports_neither_torch_nor_an_algorithm() -> None:
    code = (
        "import sys; from harness.registry import Registry; r = Registry(); r.names(); "
        "r.describe('bc'); "
        "heavy = ['torch', 'ray', 'pandas', 'minari', 'omegaconf', 'algorithms.api']; "
        "print(r.names(), [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout
    assert "diffusion_ql" in done.stdout


def test_an_unknown_name_is_a_key_error_with_the_nearest_and_all_names() -> None:
    registry = Registry([metadata.EntryPoint(n, "m:recipe", GROUP) for n in ("bc", "quiet_ql")])
    with pytest.raises(UnknownAlgorithmError) as caught:
        registry.get("quite_ql")
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == (
        "unknown algorithm 'quite_ql'. Did you mean 'quiet_ql'? Known: bc, quiet_ql"
    )
    with pytest.raises(UnknownAlgorithmError, match="pip install"):
        Registry([]).get("bc")


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "first-pack", "recipe = recipe_of()")
    install(site, "second-pack", "recipe = recipe_of()")
    registry = Registry()
    assert "mine" in registry.names()
    with pytest.raises(RecipeError, match=r"first-pack 0\.5 .* and .*second-pack 0\.5|second-pack"):
        registry.get("mine")
    with pytest.raises(RecipeError, match="first-pack"):
        registry.describe("mine")


def test_a_package_seen_twice_on_the_path_is_one_package(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "first-pack", "recipe = recipe_of()")
    again = tmp_path / "again"
    again.mkdir()
    install(again, "first-pack", "recipe = recipe_of()")
    monkeypatch.syspath_prepend(str(again))
    assert Registry().get("mine").name == "mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("recipe = 3", "expected an algorithms.api.Recipe, got int"),
        ("import nothing_like_this", "cannot be imported from .*No module named"),
        ("recipe = recipe_of(name='other')", "named 'other'; the entry point must have the same"),
        ("recipe = recipe_of(revision='1')", "revision is '1'; expected an int"),
        ("recipe = recipe_of(config=dict)", "expected a frozen dataclass"),
        (
            "@dataclass\nclass C:\n    steps: int = 1\nrecipe = recipe_of(config=C)",
            "config C is not frozen",
        ),
        (
            "@dataclass(frozen=True)\nclass C:\n    lr: float\n    steps: int = 1\n"
            "recipe = recipe_of(config=C)",
            "config field 'lr' has no default",
        ),
        (
            "@dataclass(frozen=True)\nclass C:\n    lr: float = 1.0\nrecipe = recipe_of(config=C)",
            "no field 'steps: int'",
        ),
        (
            "@dataclass(frozen=True)\nclass C:\n    steps: float = 1\nrecipe = recipe_of(config=C)",
            "no field 'steps: int'",
        ),
        (
            "@dataclass(frozen=True)\nclass C:\n    steps: int = 1\n"
            "    widths: list = field(default_factory=list)\nrecipe = recipe_of(config=C)",
            "C.widths is annotated list, which cannot be read from a spec",
        ),
        (
            "@dataclass(frozen=True)\nclass C:\n    steps: int = 1\n"
            "    clip: float = float('inf')\nrecipe = recipe_of(config=C)",
            "C.clip: inf is not a finite number. Use null",
        ),
        ("recipe = recipe_of(stages=lambda c: ())", "has no stage"),
        ("recipe = recipe_of(stages=lambda c: c.nothing)", "raised AttributeError: .*nothing"),
        ("recipe = recipe_of(stages=lambda c: (c,))", "neither a Train nor a Make"),
        (
            "recipe = recipe_of(stages=lambda c: (train(c), train(c)))",
            "two stages have this name",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, name='a b'),))",
            "the name must be letters",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (make(c), train(c, needs=('tabel',))))",
            "needs 'tabel', which is no earlier stage. Did you mean 'table'",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c), make(c)))",
            "the last stage 'table' is not a Train",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, per_seed=False),))",
            "must be per seed",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (make(c), make(c, name='b', needs=('table',), "
            "per_seed=False), train(c)))",
            "is shared by all seeds but needs 'table', which differs by seed",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, steps=0),))",
            "steps is 0; expected an int of at least 1, or 0 for a stage that only acts",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, learner=NoPolicy),))",
            "learner NoPolicy of its last stage has no act",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, learner=object),))",
            "learner object has no sample",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (train(c, config={}),))",
            "expected a dataclass instance",
        ),
        (
            "recipe = recipe_of(stages=lambda c: (make(c, function=None), train(c)))",
            "function None cannot be called",
        ),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_with_the_reason(
    site: Path, source: str, message: str
) -> None:
    install(site, "broken-pack", source)
    with pytest.raises(RecipeError, match=message) as caught:
        Registry().get("mine")
    assert "broken-pack 0.5" in str(caught.value)


HPARAMS = """
default: {config: {lr: 0.2}, source: "code, defaults"}
datasets:
  - match: [hopper-medium-v2, "*/hopper/medium-v*"]
    config: {lr: 1, steps: 50}
    data: {reward: normalize}
    source: "code, Table 2"
  - match: "*"
    config: {lr: 0.3}
"""


@pytest.fixture
def with_hparams(site: Path) -> Any:
    def build(text: str) -> Any:
        path = site / "mine.yaml"
        path.write_text(text)
        install(site, "mine-pack", f"recipe = recipe_of(hparams=Path({str(path)!r}))")
        return Registry().get("mine")

    return build


def test_the_first_matching_block_lies_over_the_default(with_hparams: Any) -> None:
    recipe = with_hparams(HPARAMS)
    assert check_hparams(recipe) == 3
    for names in (["hopper-medium-v2"], ["x", "mujoco/hopper/medium-v0"], ["", "Hopper-Medium-v2"]):
        config, data, source = hparams_for(recipe, names)
        assert config == {"lr": 1.0, "steps": 50}
        assert isinstance(config["lr"], float)
        assert data == {"reward": "normalize"}
        assert source == "hopper-medium-v2 (code, Table 2)"
    config, data, source = hparams_for(recipe, ["walker2d-medium-v2"])
    assert (config, data) == ({"lr": 0.3}, {})
    assert source == "*"


PRESETS = """
presets:
  long: {config: {steps: 900}, source: "paper, Table 3"}
  scaled.v2: {data: {reward: none}}
"""


def test_a_preset_lies_over_the_block_of_the_dataset(with_hparams: Any) -> None:
    recipe = with_hparams(HPARAMS + PRESETS)
    assert presets_of(recipe) == {"long": "paper, Table 3", "scaled.v2": ""}
    assert check_hparams(recipe) == 5
    config, data, source = hparams_for(recipe, ["hopper-medium-v2"], "long")
    assert (config, data) == ({"lr": 1.0, "steps": 900}, {"reward": "normalize"})
    assert source == "hopper-medium-v2 + preset long (code, Table 2; paper, Table 3)"
    config, data, source = hparams_for(recipe, ["hopper-medium-v2"], "scaled.v2")
    assert (config, data) == ({"lr": 1.0, "steps": 50}, {"reward": "none"})
    assert source == "hopper-medium-v2 + preset scaled.v2 (code, Table 2)"
    assert hparams_for(recipe, ["x"], "long").source == "* + preset long (paper, Table 3)"


def test_a_preset_needs_no_other_block(with_hparams: Any) -> None:
    config, _, source = hparams_for(with_hparams(PRESETS), ["x"], "long")
    assert (config, source) == ({"steps": 900}, "config defaults + preset long (paper, Table 3)")


def test_an_unknown_preset_is_an_error_with_the_nearest_name(with_hparams: Any) -> None:
    with pytest.raises(FieldError, match=r"preset 'lon' of 'mine'\. Did you mean 'long'\? Known"):
        hparams_for(with_hparams(PRESETS), ["x"], "lon")
    with pytest.raises(FieldError, match=r"unknown preset 'long' of 'td3_bc'.*Known: none"):
        hparams_for(Registry().get("td3_bc"), ["x"], "long")


def test_without_a_file_or_a_block_the_config_defaults_apply(with_hparams: Any) -> None:
    assert hparams_for(with_hparams("datasets: []"), ["x"]) == ({}, {}, "config defaults")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {}", "mine.yaml: defaults: unknown key 'defaults'. Did you mean 'default'"),
        ("default: {config: {lrr: 1}}", "mine.yaml: default.config.lrr: .*Did you mean 'lr'"),
        ("default: {config: {lr: high}}", "default.config.lr: expected float, got 'high'"),
        ("default: {config: {lr: .nan}}", "default.config.lr: nan is not a finite number"),
        ("default: {match: [x]}", "default.match: unknown key"),
        ("default: {data: {rewards: none}}", "default.data.rewards: .*Did you mean 'reward'"),
        ("default: {source: 3}", "default.source: expected text, got 3"),
        ("datasets: {a: 1}", "datasets: expected a list"),
        ("datasets: [{config: {lr: 1}}]", r"datasets\[0\].match: expected one or more names"),
        ("datasets: [{match: x, confg: {}}]", r"datasets\[0\].confg: .*Did you mean 'config'"),
        ("default: {config: {lr: 1, lr: 2}}", "not valid YAML: .*duplicate key lr"),
        ("default: {config: {steps: 1.5}}", "default.config.steps: expected int, got 1.5"),
        ("default: {config: {steps: true}}", "default.config.steps: expected int, got True"),
        ("presets: [a]", "presets: expected a mapping"),
        ("presets: {a: {config: {lrr: 1}}}", "mine.yaml: presets.a.config.lrr: .*Did you mean"),
        ("presets: {a: {match: x}}", "presets.a.match: unknown key"),
        ("presets: {'a b': {}}", "presets.a b: the name must be letters"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_that_names_the_place(
    with_hparams: Any, text: str, message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        hparams_for(with_hparams(text), ["x"])


def test_a_missing_file_is_an_error(site: Path) -> None:
    install(site, "mine-pack", "recipe = recipe_of(hparams=Path('/nowhere/mine.yaml'))")
    with pytest.raises(FieldError, match=r"/nowhere/mine\.yaml: hyperparameters of 'mine' cannot"):
        hparams_for(Registry().get("mine"), ["x"])


@pytest.mark.parametrize("name", ["bc", "diffusion_ql", "idql"])
def test_our_own_hyperparameter_files_are_valid(name: str) -> None:
    assert check_hparams(Registry().get(name)) >= 1
