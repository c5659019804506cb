"""Generated data against the strength of guidance: means over seeds, levels, and the figure."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import guidance
from harness import cli


@pytest.fixture
def file(tmp_path):
    """Two labels on one dataset, four seeds, horizon 4; errors grow with index and strength."""
    rows = [
        {
            "dataset_id": "test/a-v0",
            "label": label,
            "seed": seed,
            "coef": coef,
            "index": index,
            "dynamics_error": 0.1 * (1 + index) * (2.0 if np.isnan(coef) else 1.0 + coef),
            "log_density": -1.0 + (0.0 if np.isnan(coef) else coef) + 0.1 * seed,
            "behaviour_distance": 1.0,
            "coverage": 0.5,
            "reward_error": np.nan,
        }
        for label, coefs in (("guided", (0.0, 1.0)), ("model", (np.nan,)))
        for coef in coefs
        for seed in range(4)
        for index in range(4)
    ]
    path = tmp_path / "synthetic.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def mean_of(report, label, quantity, coef=None):
    rows = report.means[(report.means.label == label) & (report.means.quantity == quantity)]
    (row,) = rows[rows.coef.isna() if coef is None else rows.coef == coef].itertuples()
    return row


def test_numbers_are_means_over_the_horizon_then_over_seeds(file):
    report = guidance.read(file)
    assert mean_of(report, "guided", "dynamics_error", 0.0).mean == pytest.approx(0.25)
    assert mean_of(report, "guided", "dynamics_error", 1.0).mean == pytest.approx(0.5)
    assert mean_of(report, "model", "dynamics_error").mean == pytest.approx(0.5)
    assert mean_of(report, "guided", "late_error", 0.0).mean == pytest.approx(0.4)
    likelihood = mean_of(report, "guided", "log_density", 1.0)
    assert likelihood.mean == pytest.approx(0.15)
    assert likelihood.low < 0.15 < likelihood.high
    assert likelihood.seeds == 4
    assert "reward_error" not in set(report.means.quantity), "nothing was measured"


def test_the_figure_comes_with_its_numbers(file, tmp_path):
    report = guidance.read(file)
    paths = guidance.write(report, tmp_path / "out")
    assert all(path.stat().st_size > 0 for path in paths)
    (source,) = [path for path in paths if path.suffix == ".json"]
    assert json.loads(source.read_text())["files_sha256"] == list(report.digests)
    drawn = guidance.figure(report)
    assert len(drawn.axes) == 5
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == {"guided", "model"}


def test_guided_data_are_compared_seed_by_seed(file):
    report = guidance.read(file)
    found = {(c.claim, c.beside): c for c in guidance.compare(report, {"guided": "model"})}
    assert len(found) == 3
    likelier = found[guidance.LIKELIER, ""]
    assert likelier.judgement.difference.value == pytest.approx(1.0)
    assert (likelier.seeds, likelier.judgement.verdict) == (4, "holds")
    # Of the last quarter: 0.1 * 4 * 2 of the level, the same at strength 1.
    less = found[guidance.LESS_ERROR, "model"]
    assert less.judgement.difference.value == pytest.approx(0.0)
    assert less.judgement.verdict == "open"
    assert found[guidance.LIKELIER, "model"].judgement.verdict == "holds"
    (row,) = (row for row in guidance.rows(found.values()) if row[0] == guidance.LESS_ERROR)
    assert row[3:] == ["1", "model", "4", "1 [1, 1]", "open"]


@pytest.mark.parametrize("pair", [{"model": "guided"}, {"guided": "nobody"}])
def test_labels_of_another_kind_are_refused(file, pair):
    with pytest.raises(ValueError, match="expected one of"):
        guidance.compare(guidance.read(file), pair)


def test_the_command_needs_pairs_and_prints_the_comparisons(file, tmp_path):
    arguments = ["guidance", str(file), "--out", str(tmp_path / "out"), "--beside"]
    shown = CliRunner().invoke(cli.app, [*arguments, "guided=model", "--json"])
    assert len(json.loads(shown.stdout)["comparisons"]) == 3
    assert "guided" in (tmp_path / "out" / "guidance.md").read_text()
    wrong = CliRunner().invoke(cli.app, [*arguments, "guided"])
    assert "expected GUIDED=LEVEL" in str(wrong.exception)


def test_files_of_several_datasets_are_one_report_and_none_counts_twice(file, tmp_path):
    other = tmp_path / "other.parquet"
    pd.read_parquet(file).assign(dataset_id="test/b-v0").to_parquet(other)
    report = guidance.read(file, other)
    assert set(report.means.dataset_id) == {"test/a-v0", "test/b-v0"}
    with pytest.raises(ValueError, match="more than once"):
        guidance.read(file, file)


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pd.DataFrame({"seed": [0]}).to_parquet(path)
    with pytest.raises(ValueError, match="lacks the columns behaviour_distance"):
        guidance.read(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"other\.parquet is not a parquet file; `harness synth"):
        guidance.read(path)
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist; `harness syn"):
        guidance.read(tmp_path / "none.parquet")


def test_the_last_quarter_is_that_of_each_horizon(file, tmp_path):
    table = pd.read_parquet(file)
    longer = table.assign(dataset_id="test/b-v0")
    longer = pd.concat([longer, longer.assign(index=longer["index"] + 4)])
    longer.to_parquet(tmp_path / "longer.parquet")
    report = guidance.read(file, tmp_path / "longer.parquet")
    short = report.trials[report.trials.dataset_id == "test/a-v0"]
    alone = guidance.read(file).trials
    assert short.late_error.tolist() == pytest.approx(alone.late_error.tolist())
    assert not short.late_error.isna().any()
