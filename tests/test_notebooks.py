"""Notebooks: calls only, no stored outputs, and they run on what ships and on a small database."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
import synthetic

from analysis import explorer
from results import archive

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "analysis" / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_there_are_the_four_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"leaderboard", "paper_figures", "reproduction", "datasets"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_stripped_and_defines_nothing(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in code(path):
        assert cell.outputs == []
        assert cell.execution_count is None
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell.source


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "rows.parquet"
    with synthetic.store(methods=2, seeds=3, evaluations=2, tasks=1, simulators=2) as store:
        archive.write(store, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shipped", "small"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, source, small, monkeypatch, tmp_path):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    if source == "small":
        monkeypatch.setenv("HARNESS_DB", str(small))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    if (path.stem, source) == ("datasets", "small"):  # its datasets have no cards
        with pytest.raises(CellExecutionError, match="no stored card has returns"):
            client.execute()
        return
    client.execute()
    assert any(output for cell in notebook.cells for output in cell.get("outputs", ()))


def test_cards_of_shipped_datasets_have_sizes_and_ordered_returns():
    with archive.open_results() as store:
        frame = explorer.card_frame(store)
    assert (frame.steps > 0).all()
    assert (frame.return_min <= frame.return_median).all()
    assert (frame.return_median <= frame.return_max).all()
    figure = explorer.returns_figure(frame)
    assert len(figure.axes) == len(frame)
