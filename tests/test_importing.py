"""Foreign runs: what they become, and that nothing in a foreign file is executed."""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis import leaderboard
from analysis.load import load_scores
from analysis.verdicts import reproduce
from harness.cli import app
from results import importing
from results.importing import ImportFileError, Told, import_file, load_pickle
from results.published import published_scores
from results.store import Store

HOPPER = "hopper-medium-v2"
# Four seeds whose means and standard deviations (ddof 0) are cells of CORL's tables.
CORL = {
    "TD3+BC": {
        "halfcheetah-medium-v2": [[40.0, 48.28], [41.0, 47.92], [30.0, 48.28], [20.0, 47.92]],
        HOPPER: [[58.0, 60.37 + d] for d in (3.49, -3.49, 3.49, -3.49)],
    },
    "IQL": {"halfcheetah-medium-v2": [[1.0, 48.31 + d] for d in (0.22, -0.22, 0.22, -0.22)]},
}


@pytest.fixture
def store():
    with Store.open("sqlite://") as found:
        yield found


def dump(path: Path, content, protocol=pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


# ------------------------------------------------------------------------------------- safety


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, protocol):
    for content in (
        Evil(tmp_path / "ran"),
        {"BC": {HOPPER: [Evil(tmp_path / "ran")]}},
        np.array([Evil(tmp_path / "ran")], dtype=object),
    ):
        with pytest.raises(ImportFileError, match=r"asks for .*system|asks for _codecs"):
            load_pickle(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [eval, print, Path("x"), collections.defaultdict(list), np.load, np.random.default_rng(0)],
)
def test_any_other_name_is_refused(content):
    with pytest.raises(ImportFileError, match="asks for"):
        load_pickle(io.BytesIO(pickle.dumps(content)))


def test_attributes_of_admitted_names_are_refused():
    text = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    with pytest.raises(ImportFileError, match=r"asks for numpy\.ndarray\.tofile"):
        load_pickle(io.BytesIO(text))


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x05X\xff\xff", b"Pid\n."])
def test_what_is_no_pickle_is_refused(data):
    with pytest.raises(ImportFileError):
        load_pickle(io.BytesIO(data))


def test_builtin_values_and_arrays_are_read():
    content = {
        "a": [1, 2.5, None, True, "x", (b"y", 3)],
        "b": np.arange(6.0).reshape(2, 3),
        "c": np.float64(0.5),
        "d": np.array([{"k": 1}], dtype=object),
        "e": collections.OrderedDict(z=1),
    }
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        found = load_pickle(io.BytesIO(pickle.dumps(content, protocol=protocol)))
        assert found["a"] == content["a"]
        assert np.array_equal(found["b"], content["b"])
        assert (found["c"], found["d"][0], found["e"]) == (0.5, {"k": 1}, {"z": 1})


# ------------------------------------------------------------------------------------- formats


def test_corls_scores_give_corls_tables_to_the_last_digit(store, tmp_path):
    """CORL's convention: np.std (ddof 0) over 4 seeds, two decimals; last, and best per seed."""
    import_file(store, dump(tmp_path / "scores.pickle", CORL), "corl")
    for select, table in (("last", "corl_readme_last"), ("best", "corl_readme_best")):
        printed = {(s.name, s.dataset): s for s in published_scores() if s.table.table == table}
        scores = load_scores(store, select=select)
        for name, method in (("TD3+BC", "td3_bc"), ("IQL", "iql_corl")):
            for dataset, curves in CORL[name].items():
                cell = scores.cells[f"{method} (imported)", dataset]
                points = 100 * np.array([cell.scores[seed] for seed in range(4)])
                expected = [max(c) if select == "best" else c[-1] for c in curves]
                assert points == pytest.approx(expected, abs=1e-9)
                if select == "last":
                    ours = (f"{points.mean():.2f}", f"{points.std():.2f}")
                    theirs = printed[name, dataset]
                    assert ours == (f"{theirs.value:.2f}", f"{theirs.spread:.2f}")


