"""The leaderboard's pages as files: what is ranked together, what a cell tells, equal bytes."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import synthetic
from test_analysis_leaderboard import A, B, complete, dataset, fill, trial

from analysis import tracks
from analysis.site import collect as collecting
from analysis.site import pages, svg
from harness import cli
from results.records import LatencyRecord, TrialRecord
from results.store import Store


@pytest.fixture
def store():
    with Store.open("sqlite://") as store:
        yield store


def changed(records, **fields):
    """The records with other values in their trials."""
    return [
        dataclasses.replace(record, **fields) if isinstance(record, TrialRecord) else record
        for record in records
    ]


def text_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*")
        if file.suffix in (".html", ".js", ".css", ".json", ".csv")
    }


EVALUATION = {"episodes": 2, "every": 10, "first_env_seed": 0}


@pytest.mark.parametrize(
    "other",
    [
        complete("n", A, simulator="mujoco 9"),
        complete("n", dataset(digest="d2")),
        changed(complete("n", A), evaluation={**EVALUATION, "episodes": 100}),
        changed(complete("n", A), evaluation={**EVALUATION, "environment": {"env_id": "Line-v9"}}),
    ],
    ids=["simulator", "content", "protocol", "environment"],
)
def test_what_cannot_be_compared_stands_in_tables_of_its_own(store, other):
    fill(store, [A, dataset(digest="d2")], complete("m", A), complete("k", A), other)
    first, second = collecting.collect(store).tracks
    assert {row.board.method for row in first.rows} == {"m", "k"}
    assert [row.board.method for row in second.rows] == ["n"]
    assert second.board.comparison is None
    assert second.rows[0].rank is None


def test_methods_that_lack_a_seed_are_shown_but_not_ranked(store):
    fill(store, [A, B], complete("m", A), complete("m", B), complete("k", A), complete("k", B))
    fill(store, complete("n", A), complete("n", B, [0, 1]), trial("n", B, 2, status="diverged"))
    (track,) = collecting.collect(store).tracks
    ranks = {row.board.method: row.rank for row in track.rows}
    assert ranks["n"] is None
    assert ranks["m"] is not None
    row = next(row for row in track.rows if row.board.method == "n")
    assert (row.covered, row.min_seeds, row.max_seeds) == (1, 2, 3)


def test_latency_is_a_column_where_it_was_measured_under_one_condition(store, tmp_path):
    fill(store, [A], complete("m", A), complete("k", A))
    pages.write(store, tmp_path)
    assert "ms / action" not in (tmp_path / "index.html").read_text()
    runs = store.runs().run_id
    for run, cpu, ms in ((runs[0], "slow", 3.0), (runs[1], "slow", 5.0), (runs[2], "fast", 1.0)):
        times = (1, False, "cpu", 1, 10, ms, ms, (ms,), {}, {"cpu": cpu})
        store.append([LatencyRecord(run, "2031-05-06T08:00:00Z", *times)])
    (track,) = collecting.collect(store).tracks
    assert track.condition == "slow, 1 thread, eager"
    assert sorted((row.latency is None, row.latency) for row in track.rows)[0] == (False, 4.0)
    pages.write(store, tmp_path)
    assert "ms / action" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("dataset_id", "suite"),
    [
        ("mujoco/hopper/medium-v0", "mujoco"),
        ("D4RL/door/human-v2", "adroit"),
        ("D4RL/antmaze/umaze-v1", "antmaze"),
        ("walker2d-medium-v2", "mujoco"),
        ("pen-human-v1", "adroit"),
        ("maze2d-large-v1", "maze2d"),
        ("generated/bandit2d-v0", "generated"),
    ],
)
def test_suites_follow_from_names(dataset_id, suite):
    assert tracks.suite_of(dataset_id) == suite


def test_a_cell_tells_seeds_settings_versions_and_digest(store, tmp_path):
    fill(store, [A], complete("m", A), complete("k", A))
    defaults = {"m": {"variant": "another"}, "k": {"variant": "v"}}
    pages.write(store, tmp_path, defaults=defaults)
    (cell,) = (tmp_path / "cells").glob("m-*.html")
    text = cell.read_text()
    for part in ("another", A.digest, "measured", "2 episodes every 10 steps", "<svg"):
        assert part in text
    (plain,) = (tmp_path / "cells").glob("k-*.html")
    assert "Every setting is the algorithm's default" in plain.read_text()


def test_names_are_text_not_markup(store, tmp_path):
    evil = "<script>alert(1)</script>"
    records = changed(complete("m", A), label=evil)
    fill(store, [A], records, complete("k", A))
    pages.write(store, tmp_path)
    for name, text in text_of(tmp_path).items():
        if name.endswith(".html"):
            assert "<script>alert" not in text, name


@pytest.mark.parametrize("name", ["BC/10%", "SAC#5", "iql"])
def test_algorithms_of_any_name_have_a_page_that_links_reach(store, tmp_path, name):
    fill(store, [A], complete(name, A), complete("m", A))
    pages.write(store, tmp_path)
    assert (tmp_path / pages.algorithm_page(name)).is_file()
    for file in tmp_path.rglob("*.html"):
        for link in re.findall(r'href="([^"#]+\.html)', file.read_text()):
            assert (file.parent / link).resolve().is_file(), (file, link)


def test_equal_databases_give_equal_files(tmp_path):
    for folder in ("a", "b"):
        with synthetic.store(methods=2, seeds=3, tasks=2) as store:
            pages.write(store, tmp_path / folder)
    files = sorted(file for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(files) > 20
    for file in files:
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_files_to_download_hold_every_score_and_every_gap(tmp_path):
    import pandas as pd

    with synthetic.store(methods=2, seeds=3, tasks=2, simulators=1) as store:
        pages.write(store, tmp_path)
    data = tmp_path / "data"
    frame = pd.read_csv(
        data / "scores.csv",
        keep_default_na=False,
        na_values={"score": [""]},
        float_precision="round_trip",
    )
    assert len(frame) == 2 * 3 * 2
    assert list(frame.columns) == list(pages.COLUMNS)
    (gap,) = frame[frame.score.isna()].missing
    assert gap == "diverged"
    again = pd.read_parquet(data / "scores.parquet")
    assert (again.score.dropna() == frame.score.dropna()).all()
    assert len(json.loads((data / "scores.json").read_text())) == len(frame)


def test_pages_name_no_address_outside(tmp_path):
    with synthetic.store(methods=2, seeds=1, tasks=2, simulators=1) as store:
        pages.write(store, tmp_path)
    namespace = "http://www.w3.org/2000/svg"
    for name, text in text_of(tmp_path).items():
        assert not re.findall(r"https?://|url\(|@import", text.replace(namespace, "")), name


def test_the_overview_stays_small_where_there_are_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "OVERVIEW_ROWS", 4)
    with synthetic.store(methods=6, seeds=1, evaluations=1, tasks=1, simulators=2) as store:
        pages.write(store, tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert text.count("data-family=") == 4
    assert text.count("The first 2 of 6 methods") == 2
    (track, _) = (tmp_path / "tracks").glob("*.html")
    assert track.read_text().count("data-family=") == 6


def test_nothing_to_show_is_said(store, tmp_path):
    fill(store, [A], trial("m", A, 0, status=None))
    with pytest.raises(ValueError, match="no run to show"):
        pages.write(store, tmp_path)


def test_the_command_shows_what_came_with_the_package(tmp_path, capsys):
    cli.app(["leaderboard", "--html", str(tmp_path)], standalone_mode=False)
    text = (tmp_path / "index.html").read_text()
    assert "td3_bc" in text
    assert "surrogate" in text
    page = next((tmp_path / "datasets").glob("surrogate-hopper*")).read_text()
    assert "never ranked: other data (local here)" in page
    assert "Diffusion-QL, Table 1" in page
    assert page.count("the authors&#39;") > 0
    assert "Differs from the default" in next((tmp_path / "cells").glob("td3*")).read_text()
    assert str(tmp_path / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-3, 12, [-5, 0, 5, 10, 15]), (2, 2, [2])],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    assert svg.nice_ticks(low, high) == expected
