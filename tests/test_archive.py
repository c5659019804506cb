"""An archive gives back what was stored, and what reads a database reads it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from analysis import leaderboard
from analysis.load import load_scores
from results import archive
from results.archive import Merged
from results.errors import StoreError
from results.records import DetectionRecord, EvalRecord, LatencyRecord, MetricRecord, RunRecord
from results.store import Store
from tests.test_analysis_leaderboard import A, B, complete, trial


@pytest.fixture
def store():
    with Store.open("sqlite://") as store:
        records = [A, B, *complete("m", A), *complete("n", A), *complete("m", B)]
        records += trial("n", B, 0, status="diverged")
        run = next(record.run_id for record in records if isinstance(record, RunRecord))
        records += [MetricRecord(run, 5, "loss", float("nan")), MetricRecord(run, 5, "q", 1 / 3)]
        numbers = (1, False, "cpu", 1, 9, 0.5, 0.75, (0.5, 0.5))
        records.append(LatencyRecord(run, "2031-05-06T07:08:09Z", *numbers, {}, {"cpu": "A"}))
        for dataset in (A, B):
            numbers = ({"levels": 1}, 3, "uniform", 200, 0.9, 0.8, 0.4, "2031-05-06T07:08:09Z")
            records.append(
                DetectionRecord(dataset.dataset_id, dataset.digest, "cvae", *numbers, "abc", True)
            )
        store.append(records)
        yield store


def test_an_archive_gives_the_same_records_and_leaderboard(store, tmp_path):
    path = tmp_path / "deep" / "rows.parquet"
    count = archive.write(store, path)
    with archive.open_archive(path) as again:
        assert again.counts() == store.counts()
        assert sum(again.counts().values()) == count
        kinds = archive.KINDS.values()
        assert repr(list(again.records(kinds))) == repr(list(store.records(kinds)))  # nan != nan
        assert leaderboard.build(again).render("csv") == leaderboard.build(store).render("csv")
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_only_the_trials_asked_for_are_written(store, tmp_path):
    wanted = [row.trial_id for row in store.trials().itertuples() if row.dataset_id == B.dataset_id]
    archive.write(store, tmp_path / "b.parquet", wanted)
    with archive.open_archive(tmp_path / "b.parquet") as again:
        assert set(again.trials().trial_id) == set(wanted)
        assert set(again.datasets().dataset_id) == {B.dataset_id}
        assert set(again.evaluations().trial_id) <= set(wanted)
        assert set(again.detections().dataset_id) == {B.dataset_id}


def test_detections_are_kept_where_nothing_was_trained(tmp_path):
    path = tmp_path / "rows.parquet"
    found = ("cvae", {}, 0, "uniform", 9, 0.9, 0.8, 0.4, "2031-05-06T07:08:09Z", "abc", False)
    with Store.open("sqlite://") as store:
        store.append([A, DetectionRecord(A.dataset_id, A.digest, *found)])
        assert archive.write(store, path) == 2
    with archive.open_archive(path) as again:
        (row,) = again.detections().itertuples()
        assert (row.detector, row.auroc, row.git_commit) == ("cvae", 0.9, "abc")


def test_merging_makes_trials_of_elsewhere_done_here_and_again_changes_nothing(store, tmp_path):
    first = [row.trial_id for row in store.trials().itertuples() if row.dataset_id == A.dataset_id]
    rest = [row.trial_id for row in store.trials().itertuples() if row.dataset_id != A.dataset_id]
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    sizes = [
        archive.write(store, path, ids) for path, ids in zip(parts, (first, rest), strict=True)
    ]
    with Store.open("sqlite://") as here:
        assert archive.merge(here, parts) == [Merged(size, size, 0, 0) for size in sizes]
        assert here.counts() == store.counts()
        assert {run.status for run in here.statuses(first).values()} == {"done"}
        assert archive.merge(here, parts) == [Merged(size, 0, 0, 0) for size in sizes]


def trained(score, hour, status="done", steps=(10, 20, 30, 40)):
    """Records of one trial, trained by a machine that began at some hour."""
    records = trial("m", A, 0, status=status, returns={step: [score, score] for step in steps})
    time = f"2031-05-06T{hour:02d}:00:00Z"
    return [
        dataclasses.replace(record, started_at=time) if isinstance(record, RunRecord) else record
        for record in records
    ]


def archived(tmp_path, records):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
    with Store.open("sqlite://") as elsewhere:
        elsewhere.append([A, *records])
        archive.write(elsewhere, path)
    return path


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_two_trainings_of_a_trial_are_never_mixed(tmp_path, status):
    """One began here and stopped, the other is done elsewhere; then ours is continued as well."""
    with Store.open("sqlite://") as here:
        here.append([A, *trained(90, 7, status, (10, 20, 30))])
        path = archived(tmp_path, trained(10, 8))
        (merged,) = archive.merge(here, [path])
        assert (merged.known, merged.unfinished) == (0, 0)
        assert load_scores(here, select="last-4").matrix("m") == [[0.1]]
        assert archive.merge(here, [path])[0].added == 0
        here.append(trained(90, 7))
        assert set(here.evaluations().groupby("run_id").episode_return.nunique()) == {1}
        assert load_scores(here, select="last-4").matrix("m") == [[0.1]]


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_an_outcome_stays_whatever_is_merged(tmp_path, status):
    with Store.open("sqlite://") as here:
        here.append([A, *trained(90, 7)])
        before = here.counts()
        (merged,) = archive.merge(here, [archived(tmp_path, trained(10, 8, status))])
        assert (merged.added, merged.known) == (0, 1)
        assert here.counts() == before


def test_what_is_unfinished_elsewhere_is_not_continued_here(tmp_path):
    path = archived(tmp_path, trained(90, 7, "interrupted", (10, 20, 30)))
    with Store.open("sqlite://") as here:
        (merged,) = archive.merge(here, [path])
        assert (merged.unfinished, here.counts()["runs"]) == (1, 0)
        here.append(trained(10, 8))
        assert load_scores(here, select="best").matrix("m") == [[0.1]]
    with archive.open_archive(path) as shown:  # to look at, it is there
        assert [state.status for state in shown.states()] == ["interrupted"]


def test_a_second_attempt_of_the_same_machine_comes_along(tmp_path):
    first, second = trained(0, 7, "diverged", (10,)), trained(60, 9)
    second = [
        dataclasses.replace(record, run_id=record.run_id.replace("#1", "#2"))
        if isinstance(record, (RunRecord, EvalRecord))
        else record
        for record in second
    ]
    second = [
        dataclasses.replace(record, attempt=2) if isinstance(record, RunRecord) else record
        for record in second
    ]
    with Store.open("sqlite://") as here:
        here.append([A, *first])
        path = archived(tmp_path, [*first, *second])
        assert archive.merge(here, [path])[0].known == 0
        assert load_scores(here).matrix("m") == [[0.6]]
    with archive.open_archive(path) as shown:
        assert load_scores(shown).matrix("m") == [[0.6]]


def test_nothing_is_merged_if_one_of_the_files_is_no_archive(store, tmp_path):
    archive.write(store, tmp_path / "good.parquet")
    with Store.open("sqlite://") as here:
        with pytest.raises(StoreError, match=r"none\.parquet: no such archive"):
            archive.merge(here, [tmp_path / "good.parquet", tmp_path / "none.parquet"])
        assert sum(here.counts().values()) == 0


def test_what_is_no_archive_is_refused_by_name(store, tmp_path):
    with pytest.raises(StoreError, match=r"none\.parquet: no such archive"):
        archive.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(StoreError, match=r"text\.parquet: not an archive"):
        archive.read(tmp_path / "text.parquet")
    with pytest.raises(StoreError, match="no rows of these trials"):
        archive.write(store, tmp_path / "empty.parquet", ["unknown"])


def test_the_leaderboard_of_an_empty_home_shows_what_is_shipped(tmp_path):
    command = [sys.executable, "-m", "harness.cli", "leaderboard", "--format", "json"]
    found = subprocess.run(
        [*command, "--home", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    shown = json.loads(found.stdout)
    shipped = archive.shipped()
    assert shipped
    assert shipped[0].parent.name in found.stderr
    rich = subprocess.run(
        [*command[:-2], "--home", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    for path in shipped:  # one leaderboard each: they share neither tasks nor protocol
        assert f" {path.parent.name} " in rich.stdout
    assert "Not aggregated" not in rich.stdout
    with archive.open_archive(*shipped) as store:
        assert shown == json.loads(leaderboard.build(store).render("json"))
