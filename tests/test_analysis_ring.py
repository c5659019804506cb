"""The ring of eight modes: its numbers on known samples, the page, the figure, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from analysis import ring
from harness import cli

REPOSITORY = Path(__file__).resolve().parents[1]


def draws(count: int = 4000, seed: int = 0, modes: int = 8) -> np.ndarray:
    """Of the ring's first modes."""
    generator = np.random.default_rng(seed)
    centre = ring.CENTRES[np.arange(count) * modes // count]
    return centre + ring.STD * generator.standard_normal((count, 2))


def table(samples: dict[tuple[str, int], np.ndarray], density: bool = True) -> pd.DataFrame:
    """The columns of `harness actions`; the density of a policy is the ring's over its modes."""
    parts = []
    for (label, seed), point in samples.items():
        part = pd.DataFrame(
            {
                "label": label,
                "dataset_id": "generated/ring2d-v0",
                "seed": seed,
                "draw": np.arange(len(point)),
                "unclamped_0": point[:, 0],
                "unclamped_1": point[:, 1],
            }
        )
        modes = 1 if label == "one" else 8
        squared = ((point[:, None] - ring.CENTRES[:modes]) ** 2).sum(-1) / ring.STD**2
        own = np.logaddexp.reduce(-0.5 * squared, axis=1) - np.log(modes * 2 * np.pi * ring.STD**2)
        part["log_density"] = own if label != "teacher" else np.nan
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    samples = {}
    for seed in range(4):
        samples["teacher", seed] = samples["eight", seed] = draws(seed=seed)
        samples["one", seed] = draws(seed=seed, modes=1)
    path = tmp_path / "actions.parquet"
    table(samples).to_parquet(path, index=False)
    return path


def test_constants_are_the_environments():
    from harness.environments import Ring2D

    np.testing.assert_allclose(ring.CENTRES, Ring2D.CENTRES)
    assert (ring.STD, ring.AXIS_LIMIT) == (Ring2D.STD, Ring2D.BOUND)


def test_the_density_integrates_to_one():
    axis = np.linspace(-6, 6, 301)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(ring.log_density(grid)).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1.0)


def test_the_ring_itself_has_no_divergence_and_all_modes_and_one_mode_log_8_at_most(file):
    built = ring.build(file)
    numbers = built.numbers.set_index(["label", "seed"])
    assert numbers.loc["eight"].reverse_kl.abs().max() < 1e-12
    assert (numbers.loc["eight"].modes == 8).all()
    assert (numbers.loc["eight"].mode_entropy > 0.99).all()
    assert (numbers.loc["eight"].on_support > 0.85).all()
    # Most of one mode is nowhere near the others.
    assert numbers.loc["one"].reverse_kl.between(np.log(8) - 0.5, np.log(8)).all()
    assert (numbers.loc["one"].modes <= 3).all()  # neighbours overlap
    assert (numbers.loc["one"].mode_entropy < 0.35).all()
    assert numbers.loc["teacher"].reverse_kl.isna().all()
    assert built.estimates["teacher"]["reverse_kl"] is None


def test_the_page_and_the_figure_name_their_source(file, tmp_path):
    built = ring.build(file)
    paths = ring.write(built, tmp_path / "out")
    assert {path.suffix for path in paths} >= {".md", ".csv", ".png", ".pdf"}
    page = (tmp_path / "out" / "ring.md").read_text()
    assert "| eight | 4 |" in page
    assert "no density" in page
    assert built.sha256[:16] in page
    sources = [path for path in paths if path.suffix == ".json"]
    assert built.sha256 in sources[0].read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="unclamped_1"), "lacks the columns unclamped_1"),
        (lambda t: t.assign(dataset_id="generated/bandit2d-v0"), "expected the 2-D ring alone"),
    ],
)
def test_other_tables_are_refused(file, tmp_path, change, message):
    path = tmp_path / "other.parquet"
    change(pd.read_parquet(file)).to_parquet(path)
    with pytest.raises(ValueError, match=message):
        ring.build(path)


def test_the_command_prints_the_numbers(file, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["ring", str(file), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert {row["label"] for row in json.loads(done.stdout)["numbers"]} == {
        "teacher", "eight", "one",
    }  # fmt: skip
    shown = CliRunner().invoke(cli.app, ["ring", str(file), "--out", str(out)])
    assert "eight" in shown.output
    missing = CliRunner().invoke(cli.app, ["ring", str(tmp_path / "none")])
    assert cli.exit_code(missing.exception) == cli.USAGE


def test_students_of_the_experiment_act_by_draws():
    """Their density is judged at their draws; a mean has none."""
    blocks = yaml.safe_load((REPOSITORY / "experiments" / "vdd_ring.yaml").read_text())[
        "algorithms"
    ]
    students = [block for block in blocks.values() if block["algorithm"] == "vdd"]
    assert len(students) == 5
    assert all(block["config"]["act_noise"] for block in students)
