"""The bandit's numbers against brute force and closed forms, its claims, and its files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import bandit as report
from analysis.stats import Estimate
from harness import cli
from harness.spec import load_experiment

REPOSITORY = Path(__file__).resolve().parents[1]
LABELS = list(dict.fromkeys(label for row in report.PANELS for label, _ in row))


def cloud(centre, count: int = 300, seed: int = 0, std: float = 0.05) -> np.ndarray:
    return np.array(centre) + std * np.random.default_rng(seed).standard_normal((count, 2))


def table(samples) -> pd.DataFrame:
    """The columns of `harness actions` for {(label, seed): actions}."""
    parts = [
        pd.DataFrame(
            {
                "trial_id": f"{label}-{seed}",
                "label": label,
                "algorithm": "any",
                "dataset_id": "generated/bandit2d-v0",
                "seed": seed,
                "draw": np.arange(len(action)),
                "row": 0,
                **{f"obs_{i}": 0.0 for i in range(2)},
                **{f"action_{i}": action[:, i].clip(-1, 1) for i in range(2)},
                **{f"unclamped_{i}": action[:, i] for i in range(2)},
            }
        )
        for (label, seed), action in samples.items()
    ]
    return pd.concat(parts, ignore_index=True)


def as_the_paper_shows() -> pd.DataFrame:
    samples = {}
    for seed in range(4):
        for label in LABELS:
            best = label.startswith("diffusion_ql")
            samples[label, seed] = (
                cloud(report.CORNERS[report.BEST], seed=seed)
                if best
                else cloud((0.0, 0.0), seed=seed, std=0.8)
            )
        samples["bc_diffusion", seed] = report.fresh_data(400, seed=seed + 1)
    return table(samples)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "actions.parquet"
    as_the_paper_shows().to_parquet(path, index=False)
    return path


def test_a_file_without_any_of_the_figures_labels_is_refused(tmp_path):
    path = tmp_path / "actions.parquet"
    table({("mine", 0): cloud((0.0, 0.0))}).to_parquet(path)
    with pytest.raises(ValueError, match=r"none of the figure's labels bc_mle, .*; it has mine$"):
        report.build(path)


# ------------------------------------------------------------------------------------ numbers


def test_the_constants_are_the_environments():
    from harness.datasets.bandit2d import ACTION_STD, REWARD_STD
    from harness.environments import Bandit2D

    np.testing.assert_array_equal(report.CORNERS, Bandit2D.CORNERS)
    np.testing.assert_array_equal(report.REWARD_MEANS, Bandit2D.MEANS)
    assert (report.ACTION_STD, report.REWARD_STD) == (ACTION_STD, REWARD_STD)
    assert Bandit2D.SUPPORT_RADIUS == report.SUPPORT_RADIUS
    assert Bandit2D.MEANS.argmax() == report.BEST


def test_shares_of_the_data_are_the_closed_form():
    found = report.shares(report.fresh_data(40_000, seed=3))
    inside = 1.0 - math.exp(-4.5)  # a 2-D Gaussian within three standard deviations
    assert found["on_support"] == pytest.approx(inside, abs=0.002)
    assert found["off_support"] == pytest.approx(1 - inside, abs=0.002)
    for c in range(4):
        assert found[f"corner_{c}"] == pytest.approx(inside / 4, abs=0.005)
    assert found["modes"] == 4
    assert found["reward"] == pytest.approx(2.375, abs=0.02)


def test_shares_of_the_ideal_gaussian_are_the_known_ones():
    found = report.shares(0.802 * np.random.default_rng(0).standard_normal((200_000, 2)))
    assert found["on_support"] == pytest.approx(0.026, abs=0.002)
    assert found["modes"] == 0


def test_shares_by_hand():
    action = np.array([[0.8, -0.8], [0.8, -0.98], [0.81, 0.8], [-2.0, -2.0]])
    found = report.shares(action)
    assert [found[f"corner_{c}"] for c in range(4)] == [0.0, 0.0, 0.25, 0.25]
    assert (found["on_support"], found["off_support"]) == (0.5, 0.5)
    assert (found["near_best"], found["modes"]) == (0.5, 2)
    assert found["reward"] == (5.0 + 5.0 + 1.5 + 0.0) / 4


def test_energy_distance_is_the_sum_over_pairs():
    x, y = cloud((0, 0), 7, 1, 1.0), cloud((1, 0), 5, 2, 1.0)

    def mean(pairs):
        return np.mean([np.linalg.norm(a - b) for a, b in pairs])

    expected = 2 * mean(itertools.product(x, y))
    expected -= mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2))
    assert report.energy_distance(x, y) == pytest.approx(expected)


def test_energy_distance_of_equal_distributions_is_near_zero_and_of_others_is_not():
    fresh = report.fresh_data()
    assert abs(report.energy_distance(report.fresh_data(1000, seed=5), fresh)) < 0.01
    assert report.energy_distance(cloud((0, 0), 1000, 0, 0.8), fresh) > 0.05


# ------------------------------------------------------------------------------------- claims


def test_every_claim_holds_for_what_the_paper_shows(file):
    built = report.build(file)
    assert {claim.verdict for claim in built.claims} == {"holds"}, built.claims
    assert len(built.claims) == 14
    assert list(built.estimates) == LABELS


def test_a_claim_fails_where_the_interval_is_on_the_wrong_side():
    estimates = {
        "bc_diffusion": {
            name: Estimate(value, value - 0.05, value + 0.05)
            for name, value in (
                ("on_support", 0.5),
                *((f"corner_{c}", v) for c, v in enumerate((0.25, 0.32, 0.5, 0.0))),
            )
        },
        "bc_mle": {"on_support": Estimate(0.52, 0.5, 0.6)},
        "bc_cvae": {"on_support": Estimate(0.9, 0.8, 1.0)},
        "bc_mmd": {"on_support": Estimate(0.1, None, None)},
    }
    verdicts = [claim.verdict for claim in report.check(estimates)]
    corners = ["holds", "undecided", "fails", "fails"]
    assert verdicts[:8] == ["fails", *corners, "undecided", "fails", "too few seeds"]
    assert verdicts[8:] == ["not measured"] * 6


def test_the_samples_of_one_seed_give_no_interval(tmp_path):
    path = tmp_path / "one.parquet"
    table({("bc_diffusion", 0): report.fresh_data(400)}).to_parquet(path)
    built = report.build(path)
    assert {claim.verdict for claim in built.claims} == {"too few seeds", "not measured"}


# -------------------------------------------------------------------------------------- files


def test_the_command_writes_page_numbers_and_figure_with_its_source(file, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["bandit", str(file), "--out", str(out), "--json"])
    assert done.exit_code == cli.OK, done.output
    said = json.loads(done.stdout)
    assert {claim["verdict"] for claim in said["claims"]} == {"holds"}
    names = {f"bandit.{kind}" for kind in ("md", "csv", "pdf", "png", "json")}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(path).name for path in said["files"]} == names
    page = (out / "bandit.md").read_text()
    for heading in ("BC-CVAE", "Diffusion-QL", "energy distance", "## Claims"):
        assert heading in page
    numbers = pd.read_csv(out / "bandit.csv")
    assert len(numbers) == 4 * len(LABELS)
    source = json.loads((out / "bandit.json").read_text())
    assert [panel["label"] for panel in source["panels"]] == LABELS
    assert source["panels"][0] == {
        "label": "bc_mle", "seed": 0, "trial_id": "bc_mle-0", "seeds": [0, 1, 2, 3]
    }  # fmt: skip


def test_equal_input_gives_equal_bytes(file, tmp_path):
    for folder in ("a", "b"):
        report.write(report.build(file), tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_labels_that_are_missing_or_not_the_papers_are_named(tmp_path):
    path = tmp_path / "actions.parquet"
    labels = ("my_policy", "bcq")
    mine = {(label, seed): cloud((0, 0), seed=seed) for label in labels for seed in range(3)}
    table(mine).to_parquet(path)
    built = report.build(path)
    assert "my\\_policy" in report.markdown(built)
    report.write(built, tmp_path / "out")
    source = json.loads((tmp_path / "out" / "bandit.json").read_text())
    assert source["not_drawn"] == ["my_policy"]
    assert source["missing"] == sorted(set(LABELS) - {"bcq"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="unclamped_1"), "lacks the columns unclamped_1"),
        (lambda frame: frame.assign(dataset_id="hopper"), "dataset 'hopper'"),
        (lambda frame: frame.assign(unclamped_2=0.0), "more than two action dimensions"),
        (lambda frame: frame.assign(unclamped_0=np.nan), "not finite"),
        (lambda frame: frame.assign(trial_id=frame.index.astype(str)), "two trials of bc_"),
    ],
)
def test_a_table_that_is_not_the_bandits_is_refused(tmp_path, change, message):
    path = tmp_path / "actions.parquet"
    change(as_the_paper_shows()).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        report.build(path)


def test_a_file_that_is_absent_or_no_parquet_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="harness actions"):
        report.build(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="not a parquet file"):
        report.build(tmp_path / "text.parquet")


def test_the_experiment_has_the_panels_at_the_papers_sizes(bandit):
    experiment = load_experiment(REPOSITORY / "experiments" / "bandit2d.yaml", [])
    trials = {trial.label: trial for trial in experiment.trials}
    assert set(trials) == set(LABELS)
    assert {trial.seed for trial in experiment.trials} == set(range(10))
    for label, trial in trials.items():
        config = trial.config
        assert (config["steps"], config["batch_size"], config["hidden_dim"]) == (100_000, 100, 128)
        assert config["lr"] == 3e-4
        if trial.algorithm == "diffusion_ql":
            assert config["denoise_steps"] == int(label.partition("_t")[2] or 50)
            assert (config["discount"], config["q_coef"]) == (0.0, 2.5)
    kinds = {
        "bc_cvae": ("cvae", "none", 2.5),
        "bc_mmd": ("mmd", "none", 2.5),
        "q_gaussian": ("gaussian", "q", 2.5),
        "bcq": ("cvae", "q", 2.5),
        "bear_mmd": ("mmd", "q", 1.0),
    }
    for label, expected in kinds.items():
        config = trials[label].config
        assert (config["policy"], config["guidance"], config["q_coef"]) == expected
    assert trials["bc_mle"].config["sample_actions"]
    assert trials["bc_diffusion"].config["bc_only"]
