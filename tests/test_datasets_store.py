"""Reading, checking and hashing stored datasets; damage becomes one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector.episode_buffer import EpisodeBuffer

from harness import datasets
from harness.datasets import DatasetError, digest, load_raw, record, verify, verify_files
from harness.datasets.minari import FLAT_FILE, RawDataset
from harness.datasets.record import DIGEST_FILE
from harness.datasets.writing import write_dataset

REAL = Path(__file__).parents[2] / "shared" / "data" / "minari"
needs_real_data = pytest.mark.skipif(
    not (REAL / "surrogate").is_dir(), reason="the reference datasets are not on this machine"
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def episode(
    steps: int, seed: int = 0, end: str = "truncated", obs: Any = None, **changes: Any
) -> EpisodeBuffer:
    rng = np.random.default_rng(seed)
    flags = {"terminated": np.zeros(steps, bool), "truncated": np.zeros(steps, bool)}
    if end in flags:
        flags[end][-1] = True
    parts = {
        "observations": rng.normal(size=(steps + 1, 3)) if obs is None else obs,
        "actions": rng.uniform(-1, 1, size=(steps, 2)).astype(np.float32),
        "rewards": rng.normal(size=steps),
        "terminations": flags["terminated"],
        "truncations": flags["truncated"],
    }
    return EpisodeBuffer(**{**parts, **changes})


def write(
    dataset_id: str = "tiny/a-v0", episodes: list[EpisodeBuffer] | None = None, **more: Any
) -> RawDataset:
    arguments = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "action_space": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
    }
    episodes = episodes or [episode(4, 0), episode(3, 1, "terminated"), episode(5, 2)]
    return write_dataset(dataset_id, episodes, **{**arguments, **more})


def data_file(store: Path, dataset_id: str = "tiny/a-v0") -> Path:
    return store / dataset_id / "data" / "main_data.hdf5"


def edit(store: Path, change: Callable[[Any], None]) -> None:
    """Changes the stored data behind the harness' back, and forgets what was recorded."""
    with h5py.File(data_file(store), "a") as file:
        change(file)
    (store / "tiny/a-v0" / DIGEST_FILE).unlink()


def test_what_is_written_is_what_is_read_by_us_and_by_minari() -> None:
    import minari

    episodes = [episode(4, 0), episode(1, 1, "terminated"), episode(5, 2)]
    raw = write(episodes=episodes)
    for read in (raw, load_raw("tiny/a-v0")):
        np.testing.assert_array_equal(read.lengths, [4, 1, 5])
        expected = np.concatenate([e.observations for e in episodes]).astype(np.float32)
        np.testing.assert_array_equal(read.obs, expected)
        np.testing.assert_array_equal(read.reward, np.concatenate([e.rewards for e in episodes]))
        np.testing.assert_array_equal(np.flatnonzero(read.terminated), [4])
        np.testing.assert_array_equal(np.flatnonzero(read.truncated), [3, 9])
    dataset = minari.load_dataset("tiny/a-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 10)
    for ours, theirs in zip(episodes, dataset.iterate_episodes(), strict=True):
        np.testing.assert_array_equal(ours.observations, theirs.observations)
        np.testing.assert_array_equal(ours.actions, theirs.actions)


def test_returns_equal_a_loop_over_episodes() -> None:
    episodes = [episode(4, 0), episode(1, 1), episode(5, 2)]
    raw = write(episodes=episodes)
    for discount in (1.0, 0.9):
        slow = [sum(discount**t * r for t, r in enumerate(e.rewards)) for e in episodes]
        np.testing.assert_allclose(raw.returns(discount), slow, rtol=1e-12)


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_every_format_minari_reads_has_the_same_content_and_digest(data_format: str) -> None:
    first = write("tiny/hdf5-v0")
    second = write("tiny/other-v0", data_format=data_format)
    np.testing.assert_array_equal(first.obs, second.obs)
    np.testing.assert_array_equal(first.action, second.action)
    assert first.digest == second.digest == digest("tiny/other-v0")
    verify("tiny/other-v0")


def test_nested_observations_are_flattened_by_sorted_keys() -> None:
    rng = np.random.default_rng(0)
    goal, kettle, microwave, state = (rng.normal(size=(4, n)) for n in (2, 3, 1, 2))
    space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "desired_goal": gym.spaces.Dict(
                {
                    "microwave": gym.spaces.Box(-np.inf, np.inf, (1,), np.float64),
                    "kettle": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
                }
            ),
            "achieved_goal": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        }
    )
    nested = {
        "observation": state,
        "desired_goal": {"microwave": microwave, "kettle": kettle},
        "achieved_goal": goal,
    }
    for data_format in ("hdf5", "arrow"):
        raw = write(
            f"tiny/{data_format}-v0",
            [episode(3, obs=nested)],
            observation_space=space,
            data_format=data_format,
        )
        expected = np.concatenate([goal, kettle, microwave, state], axis=1).astype(np.float32)
        np.testing.assert_array_equal(raw.obs, expected)
        assert [leaf.name for leaf in raw.leaves] == [
            "achieved_goal",
            "desired_goal/kettle",
            "desired_goal/microwave",
            "observation",
        ]


