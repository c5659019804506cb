"""Files from strangers: what holds code is refused and does not run, what points outside too."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from harness.artifacts import STATE, ArtifactError, ArtifactStore, _manifest_bytes
from harness.cli import app, exit_code
from harness.spec import SpecError, load_experiment
from results import archive
from results.errors import StoreError
from results.store import Store
from tests.test_store import FAMILY

TAGS = (
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:os.system ['touch {}']",
    "!!python/name:os.system",
    "!!python/module:os",
)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_checkpoint_is_refused_also_with_its_own_hash(tmp_path, how):
    """Whoever exchanges the file can exchange the manifest as well."""
    trap = tmp_path / "trap"

    def write(folder: Path) -> None:
        if how == "pickle":
            (folder / STATE).write_bytes(pickle.dumps(Evil(trap)))
        else:
            torch.save({"weight": Evil(trap)}, folder / STATE)

    store = ArtifactStore(tmp_path / "artifacts")
    store.publish("stage", write, {})
    store.verify("stage")  # the hash is right
    with pytest.raises(ArtifactError, match="is not a safetensors file"):
        store.load_state("stage")
    assert not trap.exists()


def test_a_file_that_a_manifest_places_outside_is_refused(tmp_path):
    store = ArtifactStore(tmp_path / "artifacts")
    store.publish("stage", lambda folder: (folder / "text").write_text("x"), {})
    manifest = store.manifest("stage")
    for name in ("../../outside", "/etc/passwd", "a/../../outside"):
        content = {**manifest, "files": {name: {"bytes": 1, "sha256": "0"}}}
        content.pop("self_sha256")
        (store.path("stage") / "manifest.json").write_bytes(_manifest_bytes(content))
        with pytest.raises(ArtifactError, match="not a plain relative path"):
            store.load_state("stage", name)


@pytest.mark.parametrize("tag", TAGS)
def test_a_spec_with_a_python_tag_is_refused_and_runs_nothing(tmp_path, tag):
    trap, path = tmp_path / "trap", tmp_path / "spec.yaml"
    tag = tag.format(trap)
    path.write_text(f"name: x\nalgorithms: [bc]\ndatasets: [{json.dumps('a-v0')}]\nseeds: {tag}\n")
    with pytest.raises(SpecError, match=r"spec\.yaml: not valid YAML: .*tag"):
        load_experiment(path, [])
    path.write_text("name: x\nalgorithms: [bc]\ndatasets: [a-v0]\nseeds: 0\n")
    with pytest.raises(SpecError, match=r"not valid YAML: .*tag"):
        load_experiment(path, [f"seeds={tag}"])
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../../x-v0", "/etc/passwd", "a/../../b-v0", "x-v0/../y-v0"])
def test_a_dataset_id_that_leaves_the_store_is_refused_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"name: x\nalgorithms: [bc]\ndatasets: [{name}]\nseeds: 0\n")
    for arguments in (
        ["data", "card", name],
        ["data", "verify", name],
        ["data", "download", name],
        ["data", "import", str(spec), "--id", name],
        ["sweep", str(spec), "--dry-run"],
    ):
        result = CliRunner().invoke(app, arguments)
        error = result.exception
        assert error is not None
        code = result.exit_code if isinstance(error, SystemExit) else exit_code(error)
        assert code == 2, (arguments, error)
        assert repr(name) in result.output + str(error)
    assert not (tmp_path / "data").exists()


def test_an_archive_of_results_holds_rows_and_nothing_else(tmp_path):
    """Parquet with JSON: a pickle in its place, or a record of another kind, is refused."""
    trap, path = tmp_path / "trap", tmp_path / "rows.parquet"
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(StoreError, match=r"rows\.parquet: not an archive"):
        archive.open_archive(path)
    with Store.open("sqlite://") as store:
        store.append(FAMILY)
        archive.write(store, path)
    import pyarrow as pa

    for kind, record, message in (
        ("Evil", "{}", "unknown kind of record 'Evil'"),
        ("RunRecord", "not json", "RunRecord"),
        ("RunRecord", "[]", "RunRecord"),
    ):
        archive.save_table(pa.table({"kind": [kind], "record": [record]}), path)
        with pytest.raises(StoreError, match=message):
            archive.open_archive(path)
    assert not trap.exists()
