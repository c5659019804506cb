"""Datasets made here, and the command line that makes them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from harness import datasets
from harness.cli.data import app
from harness.datasets import DatasetError, DataSpec, load, load_raw
from harness.datasets.bandit2d import make_bandit2d, make_ring2d
from harness.datasets.pointmaze import make_pointmaze, shortest_path
from harness.datasets.routes import make_routes, route_cells
from harness.environments import Bandit2D, Ring2D, evaluation_environment, pointmaze_map
from harness.routes import MAZE_MAP


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def test_bandit_data_have_the_papers_distribution() -> None:
    raw = make_bandit2d(seed=1, steps=4000)
    assert (raw.num_episodes, raw.num_steps) == (4000, 4000)
    assert raw.terminated.all()
    assert not raw.truncated.any()
    assert not raw.obs.any()
    corner = np.repeat(np.arange(4), 1000)
    offset = raw.action - Bandit2D.CORNERS[corner]
    # four standard errors of 1000 draws
    assert np.abs(offset.reshape(4, 1000, 2).mean(1)).max() < 4 * 0.05 / np.sqrt(1000)
    np.testing.assert_allclose(offset.std(), 0.05, rtol=0.05)
    noise = raw.reward - Bandit2D.MEANS[corner]
    assert np.abs(noise.reshape(4, 1000).mean(1)).max() < 4 * 0.5 / np.sqrt(1000)
    np.testing.assert_allclose(noise.std(), 0.5, rtol=0.05)
    within = np.linalg.norm(offset, axis=1) <= Bandit2D.SUPPORT_RADIUS
    assert abs(within.mean() - (1 - np.exp(-4.5))) < 0.01
    assert load("generated/bandit2d-v0").spec.num_steps == 4000
    entry = datasets.resolve("generated/bandit2d-v0")
    assert (entry.relation, entry.ref_min, entry.ref_max) == ("generated", 2.375, 5.0)


def test_ring_data_are_eight_gaussians_and_score_as_its_environment_does() -> None:
    raw = make_ring2d(seed=1, steps=4000)
    assert (raw.num_episodes, raw.terminated.all(), raw.obs.any()) == (4000, True, False)
    offset = (raw.action - Ring2D.CENTRES[np.repeat(np.arange(8), 500)]).reshape(8, 500, 2)
    assert np.abs(offset.mean(1)).max() < 4 * 0.5 / np.sqrt(500)
    np.testing.assert_allclose(offset.std(), 0.5, rtol=0.05)
    env = evaluation_environment("generated/ring2d-v0").make()
    for action, reward in zip(raw.action[::400], raw.reward[::400], strict=True):
        env.reset(seed=0)
        _, found, terminated, _, _ = env.step(action)
        assert (found, terminated) == (reward, True)
    assert raw.reward.mean() > 0.85
    env.reset(seed=0)
    assert env.step(np.zeros(2))[1] == 0.0
    with pytest.raises(ValueError, match="multiple of 8"):
        make_ring2d(steps=10)


def test_a_seed_decides_the_content() -> None:
    first = make_bandit2d(seed=0, steps=40)
    assert make_bandit2d(seed=0, steps=40, overwrite=True).digest == first.digest
    assert make_bandit2d(seed=1, steps=40, overwrite=True).digest != first.digest
    with pytest.raises(DatasetError, match="already exists"):
        make_bandit2d(steps=40)
    with pytest.raises(ValueError, match="multiple of 4"):
        make_bandit2d(steps=10)


def test_shortest_paths_are_shortest() -> None:
    maze = pointmaze_map("umaze")
    assert shortest_path(maze, (1, 1), (3, 1)) == [
        (1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1),
    ]  # fmt: skip
    assert shortest_path(maze, (1, 1), (1, 1)) == [(1, 1)]
    with pytest.raises(ValueError, match="no path"):
        shortest_path([[0, 1, 0]], (0, 0), (0, 2))


def test_pointmaze_episodes_end_at_the_goal_and_show_the_stale_goal() -> None:
    import minari

    raw = make_pointmaze("umaze", steps=1500, seed=3)
    assert raw.num_steps == 1500
    assert raw.num_episodes > 5
    assert not raw.terminated.any()
    ends = np.cumsum(raw.lengths) - 1
    np.testing.assert_array_equal(np.flatnonzero(raw.reward), ends[:-1])
    assert [leaf.name for leaf in raw.leaves] == ["achieved_goal", "desired_goal", "observation"]
    rows = raw.starts + np.arange(raw.num_episodes)
    achieved, desired = raw.obs[:, :2], raw.obs[:, 2:4]
    distance = np.linalg.norm(achieved - desired, axis=1)
    assert (distance[rows[1:]] <= 0.45).all()  # the goal just reached, not the next one
    assert (distance[rows[1:] + 1] > 0.45).all()
    np.testing.assert_array_equal(raw.obs[rows[1:]], raw.obs[rows[1:] - 1])  # no reset between
    dataset = minari.load_dataset("generated/pointmaze/umaze-v0")
    infos = dataset[1].infos
    assert np.linalg.norm(infos["goal"][0] - infos["qpos"][0]) > 0.45  # infos have the true goal
    metadata = dataset.storage.metadata
    assert {r.partition("==")[0] for r in metadata["requirements"]} == {
        "gymnasium-robotics",
        "mujoco",
    }
    card = datasets.card("generated/pointmaze/umaze-v0")
    assert any("previous goal" in text for text in card["defects"])
    assert card["ref_source"].startswith("local anchors")
    with pytest.raises(DatasetError, match="'keep'"):  # the rewards are on the last steps
        load("generated/pointmaze/umaze-v0")
    kept = load("generated/pointmaze/umaze-v0", DataSpec(truncated_last_step="keep"))
    assert kept.reward.sum() == raw.num_episodes - 1


def test_routes_are_four_and_the_environment_tells_which_one_was_taken() -> None:
    cells = [route_cells(mode) for mode in range(4)]
    assert [len(route) - 1 for route in cells] == [8, 10, 10, 8]
    for mode, route in enumerate(cells):
        assert [(1, 2) in route, (1, 5) in route] == [bool(mode & 1), bool(mode & 2)]
        for (row, column), (next_row, next_column) in itertools.pairwise(route):
            assert MAZE_MAP[next_row][next_column] != 1
            assert abs(row - next_row) + abs(column - next_column) == 1
    raw = make_routes(seed=2, episodes=8)
    assert (raw.num_episodes, raw.returns(1.0).tolist()) == (8, [1.0] * 8)
    ends = np.cumsum(raw.lengths) - 1
    np.testing.assert_array_equal(np.flatnonzero(raw.terminated), ends)
    entry = datasets.resolve(raw.id)
    assert (entry.relation, entry.ref_min, entry.ref_max) == ("generated", 0.0, 1.0)
    # The first episode again, in the environment that policies are evaluated in.
    env = evaluation_environment(raw.id).make()
    first, _ = env.reset(seed=int(np.random.default_rng(2).integers(2**31)))
    np.testing.assert_allclose(first, raw.obs[0], atol=1e-6)
    for action in raw.action[: raw.lengths[0]]:
        _, reward, terminated, _, info = env.step(action)
        assert ("mode" in info) == terminated
    assert (reward, terminated, info["mode"]) == (1.0, True, 0)


def test_a_number_of_routes_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        make_routes(episodes=6)


def test_pointmaze_is_deterministic_given_its_seed() -> None:
    first = make_pointmaze("open", steps=300, seed=0)
    again = make_pointmaze("open", steps=300, seed=0, overwrite=True)
    other = make_pointmaze("open", steps=300, seed=1, overwrite=True)
    assert first.digest == again.digest != other.digest


def test_dense_reward_has_its_own_id_and_anchors() -> None:
    raw = make_pointmaze("medium", steps=50, dense=True)
    assert raw.id == "generated/pointmaze/medium-dense-v0"
    rows = np.arange(50) + 1
    distance = np.linalg.norm(raw.obs[rows, :2] - raw.obs[rows, 2:4], axis=1)
    np.testing.assert_allclose(raw.reward, np.exp(-distance), rtol=1e-5)
    assert datasets.resolve(raw.id).ref_max == 447.34


def test_an_unknown_maze_is_refused() -> None:
    with pytest.raises(ValueError, match="open, umaze, medium or large"):
        make_pointmaze("huge")


@pytest.fixture
def run() -> object:
    runner = CliRunner()

    def call(*arguments: str, code: int = 0) -> str:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.output

    return call


def test_the_command_line_makes_lists_shows_and_verifies(run, store: Path) -> None:
    made = json.loads(run("make", "bandit2d", "--steps", "40", "--json"))
    assert made["episodes"] == 40
    assert made["digest"] == load_raw("generated/bandit2d-v0").digest
    run("make", "pointmaze/umaze", "--steps", "200", "--seed", "2")
    rows = json.loads(run("list", "--json"))
    assert [row["id"] for row in rows] == ["generated/bandit2d-v0", "generated/pointmaze/umaze-v0"]
    assert "bandit2d" in run("list")
    card = json.loads(run("card", "generated/bandit2d-v0", "--json"))
    assert (card["steps"], card["evaluation"]["env_id"]) == (
        40,
        "offline_rl_harness/Bandit2D-v0",
    )
    assert "generated" in run("card", "generated/pointmaze/umaze-v0")
    assert all(row["ok"] for row in json.loads(run("verify", "--json")))
    path = store / "generated/bandit2d-v0/data/main_data.hdf5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    rows = json.loads(run("verify", "generated/*", "--json", code=1))
    assert [row["ok"] for row in rows] == [False, True]


def test_the_command_line_answers_errors_with_one_message(run, tmp_path: Path) -> None:
    assert "Did you mean" in run("card", "generated/bandit-v0", code=2)
    assert "does not exist" in run("import", str(tmp_path / "x"), "--id", "mine/x-v0", code=2)
    assert "is named 'nonsense'" in run("list", "nonsense", code=2)
    assert json.loads(run("list", "nonsense*", "--json")) == []
    assert "nothing makes 'nonsense'. Known: pointmaze, " in " ".join(
        run("make", "nonsense", code=2).replace("│", " ").split()
    )
    assert "not in the mirror" in run(
        "download", "D4RL/pen/human-v2", "--remote", f"file://{tmp_path}", code=2
    )
    published = json.loads(run("list", "*hopper*", "--published", "--json"))
    relations = {row["name"]: row["relation"] for row in published}
    assert relations["hopper-medium-v2"] == "different"
