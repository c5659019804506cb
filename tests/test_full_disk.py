"""A disk that is really full (a small tmpfs): what was written is whole, and the error is clear."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from harness.artifacts import ArtifactStore
from harness.full_disk import DiskFullError, explained
from harness.spool import Spool
from results.records import EvalRecord
from results.store import Store, StoreError
from tests import inline
from tests.test_store import FAMILY, make_evals

SPEC = """
name: full
algorithms: {bc: {config: {hidden_dim: 32, batch_size: 8}}}
datasets: [generated/bandit2d-v0]
seeds: 0-1
steps: 60
evaluation: {every: 30, episodes: 3}
run: {log_every: 5, checkpoint_every: 10, compile: "off", device: cpu}
"""


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here (it takes root): {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Ballast:
    """Takes the room of a disk except for so many bytes."""

    def __init__(self, disk: Path) -> None:
        self.path = disk / "ballast"

    def leave(self, num_bytes: int) -> None:
        disk = os.statvfs(self.path.parent)
        size = disk.f_bavail * disk.f_frsize - num_bytes
        with self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def away(self) -> None:
        self.path.unlink()


def test_errors_that_are_not_about_room_pass_through(tmp_path):
    with pytest.raises(PermissionError, match="no"), explained(tmp_path):
        raise PermissionError("no")


def test_a_spool_keeps_every_acknowledged_row(small_disk):
    path = small_disk / "work" / "spool.jsonl"
    acknowledged: list[EvalRecord] = []
    with Spool(path) as spool:
        Ballast(small_disk).leave(64 << 10)
        for step in range(10_000):
            rows = make_evals(steps=[step], episodes=20)
            try:
                spool.append(rows)
            except DiskFullError as error:
                refused = str(error)
                break
            acknowledged += rows
        assert str(path) in refused
        assert "Make room" in refused
        assert 10 < step < 10_000
        assert list(spool.records()) == acknowledged
        Ballast(small_disk).away()
        spool.append(rows)  # the same object goes on once there is room
        assert list(spool.records()) == acknowledged + rows


def test_the_database_keeps_every_committed_row(small_disk):
    path = small_disk / "results.db"
    ballast = Ballast(small_disk)
    with Store.open(f"sqlite:///{path}") as store:
        store.append(FAMILY)
        ballast.leave(64 << 10)
        committed: set[int] = set()

        def fill() -> None:
            for step in range(100, 10_000):
                store.append(make_evals(steps=[step], episodes=50))
                committed.add(step)

        with pytest.raises(StoreError, match=f"the disk that holds {path} is full.*make room"):
            fill()
        assert committed
    with Store.open(f"sqlite:///{path}", read_only=True) as store:
        found = store.evaluations()
        assert set(found["step"]) - {10, 20} == committed
        assert (found.groupby("step").size().loc[sorted(committed)] == 50).all()
    ballast.away()
    with Store.open(f"sqlite:///{path}") as store:
        store.append(make_evals(steps=[10_000], episodes=50))


def test_a_database_that_cannot_be_made_says_that_the_disk_is_full(small_disk):
    Ballast(small_disk).leave(48 << 10)
    with pytest.raises(StoreError, match=f"the disk that holds {small_disk}.* is full"):
        Store.open(f"sqlite:///{small_disk / 'results.db'}")


@pytest.mark.parametrize("kind", ["state", "text"])
def test_an_artifact_is_not_there_and_the_one_before_is_whole(small_disk, kind):
    store = ArtifactStore(small_disk / "checkpoints")
    state = {"weight": torch.arange(2**15, dtype=torch.float32)}

    def write(folder: Path) -> None:
        if kind == "state":
            ArtifactStore.save_state(folder, state)
        else:
            (folder / "text").write_bytes(bytes(2**17))

    store.publish("step-1", write, {})
    Ballast(small_disk).leave(32 << 10)
    with pytest.raises(DiskFullError, match=f"no room .* holds {store.path('step-2')}.* Make room"):
        store.publish("step-2", write, {})
    assert store.ids() == ["step-1"]
    assert sorted(path.name for path in store.root.iterdir()) == ["step-1"], "nothing half is left"
    store.verify("step-1")
    Ballast(small_disk).away()
    store.publish("step-2", write, {})


@pytest.mark.slow
@pytest.mark.parametrize("database", ["on it", "elsewhere"])
def test_a_sweep_on_a_disk_that_is_full_again_and_again_ends_like_one_with_room(
    bandit, tmp_path, small_disk, monkeypatch, database
):
    """With a little more room each time it stops somewhere else."""
    spec, whole, home = tmp_path / "full.yaml", tmp_path / "whole", small_disk / "home"
    spec.write_text(SPEC)
    assert inline.sweep(spec, whole).ok
    rows = inline.rows(whole)
    if database == "elsewhere":
        monkeypatch.setenv("HARNESS_DB", f"sqlite:///{tmp_path}/results.db")
    ballast, stopped = Ballast(small_disk), set()
    for kib in range(0, 600, 24):
        ballast.leave(kib << 10)
        try:
            summary = inline.sweep(spec, home)
        except (OSError, StoreError) as error:
            reasons = [str(error)]
        else:
            if summary.ok:
                break
            reasons = list(summary.errors.values())
        for reason in reasons:
            assert any(text in reason for text in ("No space left", "no room left", "is full"))
            assert str(small_disk) in reason
            stopped |= {word for word in ("spool", "checkpoints", "artifacts") if word in reason}
        ballast.away()
    assert summary.ok
    assert database == "on it" or stopped == {"spool", "checkpoints", "artifacts"}
    assert inline.rows(home) == rows