@given(seed=st.integers(0, 2**16), where=st.sampled_from(["obs", "action", "reward", "border"]))
@settings(max_examples=12, deadline=None)
def test_the_digest_changes_with_any_content(seed: int, where: str) -> None:
    from harness.datasets.minari import _content_digest, _Stored

    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(9, 3)),
        "actions": rng.normal(size=(7, 2)).astype(np.float32),
        "rewards": rng.normal(size=7),
    }
    lengths = np.array([3, 4])
    before = _content_digest(_Stored(arrays, lengths), {})
    assert before == _content_digest(_Stored({k: v.copy() for k, v in arrays.items()}, lengths), {})
    if where == "border":
        lengths = np.array([4, 3])
    else:
        name = {"obs": "observations", "action": "actions", "reward": "rewards"}[where]
        flat = arrays[name].view(np.uint8).reshape(-1)
        flat[rng.integers(len(flat))] ^= 1 << rng.integers(8)
    assert before != _content_digest(_Stored(arrays, lengths), {})


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("part", ["observations", "actions", "rewards", "infos/x"])
def test_one_flipped_byte_in_stored_data_is_found(
    store: Path, part: str, compression: str | None
) -> None:
    infos = {"x": np.arange(500.0)}
    write(episodes=[episode(499, infos=infos, obs=np.random.default_rng(0).normal(size=(500, 3)))])
    path = data_file(store)
    if compression:  # as users' files often are
        recompressed = path.with_suffix(".new")
        with h5py.File(path) as old, h5py.File(recompressed, "w") as new:
            group = new.create_group("episode_0")
            group.attrs.update(old["episode_0"].attrs)
            names: list[str] = []
            old["episode_0"].visititems(
                lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
            )
            for name in names:
                group.create_dataset(
                    name, data=old["episode_0"][name][()], compression="gzip", shuffle=True
                )
        recompressed.replace(path)
        verify("tiny/a-v0", accept=True)
    with h5py.File(path) as file:
        low = file[f"episode_0/{part}"].id
        begin = low.get_chunk_info(0).byte_offset if compression else low.get_offset()
        size = low.get_chunk_info(0).size if compression else low.get_storage_size()
    verify("tiny/a-v0")
    content = bytearray(path.read_bytes())
    content[begin + size // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="has changed since it was recorded"):
        verify("tiny/a-v0")
    if part != "infos/x":  # what is trained on is checked at every load as well
        with pytest.raises(DatasetError, match=r"digest|cannot be read"):
            load_raw("tiny/a-v0")
        with pytest.raises(DatasetError, match=r"digest|cannot be read"):
            digest("tiny/a-v0")


def test_damage_that_is_older_than_the_record_of_times_is_still_found(store: Path) -> None:
    write()
    path = data_file(store)
    before = path.stat()
    with h5py.File(path, "a") as file:
        file["episode_1/rewards"][0] += 1.0
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DatasetError, match="has changed since it was recorded"):
        verify("tiny/a-v0")
    with pytest.raises(DatasetError, match="digest"):
        load_raw("tiny/a-v0")


