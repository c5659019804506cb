"""Original D4RL files: the same transitions as D4RL's `qlearning_dataset`, nothing invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import datasets
from harness.datasets import DatasetError, DataSpec, load, load_raw
from harness.datasets.d4rl import import_d4rl


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def columns(ends: str, obs_dim: int = 11, action_dim: int = 3, **more: Any) -> dict[str, Any]:
    """Flat arrays; one letter per row: T terminal, L timeout, B both, . neither."""
    rng = np.random.default_rng(len(ends))
    rows = len(ends)
    obs = rng.normal(size=(rows, obs_dim)).astype(np.float32)
    return {
        "observations": obs,
        "actions": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.array([letter in "TB" for letter in ends]),
        "timeouts": np.array([letter in "LB" for letter in ends]),
        **more,
    }


def with_successors(flat: dict[str, Any]) -> dict[str, Any]:
    """Adds next_observations: the next row inside an episode, a fresh one at its end."""
    ends = flat["terminals"] | flat["timeouts"]
    following = np.roll(flat["observations"], -1, axis=0)
    fresh = np.random.default_rng(1).normal(size=following.shape).astype(np.float32)
    fresh_rows = ends.copy()
    fresh_rows[-1] = True
    return {**flat, "next_observations": np.where(fresh_rows[:, None], fresh, following)}


def save(path: Path, flat: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in flat.items():
            file[key] = value
    return path


def qlearning_rows(flat: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray, float, bool]]:
    """D4RL's rule, written as its loop: skip time-outs, and the file's last row."""
    rows = []
    for i in range(len(flat["rewards"]) - 1):
        if flat["timeouts"][i]:
            continue
        rows.append(
            (
                flat["observations"][i],
                flat["actions"][i],
                float(flat["rewards"][i]),
                bool(flat["terminals"][i]),
            )
        )
    return rows


ends = st.text(alphabet="....TLB", min_size=3, max_size=30).filter(
    lambda text: any(letter in ".T" for letter in text[:-1])
)


@pytest.mark.parametrize("successors", [False, True])
@given(text=ends)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_default_transitions_are_those_of_qlearning_dataset(
    successors: bool, text: str, tmp_path: Path
) -> None:
    flat = columns(text)
    expected = qlearning_rows(flat)
    if text[-1] == "T":  # D4RL's loop stops before the last row even where it is a real end
        last = len(text) - 1
        expected.append(
            (flat["observations"][last], flat["actions"][last], float(flat["rewards"][last]), True)
        )
    file = save(tmp_path / "flat.hdf5", with_successors(flat) if successors else flat)
    import_d4rl(file, "mine/flat-v0", overwrite=True)
    dataset = load("mine/flat-v0", DataSpec())
    np.testing.assert_array_equal(dataset.obs, np.stack([row[0] for row in expected]))
    np.testing.assert_array_equal(dataset.action, np.stack([row[1] for row in expected]))
    np.testing.assert_array_equal(dataset.reward, np.array([r[2] for r in expected], np.float32))
    np.testing.assert_array_equal(dataset.terminated, [float(row[3]) for row in expected])


def test_successors_from_the_file_are_kept_across_time_limits(tmp_path: Path) -> None:
    flat = with_successors(columns("..L..T.."))
    import_d4rl(save(tmp_path / "flat.hdf5", flat), "mine/flat-v0")
    dataset = load("mine/flat-v0", DataSpec(truncated_last_step="keep"))
    np.testing.assert_array_equal(dataset.next_obs, flat["next_observations"])
    np.testing.assert_array_equal(dataset.truncated, [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(dataset.terminated, [0, 0, 0, 0, 0, 1, 0, 0])
    assert load_raw("mine/flat-v0").last_step_dropped is False


def test_without_successors_the_card_says_what_was_left_out(tmp_path: Path) -> None:
    import_d4rl(save(tmp_path / "flat.hdf5", columns("..L..T..")), "mine/flat-v0")
    card = datasets.card("mine/flat-v0")
    assert (card["dropped_at_import"], card["dropped_by_default"]) == (2, 0)
    assert (card["steps"], card["transitions_by_default"]) == (6, 6)
    assert "last transition of 2 truncated episodes is left out" in card["description"]
    assert any("truncated episodes lack" in text for text in card["defects"])
    assert any("repeats" in text for text in card["defects"])


def test_an_imported_original_answers_to_its_d4rl_name(tmp_path: Path) -> None:
    from harness.environments import check_fit, evaluation_environment

    file = save(tmp_path / "hopper_medium-v2.hdf5", columns("..L..T.."))
    import_d4rl(file, "hopper-medium-v2")
    entry = datasets.resolve("hopper-medium-v2")
    assert (entry.id, entry.relation) == ("d4rl-original/hopper-medium-v2", "original")
    environment = evaluation_environment("hopper-medium-v2")
    assert (environment.env_id, environment.max_episode_steps) == ("Hopper-v4", 1000)
    check_fit(environment.make(), load("hopper-medium-v2").spec)
    assert datasets.match("hopper-*") == ["hopper-medium-v2"]


def test_originals_without_a_faithful_simulator_have_no_environment(tmp_path: Path) -> None:
    from harness.environments import evaluation_environment

    import_d4rl(save(tmp_path / "a.hdf5", columns("..L..T..", 29, 8)), "antmaze-umaze-v0")
    with pytest.raises(DatasetError, match="not maintained"):
        evaluation_environment("antmaze-umaze-v0")


def test_infos_and_metadata_come_along(tmp_path: Path) -> None:
    import minari

    flat = columns("..L..T..")
    flat["infos/qpos"] = np.arange(16.0).reshape(8, 2)
    flat["infos/odd"] = np.arange(3)
    flat["metadata/algorithm"] = "SAC"
    import_d4rl(save(tmp_path / "a.hdf5", with_successors(flat)), "mine/a-v0")
    dataset = minari.load_dataset("mine/a-v0")
    assert dataset.storage.metadata["algorithm_name"] == "SAC"
    np.testing.assert_array_equal(
        dataset[0].infos["qpos"], [[0, 1], [2, 3], [4, 5], [4, 5]]
    )  # a row for each observation, the last repeated
    assert dataset.storage.metadata["harness_import"]["infos_left_out"] == ["odd"]


def test_files_without_timeouts_are_cut_at_the_time_limit(tmp_path: Path) -> None:
    flat = columns("...T......")
    del flat["timeouts"]
    import_d4rl(save(tmp_path / "a.hdf5", flat), "mine/a-v0", max_episode_steps=3)
    raw = load_raw("mine/a-v0")
    # episodes 3 (limit), 1 (terminal), 3, 3; without successors the cut ones lose a step
    np.testing.assert_array_equal(raw.lengths, [2, 1, 2, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("terminals"), "lacks terminals"),
        (lambda f: f.update(actions=f["actions"][:-1]), "actions has 7 rows, rewards 8"),
        (lambda f: f.update(observations=f["observations"][:, 0]), "expected floats"),
        (lambda f: f.update(rewards=np.zeros((8, 2))), "rewards has 2 columns"),
        (lambda f: f["observations"].__setitem__((2, 0), np.nan), "nan"),
        (lambda f: f["actions"].__setitem__((1, 0), 1.2), "--clip-actions"),
        (lambda f: f.update(next_observations=f["observations"]), "inside an episode"),
        (lambda f: f.update(next_observations=np.zeros((8, 5), np.float32)), "has 5 columns, obs"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    flat = columns("..L..T..")
    change(flat)
    with pytest.raises(DatasetError, match=message):
        import_d4rl(save(tmp_path / "a.hdf5", flat), "mine/a-v0")
    assert not datasets.local.stored_ids()


def test_a_file_of_one_row_is_a_dataset_of_one_step(tmp_path: Path) -> None:
    file = save(tmp_path / "a.hdf5", with_successors(columns("T")))
    assert import_d4rl(file, "mine/a-v0").num_steps == 1
    card = datasets.card("mine/a-v0")
    assert (card["steps"], card["coverage"]["cells"]) == (1, 1)


def test_a_file_whose_every_transition_lacks_its_successor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no transition is left"):
        import_d4rl(save(tmp_path / "a.hdf5", columns("L")), "mine/a-v0")
    assert not datasets.local.stored_ids()


def test_clipping_is_explicit_and_recorded(tmp_path: Path) -> None:
    flat = columns("..L..T..")
    flat["actions"][2, 0] = 1.2
    file = save(tmp_path / "a.hdf5", with_successors(flat))
    import_d4rl(file, "mine/a-v0", clip_actions=True)
    assert load_raw("mine/a-v0").action[2, 0] == 1.0
    assert load_raw("mine/a-v0").metadata["harness_import"]["clipped_actions"] == 1


def test_missing_and_damaged_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        import_d4rl(tmp_path / "none.hdf5", "mine/a-v0")
    with pytest.raises(DatasetError, match="is a folder; expected a D4RL HDF5 file"):
        import_d4rl(tmp_path, "mine/a-v0")
    file = save(tmp_path / "a.hdf5", columns("..L..T.."))
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DatasetError, match="damaged or incomplete"):
        import_d4rl(file, "mine/a-v0")


def test_nothing_imports_d4rl_or_mujoco_py() -> None:
    import re

    root = Path(__file__).parents[1]
    for path in [*root.glob("harness/**/*.py"), *root.glob("algorithms/**/*.py")]:
        assert not re.search(r"^\s*(import|from)\s+(d4rl|mujoco_py)\b", path.read_text(), re.M)
