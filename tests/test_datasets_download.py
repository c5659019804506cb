"""Downloads: once for many askers, complete or invisible. The remote is a real mirror folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from harness import datasets
from harness.datasets import DatasetError, digest, fetching, load_raw
from harness.datasets.writing import write_dataset

NAME = "D4RL/pen/human-v2"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror with one dataset under a published id; the local store is empty."""
    folder = tmp_path / "mirror"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations=rng.normal(size=(201, 45)),
            actions=rng.uniform(-1, 1, (200, 24)).astype(np.float32),
            rewards=rng.normal(size=200),
            terminations=np.zeros(200, bool),
            truncations=np.arange(200) == 199,
        )
        for _ in range(20)
    ]
    write_dataset(
        NAME,
        episodes,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (45,), np.float64),
        action_space=gym.spaces.Box(-1.0, 1.0, (24,), np.float32),
    )
    (folder / NAME / "harness_digest.json").unlink()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return folder


def test_a_download_is_complete_and_recorded(mirror: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    folder = datasets.download("pen-human-v1", f"file://{mirror}", lambda *a: seen.append(a))
    assert load_raw(NAME).num_steps == 4000
    assert (folder / "harness_digest.json").is_file()
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    import minari

    assert minari.load_dataset(NAME).total_steps == 4000
    assert datasets.local.stored_ids() == [NAME]


def test_minaris_remote_variable_is_honoured(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_REMOTE", f"file://{mirror}")
    datasets.download(NAME)
    assert load_raw(NAME).num_episodes == 20


def ask(mirror: str, log: str, barrier: object) -> None:
    original = fetching._fetch

    def counted(*arguments: object) -> int | None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)  # long enough for all to be waiting
        return original(*arguments)

    fetching._fetch = counted
    barrier.wait()
    folder = datasets.download(NAME, f"file://{mirror}")
    assert (folder / "data" / "metadata.json").is_file()
    digest(NAME)


def test_thirty_two_processes_asking_at_once_make_one_download(
    mirror: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(32)
    log = tmp_path / "fetches"
    workers = [
        context.Process(target=ask, args=(str(mirror), str(log), barrier)) for _ in range(32)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 32
    assert len(log.read_text().splitlines()) == 1


def fetch_slowly(mirror: str, half_way: object) -> None:
    def progress(done: int, total: int | None) -> None:
        half_way.set()
        time.sleep(60)

    datasets.download(NAME, f"file://{mirror}", progress)


def test_a_killed_download_leaves_nothing_loadable_and_can_be_repeated(
    mirror: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    half_way = context.Event()
    worker = context.Process(target=fetch_slowly, args=(str(mirror), half_way))
    worker.start()
    assert half_way.wait(30)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    store = tmp_path / "store"
    assert list(store.glob(".download-*"))  # it was really interrupted
    assert datasets.local.stored_ids() == []
    with pytest.raises(DatasetError, match="harness data download"):
        load_raw(NAME)
    import minari

    assert minari.list_local_datasets() == {}
    datasets.download(NAME, f"file://{mirror}")
    assert load_raw(NAME).num_steps == 4000
    assert not list(store.glob(".download-*"))


@pytest.mark.parametrize("cut", [0, 2000, -5000])
def test_an_incomplete_copy_at_the_remote_is_refused(mirror: Path, cut: int) -> None:
    path = mirror / NAME / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DatasetError, match="damaged or incomplete"):
        datasets.download(NAME, f"file://{mirror}")
    assert datasets.local.stored_ids() == []
    assert not list((mirror.parent / "store").glob(".download-*"))


def test_what_is_here_already_is_not_fetched_again(mirror: Path) -> None:
    datasets.download(NAME, f"file://{mirror}")
    assert datasets.download(NAME, "file:///nowhere").is_dir()


def test_errors_say_what_cannot_be_fetched_and_what_to_do(mirror: Path) -> None:
    with pytest.raises(DatasetError, match="not in the mirror"):
        datasets.download("D4RL/door/human-v2", f"file://{mirror}")
    with pytest.raises(DatasetError, match="cannot be downloaded from hf://farama-minari"):
        datasets.download("D4RL/door/human-v2")  # HF_HUB_OFFLINE
    with pytest.raises(DatasetError, match="harness data import"):
        datasets.download("hopper-medium-replay-v2")
    with pytest.raises(DatasetError, match="harness data make"):
        datasets.download("generated/bandit2d-v0")
    with pytest.raises(DatasetError, match="malformed"):
        datasets.download("../../x-v0")