def test_only_files_that_somebody_wrote_to_are_hashed_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if size and mtime are as they were; and `verify` reads everything each time."""
    write()
    path, read, file_digest = data_file(store), [], hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return file_digest(file, name)

    def hashed(check: Callable[[str], None]) -> list[str]:
        read.clear()
        check("tiny/a-v0")
        return sorted(read)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    both = ["main_data.hdf5", "metadata.json"]
    assert hashed(verify_files) == hashed(verify_files) == both, "too new to be trusted"
    monkeypatch.setattr(record, "SETTLED_NS", 0)
    time.sleep(0.05)  # more than one tick of the file system's clock
    assert hashed(verify_files) == both
    assert hashed(verify_files) == []
    assert set(both) <= set(hashed(verify))
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DatasetError, match=r"main_data\.hdf5 has changed since it was recorded"):
        verify_files("tiny/a-v0")
    path.write_bytes(content)
    assert hashed(verify_files) == both[:1]
    shutil.copytree(store / "tiny/a-v0", store / "tiny/b-v0")
    assert hashed(lambda _: record.file_hashes(store / "tiny/b-v0")) == both, "another file"


def test_a_copied_dataset_keeps_its_digest(store: Path) -> None:
    first = write().digest
    shutil.copytree(store / "tiny", store / "copies")
    metadata = store / "copies/a-v0/data/metadata.json"
    metadata.write_text(metadata.read_text().replace("tiny/a-v0", "copies/a-v0"))
    assert digest("copies/a-v0") == first
    shutil.copy(store / "tiny/a-v0" / DIGEST_FILE, store / "copies/a-v0" / DIGEST_FILE)
    with pytest.raises(DatasetError, match=r"metadata\.json"):  # its id was edited
        verify("copies/a-v0")
    verify("copies/a-v0", accept=True)
    verify("copies/a-v0")


def test_a_read_only_store_keeps_its_record_in_the_users_cache(store: Path, tmp_path: Path) -> None:
    first = write().digest
    folder = store / "tiny/a-v0"
    (folder / DIGEST_FILE).unlink()
    folder.chmod(0o555)
    try:
        assert digest("tiny/a-v0") == first
        assert not (folder / DIGEST_FILE).exists()
        assert list((tmp_path / "cache").rglob("*.json"))
    finally:
        folder.chmod(0o755)


def test_a_slow_dataset_gets_a_flat_copy_that_cannot_lie(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.datasets.minari._SLOW_READ_S", 0.0)
    write()
    flat = store / "tiny/a-v0" / FLAT_FILE
    assert flat.is_file()
    expected = load_raw("tiny/a-v0")
    with np.load(flat) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["rewards"] = arrays["rewards"] + 1.0
    np.savez(flat, **arrays)
    np.testing.assert_array_equal(load_raw("tiny/a-v0").reward, expected.reward)
    flat.write_bytes(b"not an archive")
    np.testing.assert_array_equal(load_raw("tiny/a-v0").reward, expected.reward)
    write(overwrite=True, episodes=[episode(2, 9)])
    assert load_raw("tiny/a-v0").num_steps == 2


def test_an_episode_without_an_end_counts_as_truncated() -> None:
    raw = write(episodes=[episode(3, end="none"), episode(2)])
    np.testing.assert_array_equal(np.flatnonzero(raw.truncated), [2, 4])
    assert raw.unflagged_ends == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["episode_1/observations"].__setitem__((2, 1), np.nan), "observations.*nan"),
        (lambda f: f["episode_1/rewards"].__setitem__(0, np.inf), "rewards of episode 1.*inf"),
        (lambda f: f["episode_2/actions"].__setitem__((3, 0), 1.5), r"actions of episode 2 .*1\.5"),
        (lambda f: f["episode_0/truncations"].__setitem__(1, True), "goes on after step 1"),
        (lambda f: f.__delitem__("episode_2"), "holds 2 episodes, metadata.json says 3"),
        (lambda f: f.__delitem__("episode_1/actions"), "cannot be read"),
        (lambda f: f.move("episode_1/rewards", "episode_1/reward"), "cannot be read"),
    ],
)
def test_bad_content_is_named(store: Path, change: Callable[[Any], None], message: str) -> None:
    write()
    edit(store, change)
    with pytest.raises(DatasetError, match=message) as error:
        load_raw("tiny/a-v0")
    assert "tiny/a-v0" in str(error.value)


def test_actions_within_rounding_of_the_bounds_pass(store: Path) -> None:
    write()
    edit(store, lambda f: f["episode_0/actions"].__setitem__((0, 0), np.float32(1.00001)))
    assert load_raw("tiny/a-v0").action[0, 0] == np.float32(1.00001)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("observations", np.zeros((4, 2)), "rows of shape"),
        ("observations", np.zeros((5, 3)), "expected 4 rows"),
        ("actions", np.zeros((3, 3), np.float32), "actions has rows of shape"),
        ("rewards", np.zeros((3, 1)), "rewards has rows of shape"),
    ],
)
def test_wrong_shapes_are_named(name: str, value: np.ndarray, message: str, store: Path) -> None:
    write(episodes=[episode(3)])

    def replace(file: Any) -> None:
        del file[f"episode_0/{name}"]
        file[f"episode_0/{name}"] = value

    edit(store, replace)
    with pytest.raises(DatasetError, match=message):
        load_raw("tiny/a-v0")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.97])
def test_a_truncated_file_is_one_clear_error(store: Path, keep: float) -> None:
    write()
    path = data_file(store)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    for function in (load_raw, verify, digest):
        with pytest.raises(DatasetError, match="tiny/a-v0"):
            function("tiny/a-v0")


def test_missing_and_damaged_metadata_are_clear_errors(store: Path) -> None:
    with pytest.raises(DatasetError, match="unknown dataset"):
        load_raw("tiny/a-v0")
    with pytest.raises(DatasetError, match="harness data download"):
        load_raw("mujoco/hopper/medium-v0")
    write()
    path = store / "tiny/a-v0/data/metadata.json"
    good = path.read_text()
    for text, message in (
        ("{", "cannot be read"),
        (good.replace("tiny/a-v0", "tiny/b-v0"), "expected 'tiny/a-v0' from its place"),
        (good.replace('"total_steps": 12', '"total_steps": 13'), "12 steps, metadata.json says"),
        (good.replace('"total_episodes": 3', '"total_episodes": 0'), "empty"),
    ):
        path.write_text(text)
        (store / "tiny/a-v0" / DIGEST_FILE).unlink(missing_ok=True)
        with pytest.raises(DatasetError, match=message):
            load_raw("tiny/a-v0")


def test_discrete_actions_and_text_observations_are_refused() -> None:
    with pytest.raises(DatasetError, match="Discrete"):
        write(
            episodes=[episode(2, actions=np.zeros(2, np.int64))],
            action_space=gym.spaces.Discrete(3),
        )
    assert not datasets.local.stored_ids()
    with pytest.raises(DatasetError, match="Text"):
        write(observation_space=gym.spaces.Text(5))


def test_nothing_invalid_can_be_written(store: Path) -> None:
    with pytest.raises(DatasetError, match="nan"):
        write(episodes=[episode(2, rewards=np.array([0.0, np.nan]))])
    with pytest.raises(DatasetError, match="malformed"):
        write("../outside-v0")
    write()
    with pytest.raises(DatasetError, match="already exists"):
        write()
    assert datasets.local.stored_ids() == ["tiny/a-v0"]
    assert not list(store.glob(".partial-*"))


def test_the_card_counts_what_a_brute_force_count_counts() -> None:
    import json as json_module

    raw = write(
        episodes=[episode(4, 0), episode(3, 1, "terminated"), episode(5, 2)],
        ref_min_score=0.0,
        ref_max_score=2.0,
        env="Pendulum-v1",
    )
    card = datasets.card("tiny/a-v0")
    json_module.dumps(card)
    assert (card["episodes"], card["steps"]) == (3, 12)
    assert (card["terminations"], card["truncations"]) == (1, 2)
    assert (card["dropped_by_default"], card["transitions_by_default"]) == (2, 10)
    assert card["returns"]["max"] == pytest.approx(raw.returns().max())
    assert card["normalized_mean_return"] == pytest.approx(raw.returns().mean() / 2.0)
    assert card["ref_source"] == "dataset metadata"
    assert card["digest"] == raw.digest


@needs_real_data
def test_real_datasets_load_fast_and_have_a_stable_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(REAL))
    load_raw("local/door/human-v0")  # imports h5py and Minari
    begin = time.monotonic()
    raw = load_raw("surrogate/hopper/medium-v0")
    assert time.monotonic() - begin < 3.0
    assert (raw.num_steps, raw.num_episodes) == (100_075, 237)
    # Pinned: a change of the digest orphans every stored result.
    assert raw.digest.startswith("e0364b89de79")
    begin = time.monotonic()
    assert digest("surrogate/hopper/medium-v0") == raw.digest
    assert time.monotonic() - begin < 0.1


@needs_real_data
def test_real_adroit_data_match_their_published_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(REAL))
    card = datasets.card("local/door/human-v0")
    assert (card["episodes"], card["steps"], card["terminations"]) == (25, 6729, 0)
    assert card["returns"]["mean"] == pytest.approx(803.1, abs=0.05)
    assert 100 * card["normalized_mean_return"] == pytest.approx(29.3, abs=0.05)
    assert card["ref_source"] == "dataset metadata (D4RL's values for door)"
    assert any("palm-to-object" in text for text in card["defects"])
    assert any("mujoco==4.0.0" in text for text in card["warnings"])
    json.dumps(card)