def test_imported_scores_are_compared_with_the_table_they_are(store, tmp_path):
    import_file(store, dump(tmp_path / "scores.pickle", CORL), "corl", Told(every=500_000))
    found = reproduce(store, "iql_corl", "halfcheetah-medium-v2").judgements
    (last,) = [j for j in found if j.selection == "last"]
    assert last.verdict == "reproduced"
    assert last.difference.value == pytest.approx(0.0, abs=1e-9)
    assert any("imported" in remark for remark in last.remarks)


def test_d3rlpys_log_is_one_seed(store, tmp_path):
    file = tmp_path / "environment.csv"
    file.write_text("1,1000,500.0\n2,2000,1607.0138475\n")
    with pytest.raises(ImportFileError, match="does not say the algorithm: give --algorithm"):
        import_file(store, file, "d3rlpy")
    for seed in (0, 1):
        import_file(store, file, "d3rlpy", Told("cql", HOPPER, seed))
    cell = load_scores(store).cells["cql (imported)", HOPPER]
    assert cell.scores == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}


def unifloral(path: Path, returns, arguments) -> Path:
    np.savez_compressed(path, final_returns=returns, final_scores=returns * 0, args=arguments)
    return path


def test_unifloral_results_are_read_with_their_arguments(store, tmp_path):
    file = unifloral(
        tmp_path / "rebrac_hopper-medium-v2_2025-01-02_03-04-05.npz",
        np.array([[0.0, 3214.027695], [0.0, 3214.027695]]),
        {"seed": 3, "algorithm": "rebrac", "dataset": HOPPER, "num_updates": 1_000_000},
    )
    (run,) = import_file(store, file, "unifloral")
    assert (run.algorithm, run.dataset, run.seed) == ("rebrac", HOPPER, 3)
    assert run.evaluations == {1_000_000: [0.0, 3214.027695, 0.0, 3214.027695]}
    cell = load_scores(store).cells["rebrac (imported)", HOPPER]
    assert cell.scores[3] == pytest.approx((3214.027695 / 2 + 20.272305) / 3254.572305)


def test_unifloral_arguments_cannot_run_code_and_may_be_told(store, tmp_path):
    name = "td3_bc_hopper-medium-v2_2025-01-02_03-04-05.npz"
    evil = unifloral(tmp_path / name, np.zeros(2), {"seed": Evil(tmp_path / "ran")})
    with pytest.raises(ImportFileError, match="asks for"):
        import_file(store, evil, "unifloral")
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / name, final_returns=np.ones(2))
    with pytest.raises(ImportFileError, match="--seed"):
        import_file(store, tmp_path / name, "unifloral")
    (run,) = import_file(store, tmp_path / name, "unifloral", Told(seed=1))
    assert (run.algorithm, run.dataset, run.seed) == ("td3_bc", HOPPER, 1)


def test_a_csv_has_one_line_per_evaluation_or_episode(store, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        "algorithm,dataset,seed,step,score\n"
        "mine,hopper-medium-v2,0,10,50\nmine,hopper-medium-v2,0,20,60\n"
        "mine,hopper-medium-v2,0,20,70\nmine,my-data,0,20,80\n"
    )
    runs = import_file(store, file, "csv")
    assert len(runs) == 2
    scores = load_scores(store)
    assert scores.cells["mine (imported)", HOPPER].scores == {0: pytest.approx(0.65)}
    assert scores.cells["mine (imported)", "my-data"].scores == {0: pytest.approx(0.8)}
    sources = {task.name: task.ref_source for task in scores.tasks}
    assert sources == {HOPPER: f"D4RL constants ({HOPPER})", "my-data": "imported scores"}


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("csv", "algorithm,dataset,seed\na,b,0\n", "one column score or return"),
        ("csv", "algorithm,dataset,seed,score\na,b,0,nan\n", "line 2: 'nan' is not a finite"),
        ("csv", "algorithm,dataset,seed,score\na,b,first,1\n", "line 2: 'first' is not a whole"),
        ("csv", "dataset,seed,score\nb,0,1\n", "does not say the algorithm"),
        ("csv", "algorithm,dataset,seed,score\n", "no runs in it"),
        ("d3rlpy", "1,1000\n", "line 1: expected epoch, step, value"),
        ("corl", "text", "not a pickle"),
        ("unifloral", "text", "not a result of Unifloral"),
        ("wandb", "text", "unknown format 'wandb'; expected one of corl"),
    ],
)
def test_what_is_not_valid_is_refused_and_nothing_is_written(
    store, tmp_path, format, text, message
):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ImportFileError, match=message):
        import_file(store, tmp_path / "file", format)
    assert store.counts()["trials"] == 0


