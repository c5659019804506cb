"""Names, relations and reference scores: never a guess, never mixed silently."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import datasets
from harness.datasets import DatasetError, UnknownDatasetError, catalog, local
from results.published import reference_scores


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def put_metadata(root: Path, dataset_id: str, **extra: object) -> None:
    """Enough of a dataset for names to be resolved against."""
    folder = root / dataset_id / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"dataset_id": dataset_id, **extra}))


def test_a_gym_name_resolves_to_different_data_without_d4rls_constants() -> None:
    entry = datasets.resolve("hopper-medium-v2")
    assert (entry.id, entry.relation) == ("mujoco/hopper/simple-v0", "different")
    assert (entry.requested, entry.legacy_id) == ("hopper-medium-v2", "hopper-medium-v2")
    assert entry.ref_min is None
    assert entry.note


def test_an_imported_original_is_preferred_and_scored_with_d4rls_constants(
    empty_store: Path,
) -> None:
    put_metadata(empty_store, "d4rl-original/hopper-medium-v2")
    entry = datasets.resolve("hopper-medium-v2")
    assert (entry.id, entry.relation) == ("d4rl-original/hopper-medium-v2", "original")
    assert (entry.ref_min, entry.ref_max) == (-20.272305, 3234.3)
    assert entry.ref_source == "D4RL constants (hopper-medium-v2)"
    assert entry.env_id == "Hopper-v4"


@pytest.mark.parametrize(
    ("name", "dataset_id", "references"),
    [
        ("antmaze-umaze-v0", "D4RL/antmaze/umaze-v1", (0.0, 1.0)),
        ("antmaze-large-diverse-v2", "D4RL/antmaze/large-diverse-v1", (0.0, 1.0)),
        ("pen-human-v1", "D4RL/pen/human-v2", (96.262799, 3076.833102)),
        ("kitchen-partial-v0", "D4RL/kitchen/partial-v2", (0.0, 4.0)),
        ("door-cloned-v0", "D4RL/door/cloned-v2", (-56.512833, 2880.569309)),
    ],
)
def test_regenerated_sets_keep_d4rls_constants_by_name(
    name: str, dataset_id: str, references: tuple[float, float]
) -> None:
    for asked in (name, dataset_id):
        entry = datasets.resolve(asked)
        assert (entry.id, entry.relation) == (dataset_id, "regenerated")
        assert (entry.ref_min, entry.ref_max) == pytest.approx(references, abs=1e-5)
        assert entry.ref_source.startswith("D4RL constants (")


def test_maze2d_is_different_and_scored_with_local_anchors() -> None:
    entry = datasets.resolve("maze2d-umaze-v1")
    assert (entry.id, entry.relation) == ("D4RL/pointmaze/umaze-v2", "different")
    assert (entry.ref_min, entry.ref_max) == (8.65, 219.30)
    assert entry.ref_source.startswith("local anchors")


def test_metadata_of_different_data_never_supplies_d4rls_constants(empty_store: Path) -> None:
    put_metadata(
        empty_store, "mujoco/hopper/simple-v0", ref_min_score=-20.272305, ref_max_score=3234.3
    )
    assert datasets.resolve("hopper-medium-v2").ref_min is None


def test_references_of_a_local_set_are_named_by_their_source(empty_store: Path) -> None:
    put_metadata(empty_store, "mine/walk-v0", ref_min_score=1.629008, ref_max_score=4592.3)
    put_metadata(empty_store, "mine/other-v0", ref_min_score=1.0, ref_max_score=3.0)
    put_metadata(empty_store, "mine/none-v0", ref_max_score=3.0)
    assert datasets.resolve("mine/walk-v0").ref_source == (
        "dataset metadata (D4RL's values for walker2d)"
    )
    assert datasets.resolve("mine/other-v0").ref_source == "dataset metadata"
    assert datasets.resolve("mine/none-v0").ref_source == ""


def test_normalized_score_is_the_fraction_between_the_references(empty_store: Path) -> None:
    put_metadata(empty_store, "mine/other-v0", ref_min_score=1.0, ref_max_score=3.0)
    entry = datasets.resolve("mine/other-v0")
    np.testing.assert_allclose(
        entry.normalized_score(np.array([1.0, 2.0, 3.0, 5.0])), [0.0, 0.5, 1.0, 2.0]
    )


def test_a_score_without_references_is_refused_not_guessed() -> None:
    with pytest.raises(DatasetError, match="no reference scores"):
        datasets.resolve("mujoco/hopper/medium-v0").normalized_score(100.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("D4RL/pen/humans-v2", "D4RL/pen/human-v2"),
        ("hopper-medium", "hopper-medium-v2"),
        ("generated/bandit-v0", "generated/bandit2d-v0"),
    ],
)
def test_an_unknown_name_gets_near_matches(name: str, hint: str) -> None:
    with pytest.raises(UnknownDatasetError, match=r"[dD]id you mean") as error:
        datasets.resolve(name)
    assert hint in str(error.value)
    assert isinstance(error.value, KeyError)


def test_a_near_match_that_is_stored_and_can_be_made_is_named_once(empty_store: Path) -> None:
    put_metadata(empty_store, "generated/bandit2d-v0")
    with pytest.raises(UnknownDatasetError, match=r"Did you mean 'generated/bandit2d-v0'[ ?]") as e:
        datasets.resolve("generated/bandit2-v0")
    assert str(e.value).partition(" Stored")[0].count("bandit2d") == 1


@pytest.mark.parametrize(
    "name", ["../secret-v0", "/etc/passwd", "a/../../b-v0", "a//b-v0", "", "a\\b-v0", "x-v0\n"]
)
def test_an_id_cannot_leave_the_store(name: str) -> None:
    with pytest.raises(DatasetError, match="malformed"):
        datasets.resolve(name)
    with pytest.raises(DatasetError):
        local.folder(name)


def test_match_globs_over_stored_ids_then_over_aliases(empty_store: Path) -> None:
    for name in ("mine/hopper/medium-v0", "mine/walker/medium-v0", "mine/hopper/expert-v0"):
        put_metadata(empty_store, name)
    put_metadata(empty_store, "d4rl-original/hopper-medium-v2")
    assert datasets.match("mine/*/medium-v0") == ["mine/hopper/medium-v0", "mine/walker/medium-v0"]
    assert datasets.match("hopper-medium-v*") == ["hopper-medium-v2"]
    assert datasets.match("antmaze-umaze-v0") == ["antmaze-umaze-v0"]
    with pytest.raises(UnknownDatasetError, match="mine/hopper/medium-v0"):
        datasets.match("nothing/*")


def test_hidden_and_unfinished_folders_are_not_datasets(empty_store: Path) -> None:
    put_metadata(empty_store, ".download-x/mine/half-v0")
    (empty_store / "mine" / "empty-v0" / "data").mkdir(parents=True)
    assert local.stored_ids() == []


def test_every_d4rl_constant_has_a_name_that_resolves() -> None:
    assert set(catalog.legacy_ids()) == set(reference_scores())
    for name in catalog.legacy_ids():
        entry = datasets.resolve(name)
        assert entry.requested == name
        if entry.relation == "different":
            assert "D4RL constants" not in entry.ref_source
        else:
            assert (entry.ref_min, entry.ref_max) == reference_scores()[name]


def test_every_alias_points_at_a_published_dataset() -> None:
    published = set(catalog.published_ids())
    assert len(published) > 300
    for name in catalog.legacy_ids():
        entry = datasets.resolve(name)
        assert entry.relation == "original" or entry.id in published


def test_command_line_modules_import_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, harness.datasets, harness.cli.data\n"
        "bad = {'torch', 'minari', 'pandas', 'h5py', 'gymnasium'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
