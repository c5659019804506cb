"""Figures for papers: files, widths, fonts, data, equal bytes, and what is never drawn together."""

from __future__ import annotations

import json
import re

import pytest
import synthetic
from test_analysis_leaderboard import A, complete, fill, trial

from analysis import paper
from results.store import Store


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    with synthetic.store(methods=3, seeds=3, evaluations=3, tasks=2, simulators=1) as store:
        paths = paper.write(store, folder, "icml", command="harness figures --style icml")
        for path in paths:
            assert path.is_file()
    return folder


def test_every_figure_comes_as_vectors_and_pixels_with_its_data_and_command(figures):
    for name in paper.FIGURES:
        for suffix in (*paper.SUFFIXES, ".csv", ".json"):
            assert (figures / f"{name}{suffix}").stat().st_size > 100, name
        source = json.loads((figures / f"{name}.json").read_text())
        assert source["command"] == "harness figures --style icml"
        assert source["runs"]["method_01"]["mujoco/hopper/medium-v0"]


def test_fonts_are_embedded_and_widths_are_the_venues(figures):
    for name in paper.FIGURES:
        content = (figures / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in content, name
        assert b"/Type3" not in content, name
        (width,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
        assert float(width) / 72 in (6.75, 3.25), name
        assert "<text" not in (figures / f"{name}.svg").read_text()  # glyphs are outlines


def test_data_beside_a_figure_are_what_is_drawn(figures):
    import pandas as pd

    curves = pd.read_csv(figures / "learning_curves.csv")
    # A seed of the first method diverged on one task; its others are drawn.
    assert len(curves) == 3 * 2 * 3
    assert set(curves.seeds) == {2, 3}
    assert curves[curves.seeds == 3].low.notna().all()
    assert curves[curves.seeds == 2].low.isna().all()
    pairs = pd.read_csv(figures / "probability_of_improvement.csv")
    assert len(pairs) == 1  # the method that lacks a seed is not compared
    profile = pd.read_csv(figures / "performance_profiles.csv")
    assert profile.groupby("method").share.agg(["max", "min"]).to_numpy().tolist() == [[1, 0]] * 2


def test_equal_databases_give_equal_figures(figures, tmp_path):
    with synthetic.store(methods=3, seeds=3, evaluations=3, tasks=2, simulators=1) as store:
        paper.write(store, tmp_path, "icml", command="harness figures --style icml")
    files = sorted(figures.iterdir())
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_simulators_are_drawn_apart(tmp_path):
    with synthetic.store(methods=1, seeds=1, evaluations=1, tasks=1, simulators=2) as store:
        ids = store.runs().query("status == 'done'")
        assert ids.empty  # the only seed diverged
        with pytest.raises(ValueError, match="no finished run"):
            paper.write(store, tmp_path, "iclr")
    with Store.open("sqlite://") as store:
        fill(store, [A], complete("m", A), complete("m", A, simulator="mujoco 9", variant="w"))
        paths = paper.write(store, tmp_path, "iclr")
    assert len({path.parent for path in paths}) == 2
    assert all(path.parent.parent == tmp_path for path in paths)


def test_series_differ_by_colour_and_then_by_line():
    looks = [paper.series_style(place) for place in range(16)]
    assert len({look["color"] for look in looks}) == 8
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 16


def test_an_unknown_style_and_nothing_to_draw_are_said(tmp_path):
    with Store.open("sqlite://") as store:
        fill(store, [A], trial("m", A, 0, status="running"))
        with pytest.raises(ValueError, match="expected one of neurips, icml, iclr"):
            paper.write(store, tmp_path, "nature")
        with pytest.raises(ValueError, match="no finished run"):
            paper.write(store, tmp_path, "iclr")
