"""The artifact store: atomic, verified, and indifferent to being killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.artifacts import ArtifactError, ArtifactStore

ID = "a" * 64


def write_two_files(folder: Path) -> None:
    (folder / "state.bin").write_bytes(bytes(range(256)) * 5)
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text('{"row": 1}\n')


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def test_a_published_artifact_is_there_whole_with_its_manifest(store: ArtifactStore) -> None:
    assert not store.has(ID)
    record = store.publish(ID, write_two_files, {"stage": {"name": "policy"}, "run_id": "r-1"})
    store.verify(ID)
    assert store.has(ID)
    assert store.ids() == [ID]
    manifest = store.manifest(ID)
    assert sorted(manifest["files"]) == ["data/rows.jsonl", "state.bin"]
    assert manifest["files"]["state.bin"]["bytes"] == 1280
    assert (record.stage, record.run_id, record.path) == ("policy", "r-1", ID)
    total = sum(path.stat().st_size for path in store.path(ID).rglob("*") if path.is_file())
    assert record.num_bytes == total
    assert dataclasses.asdict(store.record(ID)) == dataclasses.asdict(record)


def test_a_second_publisher_changes_nothing(store: ArtifactStore) -> None:
    first = store.publish(ID, write_two_files, {"stage": "policy"})
    second = store.publish(ID, lambda folder: (folder / "x").write_text("y"), {"stage": "other"})
    assert second == first
    assert not (store.path(ID) / "x").exists()


def test_a_publisher_that_loses_the_race_adopts_the_winner(store: ArtifactStore) -> None:
    def slow(folder: Path) -> None:
        write_two_files(folder)
        store.publish(ID, lambda inner: (inner / "winner").write_text("first"), {})

    record = store.publish(ID, slow, {})
    assert list(store.manifest(ID)["files"]) == ["winner"]
    assert record == store.record(ID)
    assert [path.name for path in store.root.iterdir()] == [ID]


def test_a_failing_writer_leaves_nothing_behind(store: ArtifactStore) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        store.publish(ID, fail, {})
    assert list(store.root.iterdir()) == []


def test_verify_names_the_file_whose_byte_flipped(store: ArtifactStore) -> None:
    store.publish(ID, write_two_files, {"stage": "policy", "note": [1, 2.5, None, "µ"]})
    rng = random.Random(0)
    for path in sorted(store.path(ID).rglob("*")):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        chosen = range(len(whole)) if path.name == "manifest.json" else rng.choices(
            range(len(whole)), k=20
        )  # fmt: skip
        for position in chosen:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(damaged))
            with pytest.raises(ArtifactError, match=path.name):
                store.verify(ID)
        path.write_bytes(whole)
    store.verify(ID)


def test_verify_notices_missing_truncated_and_added_files(store: ArtifactStore) -> None:
    store.publish(ID, write_two_files, {})
    state = store.path(ID) / "state.bin"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    assert not store.has(ID)
    with pytest.raises(ArtifactError, match=r"state\.bin has 1279 bytes, the manifest says 1280"):
        store.verify(ID)
    state.unlink()
    assert not store.has(ID)
    with pytest.raises(ArtifactError, match=r"state\.bin cannot be read"):
        store.verify(ID)
    state.write_bytes(whole)
    (store.path(ID) / "extra").write_text("?")
    with pytest.raises(ArtifactError, match="extra is not in the manifest"):
        store.verify(ID)


def test_a_half_deleted_artifact_is_absent_and_can_be_published_again(store: ArtifactStore) -> None:
    store.publish(ID, write_two_files, {})
    (store.path(ID) / "manifest.json").unlink()
    assert not store.has(ID)
    with pytest.raises(ArtifactError, match="no artifact"):
        store.load_state(ID)
    store.publish(ID, write_two_files, {})
    store.verify(ID)


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a\0b", ".tmp-x", "-x", "a" * 129, "é"]
)
def test_an_id_that_is_no_plain_name_is_refused(store: ArtifactStore, bad: str) -> None:
    for call in (store.path, store.has, store.manifest, store.verify, store.remove):
        with pytest.raises(ValueError, match="not a plain name"):
            call(bad)
    with pytest.raises(ValueError, match="not a plain name"):
        store.publish(bad, write_two_files, {})


def test_links_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(ArtifactError, match="not a regular file"):
        store.publish(ID, lambda folder: (folder / "s").symlink_to(tmp_path / "secret"), {})


def test_a_manifest_that_points_outside_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    import harness.artifacts as module

    store.publish(ID, write_two_files, {})
    (tmp_path / "secret").write_text("x")
    content = {**store.manifest(ID), "files": {"../../secret": {"bytes": 1, "sha256": "0"}}}
    path = store.path(ID) / "manifest.json"
    path.write_bytes(module._manifest_bytes(content))  # with a valid hash of its own
    assert not store.has(ID)
    with pytest.raises(ArtifactError, match="not a plain relative path"):
        store.verify(ID)


def test_reserved_names_and_values_json_cannot_hold_are_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="manifest key 'files'"):
        store.publish(ID, write_two_files, {"files": {}})
    with pytest.raises(ValueError, match=r"manifest: value\.versions"):
        store.publish(ID, write_two_files, {"versions": object()})
    with pytest.raises(ValueError, match="another file name"):
        store.publish(ID, lambda folder: (folder / "manifest.json").write_text("{}"), {})
    with pytest.raises(ArtifactError, match="wrote no file"):
        store.publish(ID, lambda folder: None, {})
    assert list(store.root.iterdir()) == []


def test_remove_and_clean_leave_no_trace(store: ArtifactStore) -> None:
    store.publish(ID, write_two_files, {})
    store.remove(ID)
    store.remove(ID)  # absent already
    killed = store.root / f".tmp-x-{2**22 + 1}-2"  # no process has such a number
    suspended = store.root / f".tmp-x-{os.getpid()}-2"
    killed.mkdir()
    suspended.mkdir()
    assert store.clean() == []  # young: someone may be writing it
    assert store.clean(older_than_s=0.0) == [killed.name]
    assert list(store.root.iterdir()) == [suspended]
    os.utime(suspended, (0, 0))  # older than this process: of another with its number
    assert store.clean() == [suspended.name]


def test_tensors_of_every_kind_survive(store: ArtifactStore) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    state = {
        "float32": base,
        "bfloat16": base.to(torch.bfloat16),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "view": base.t(),  # not contiguous, shares memory
        "slice": base[1:3],
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    store.publish(ID, lambda folder: store.save_state(folder, state), {})
    loaded = store.load_state(ID)
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        ), name


def test_a_damaged_state_is_not_loaded(store: ArtifactStore) -> None:
    torch = pytest.importorskip("torch")
    state = {"weight": torch.ones(8)}
    store.publish(ID, lambda folder: store.save_state(folder, state), {})
    path = store.path(ID) / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"state\.safetensors has sha256"):
        store.load_state(ID)
    with pytest.raises(ArtifactError, match="no file 'other'"):
        store.load_state(ID, "other")


PUBLISH_FOREVER = """
import sys
from pathlib import Path
from harness.artifacts import ArtifactStore

