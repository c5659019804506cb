"""Likelihoods of a file of actions: means, medians, who has none, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import likelihood
from harness import cli
from harness.actions import write_parquet


@pytest.fixture
def file(tmp_path: Path) -> Path:
    parts = []
    for label in ("sharp", "flat", "silent"):
        for seed in range(3):
            level = {"sharp": 2.0, "flat": -1.0, "silent": np.nan}[label]
            density = level + 0.1 * seed + np.array([0.0, 0.0, 0.0, -4.0])
            parts.append(
                pd.DataFrame(
                    {
                        "label": label,
                        "dataset_id": "a-v0",
                        "seed": seed,
                        "row": range(4),
                        "data_log_density": density,
                    }
                )
            )
    path = tmp_path / "actions.parquet"
    write_parquet(pd.concat(parts), path, {"held_out": True})
    return path


def test_likelihoods_are_means_over_rows_then_over_seeds(file):
    report = likelihood.build(file)
    assert report.held_out
    found = {label: estimate for (_, label), estimate in report.estimates.items()}
    assert found["sharp"].value == pytest.approx(-(2.0 + 0.1 - 1.0))
    assert found["flat"].value == pytest.approx(1.0 - 0.1 + 1.0)
    assert found["silent"] is None
    medians = report.numbers.query("label == 'sharp'").nll_median
    assert medians.tolist() == pytest.approx([-2.0, -2.1, -2.2])
    assert report.numbers.rows.tolist() == [4] * 9


def test_the_command_shows_a_table_and_gives_numbers(file):
    shown = CliRunner().invoke(cli.app, ["likelihood", str(file)])
    assert "no density" in shown.stdout
    numbers = json.loads(CliRunner().invoke(cli.app, ["likelihood", str(file), "--json"]).stdout)
    assert {row["label"] for row in numbers} == {"sharp", "flat", "silent"}


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="harness actions"):
        likelihood.build(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("x")
    with pytest.raises(ValueError, match="not a parquet file"):
        likelihood.build(tmp_path / "text.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a file of actions"):
        likelihood.build(tmp_path / "other.parquet")
    columns = {"label": ["a"], "dataset_id": ["d"], "seed": [0], "row": [0]}
    pd.DataFrame(columns).to_parquet(tmp_path / "silent.parquet")
    with pytest.raises(ValueError, match="has a density"):
        likelihood.build(tmp_path / "silent.parquet")