@pytest.mark.parametrize(
    "content",
    [[1], {"BC": [1]}, {"BC": {HOPPER: [[]]}}, {"BC": {HOPPER: 5}}, {"BC": {HOPPER: [5]}}],
)
def test_a_pickle_of_another_shape_is_refused(store, tmp_path, content):
    with pytest.raises(ImportFileError, match=r"expected|no evaluation"):
        import_file(store, dump(tmp_path / "p", content), "corl")


# ------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("file_format", ["csv", "corl"])
def test_one_name_for_the_algorithms_of_a_file_is_refused(store, tmp_path, file_format):
    path = tmp_path / "several"
    if file_format == "csv":
        path.write_text("algorithm,dataset,seed,score\nIQL,d,1,10\nCQL,d,1,90\n")
    else:
        dump(path, {"IQL": {HOPPER: [[10.0]]}, "CQL": {HOPPER: [[90.0]]}})
    with pytest.raises(ImportFileError, match=r"algorithm \(CQL, IQL\).*leave --algorithm out"):
        import_file(store, path, file_format, Told(algorithm="x"))
    assert sum(store.counts().values()) == 0
    assert len(import_file(store, path, file_format)) == 2


def test_importing_again_changes_nothing_and_another_file_is_refused(store, tmp_path):
    file = dump(tmp_path / "scores.pickle", CORL)
    import_file(store, file, "corl")
    before = store.counts()
    import_file(store, file, "corl")
    assert store.counts() == before
    other = dump(tmp_path / "other.pickle", {"IQL": {"halfcheetah-medium-v2": [[2.0]]}})
    with pytest.raises(
        ImportFileError, match=r"another file \(scores.pickle\); give another --label"
    ):
        import_file(store, other, "corl")
    import_file(store, other, "corl", label="IQL, mine")
    assert "IQL, mine (imported)" in load_scores(store).methods


def test_the_leaderboard_shows_imported_runs_as_imported(store, tmp_path):
    import_file(store, dump(tmp_path / "scores.pickle", CORL), "corl")
    text = leaderboard.build(store).render("markdown")
    assert "td3\\_bc (imported)" in text
    assert "Simulator: imported" in text


def test_the_command(tmp_path):
    file = dump(tmp_path / "scores.pickle", CORL)
    arguments = ["import", str(file), "--format", "corl", "--home", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "12 imported runs of 3 methods x datasets" in result.stdout
    board = CliRunner().invoke(app, ["leaderboard", "--format", "csv", "--home", str(tmp_path)])
    assert "td3_bc (imported)" in board.stdout


def test_an_error_names_the_file_and_what_was_expected(store, tmp_path):
    file = tmp_path / "bad.pickle"
    file.write_text("text")
    with pytest.raises(ImportFileError, match=r"^bad\.pickle: not a pickle .* Expected CORL's"):
        import_file(store, file, "corl")
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist; expected a file of"):
        import_file(store, tmp_path / "none.csv", "csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        import_file(store, tmp_path, "csv")


def test_every_format_has_its_reader():
    assert set(importing.FORMATS) == {"corl", "d3rlpy", "unifloral", "csv"}