store = ArtifactStore(sys.argv[1])

def write(folder: Path) -> None:
    for index in range(4):
        (folder / f"{index}.bin").write_bytes(bytes([index]) * 30_000)

for number in range(10_000):
    store.publish(f"stage-{number % 40}", write, {"number": number % 40})
    print(number, flush=True)
    if number % 3 == 0:
        store.remove(f"stage-{(number - 7) % 40}")
"""


def test_publishers_killed_at_any_moment_leave_only_whole_artifacts(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    rng = random.Random(1)
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISH_FOREVER, str(store.root)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0.0, 0.12))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        names = [entry.name for entry in store.root.iterdir()]
        published = [name for name in names if not name.startswith(".tmp-")]
        assert published
        assert sorted(published) == store.ids()  # no folder under a final name is incomplete
        for stage_id in published:
            store.verify(stage_id)
    store.clean(older_than_s=0.0)
    assert sorted(entry.name for entry in store.root.iterdir()) == store.ids()


PUBLISH_ONE = """
import json, os, sys, time
from pathlib import Path
from harness.artifacts import ArtifactStore

def write(folder: Path) -> None:
    (folder / "who").write_text(str(os.getpid()))
    while not Path(sys.argv[2]).exists():
        time.sleep(0.001)

record = ArtifactStore(sys.argv[1]).publish(sys.argv[3], write, {"who": os.getpid()})
print(json.dumps([os.getpid(), record.sha256]))
"""


def test_of_many_processes_that_publish_one_id_exactly_one_wins(tmp_path: Path) -> None:
    store, start = ArtifactStore(tmp_path / "artifacts"), tmp_path / "start"
    arguments = [sys.executable, "-c", PUBLISH_ONE, str(store.root), str(start), ID]
    children = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(5)]
    while len(list(store.root.glob(".tmp-*/who"))) < 5:
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    start.touch()  # all five rename at about the same time
    answers = [json.loads(child.communicate(timeout=30)[0]) for child in children]
    assert all(child.returncode == 0 for child in children)
    store.verify(ID)
    winner = int((store.path(ID) / "who").read_text())
    assert winner in [pid for pid, _ in answers]
    assert store.manifest(ID)["who"] == winner
    assert {sha256 for _, sha256 in answers} == {store.record(ID).sha256}
    assert os.listdir(store.root) == [ID]
