"""The results database, the same tests on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results import connection as connecting
from results import migrations, schema
from results.records import (
    ArtifactRecord,
    DatasetRecord,
    DetectionRecord,
    EvalRecord,
    LatencyRecord,
    MetricRecord,
    RunRecord,
    TrialRecord,
)
from results.store import MissingParentError, Store, StoreError, run_order_key

ROOT = Path(__file__).parent.parent
POSTGRES = os.environ.get("HARNESS_TEST_POSTGRES", "")

DATASET = DatasetRecord(
    dataset_id="test/line/medium-v0",
    digest="d1",
    env_id="Line-v0",
    relation="generated",
    ref_min=-1.5,
    ref_max=10.0,
    ref_source="measured",
    num_steps=1000,
    num_episodes=10,
    card={"author": "Ünal", "levels": [1, 2]},
)


def make_trial(name: str = "t0", **changes) -> TrialRecord:
    values = {
        "trial_id": name,
        "variant_id": "v0",
        "label": "quiet_ql",
        "algorithm": "quiet_ql",
        "revision": 1,
        "dataset_id": DATASET.dataset_id,
        "dataset_digest": DATASET.digest,
        "data": {"reward": "none"},
        "config": {"steps": 100, "lr": 3e-4, "hidden": (256, 256), "clip": math.inf},
        "seed": 0,
        "evaluation": {"every": 10},
        "simulator": "none",
        "created_at": "2031-05-06T07:08:09Z",
    }
    return TrialRecord(**{**values, **changes})


def make_run(name: str = "r0", trial_id: str = "t0", **changes) -> RunRecord:
    values = {
        "run_id": name,
        "trial_id": trial_id,
        "attempt": 1,
        "status": "running",
        "started_at": "2031-05-06T07:08:09Z",
        "ended_at": None,
        "git_commit": "",
        "git_dirty": False,
        "versions": {"torch": "2.13"},
        "hardware": {"cpus": 2},
        "device": "cpu",
        "compiled": False,
        "stack": (0, 1),
        "timings": {"train": 1.25},
        "segments": ({"host": "a"},),
    }
    return RunRecord(**{**values, **changes})


def make_evals(run_id: str = "r0", steps=(10, 20), episodes: int = 3) -> list[EvalRecord]:
    return [
        EvalRecord(run_id, step, episode, 1000 + episode, step + episode / 4, 50)
        for step in steps
        for episode in range(episodes)
    ]


def make_latency(**changes) -> LatencyRecord:
    values = {
        "run_id": "r0",
        "measured_at": "2031-05-06T07:08:09Z",
        "batch": 1,
        "compiled": False,
        "device": "cpu",
        "threads": 1,
        "calls": 100,
        "median_ms": 1.5,
        "p99_ms": 3.0,
        "round_medians_ms": (1.25, 1.75),
        "versions": {"torch": "2.13"},
        "hardware": {"cpu": "A"},
    }
    return LatencyRecord(**{**values, **changes})


FAMILY = [DATASET, make_trial(), make_run(), *make_evals()]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request, tmp_path):
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/results.db"
        return
    if not POSTGRES:
        pytest.skip("HARNESS_TEST_POSTGRES is not set; see scripts/postgres_for_tests.sh")
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(connecting.parse_url(POSTGRES))
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))
    yield f"{POSTGRES}?options=-csearch_path%3D{name}"
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()


@pytest.fixture
def store(url):
    with Store.open(url) as store:
        yield store


def content(store: Store) -> dict[str, list[tuple]]:
    """Every row of every table, in a form that compares."""
    with store._engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table)).all()))
            for table in schema.metadata.sorted_tables
        }


# ------------------------------------------------------------------ what is stored comes back


def test_records_come_back_as_typed_frames(store):
    artifact = ArtifactRecord("s0", "r0", "policy", "ab/s0", "f00", 12, "2031-05-06T07:08:09.5Z")
    metric = MetricRecord("r0", 10, "critic_loss", 0.125)
    assert store.append([*FAMILY, metric, artifact]) == len(FAMILY) + 2

    trial = store.trials().iloc[0]
    assert trial.config == {"steps": 100, "lr": 3e-4, "hidden": [256, 256], "clip": math.inf}
    assert str(trial.created_at) == "2031-05-06 07:08:09+00:00"
    run = store.runs().iloc[0]
    assert run.stack == [0, 1]
    assert run.timings == {"train": 1.25}
    assert run.error is None
    assert "order_key" not in store.runs()
    assert store.datasets().iloc[0].card == {"author": "Ünal", "levels": [1, 2]}
    assert store.artifacts().iloc[0].num_bytes == 12

    evaluations = store.evaluations(["t0"])
    assert list(evaluations.columns) == [
        *("trial_id", "attempt", "run_id", "step", "episode"),
        *("env_seed", "episode_return", "length", "mode"),
    ]
    assert evaluations.dtypes.astype(str).to_dict() == {
        "trial_id": "object",
        "attempt": "int64",
        "run_id": "object",
        "step": "int64",
        "episode": "int64",
        "env_seed": "int64",
        "episode_return": "float64",
        "length": "int64",
        "mode": "Int64",
    }
    assert evaluations.episode_return.tolist() == [10, 10.25, 10.5, 20, 20.25, 20.5]
    assert store.metrics(names=["critic_loss"]).value.tolist() == [0.125]
    assert store.metrics(names=["other"]).empty
    tables = ("datasets", "trials", "runs", "evals", "metrics", "artifacts", "latencies")
    assert store.counts() == dict(
        zip((*tables, "detections"), (1, 1, 1, 6, 1, 1, 0, 0), strict=True)
    )


def test_a_latency_measured_again_stays_beside_the_first_and_both_come_back(store):
    first = make_latency()
    again = make_latency(measured_at="2031-05-06T08:00:00Z", median_ms=2.0)
    other = make_latency(batch=256)
    assert store.append([*FAMILY, again, first, other, first]) == len(FAMILY) + 3
    assert list(store.records([LatencyRecord], ["t0"])) == [first, other, again]
    frame = store.latencies(["t0"])
    assert frame.median_ms.tolist() == [1.5, 1.5, 2.0]
    assert frame.round_medians_ms[0] == [1.25, 1.75]
    assert frame.trial_id.tolist() == ["t0"] * 3
    assert store.latencies(["unknown"]).empty
    with pytest.raises(MissingParentError, match=r"run r7 \(needed by a latency\)"):
        store.append([make_latency(run_id="r7")])


def test_detections_belong_to_a_dataset_and_the_first_stays(store):
    time = "2031-05-06T07:08:09.5Z"
    config = {"steps": 10, "levels": 1}
    record = DetectionRecord(
        "d", "f" * 64, "cvae", config, 3, "uniform", 200, 0.9, 0.8, 0.4, time, "abc", True
    )
    with pytest.raises(MissingParentError, match="needed by detector cvae"):
        store.append([record])
    parent = dataclasses.replace(FAMILY[0], dataset_id="d", digest="f" * 64)
    assert store.append([record, parent]) == 2
    assert store.append([dataclasses.replace(record, auroc=0.1)]) == 0
    (row,) = store.detections().itertuples()
    assert (row.detector, row.config, row.seed, row.auroc) == ("cvae", config, 3, 0.9)


def test_empty_frames_have_the_same_columns_and_types_as_full_ones(store):
    readers = (
        *(store.trials, store.runs, store.evaluations, store.metrics, store.evaluation_means),
        store.latencies,
    )
    empty = [read([]).dtypes.to_dict() for read in readers]
    store.append([*FAMILY, MetricRecord("r0", 1, "loss", 2.0), make_latency()])
    assert [read().dtypes.to_dict() for read in readers] == empty


def test_statuses_returns_the_record_that_was_appended(store):
    run = make_run(status="failed", ended_at="2031-05-06T08:00:00.25Z", error="Traceback ...")
    store.append([DATASET, make_trial(), run])
    (stored,) = store.statuses(["t0"]).values()
    assert stored == run
    assert store.statuses(["unknown"]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_survive(store, value):
    rows = [
        MetricRecord("r0", 1, "loss", value),
        EvalRecord("r0", 1, 0, 0, value, 5),
        EvalRecord("r0", 1, 1, 1, 2.0, 5),
    ]
    store.append([DATASET, make_trial(), make_run(timings={"train": value}), *rows])
    stored = store.metrics().value[0]
    assert stored == value or (math.isnan(stored) and math.isnan(value))
    stored = store.evaluations().episode_return[0]
    assert stored == value or (math.isnan(stored) and math.isnan(value))
    stored = store.runs().timings[0]["train"]
    assert stored == value or (math.isnan(stored) and math.isnan(value))
    mean = store.evaluation_means().mean_return[0]  # never the mean of the finite rest
    assert mean == value or (math.isnan(mean) and math.isnan(value))


def test_json_columns_are_canonical(store):
    store.append([DATASET, make_trial(config={"b": (1, 2), "a": {"z": None, "y": "ü"}})])
    with store._engine.connect() as connection:
        text = connection.execute(sa.text("SELECT config FROM trials")).scalar()
    assert text == '{"a":{"y":"\\u00fc","z":null},"b":[1,2]}'


def test_text_that_no_database_takes_is_stored_escaped(store):
    run = make_run(status="failed", error="nul \x00, lone surrogate \udc80, emoji \U0001f600")
    store.append([DATASET, make_trial(), run])
    error = store.statuses(["t0"])["t0"].error
    assert error == "nul \\x00, lone surrogate \\udc80, emoji \U0001f600"


def test_numpy_scalars_are_taken_as_numbers(store):
    import numpy as np

    numbers = (np.int64(10), np.int32(0), np.uint32(7), np.float32(0.5), np.int64(3), np.int8(2))
    row = EvalRecord("r0", *numbers)
    store.append([DATASET, make_trial(config={"x": np.arange(2)}), make_run(), row])
    assert store.evaluations().iloc[0].tolist() == ["t0", 1, "r0", 10, 0, 7, 0.5, 3, 2]
    assert store.trials().config[0] == {"x": [0, 1]}


# ------------------------------------------------------------------ appending


def test_appending_again_changes_nothing(store):
    records = [*FAMILY, MetricRecord("r0", 1, "loss", math.nan)]
    store.append(records)
    before = content(store)
    assert store.append(records) == 0
    assert content(store) == before


def test_the_first_row_of_an_evaluation_stays(store):
    store.append([*FAMILY])
    store.append([dataclasses.replace(FAMILY[3], episode_return=-99.0)])
    assert store.evaluations().episode_return[0] == 10


def test_records_may_come_in_any_order(store):
    assert store.append(reversed(FAMILY)) == len(FAMILY)


def test_a_missing_parent_is_named_and_nothing_is_written(store):
    with pytest.raises(MissingParentError, match=r"run r7 \(needed by an evaluation\)"):
        store.append([DATASET, make_trial(), make_run(), *make_evals("r7")])
    with pytest.raises(MissingParentError, match=r"trial t7 \(needed by run r7\)"):
        store.append([make_run("r7", "t7")])
    other = make_trial(dataset_digest="d2")
    with pytest.raises(MissingParentError, match=r"line/medium-v0 with digest d2 .*trial t0"):
        store.append([DATASET, other])
    orphan = ArtifactRecord("s0", "r9", "policy", "p", "f", 1, "2031-05-06T07:08:09Z")
    with pytest.raises(MissingParentError, match=r"run r9 \(needed by artifact s0\)"):
        store.append([orphan])
    assert sum(store.counts().values()) == 0
    store.append([dataclasses.replace(orphan, run_id=None)])  # imported: no run made it


def test_many_missing_parents_are_counted_not_listed(store):
    with pytest.raises(MissingParentError, match="and 15 more"):
        store.append([EvalRecord(f"r{i}", 0, 0, 0, 0.0, 1) for i in range(20)])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make_run(status="finished"), "status is 'finished'.*running, done"),
        (make_run(started_at="yesterday"), "RunRecord.started_at: .*'yesterday'.*ISO 8601"),
        (make_run(ended_at="2031-05-06 07:08:09"), "ended_at.*ISO 8601"),
        (make_run(attempt=0), "attempts count from 1"),
        (make_run(versions={"torch": Path("/x")}), "RunRecord.versions: .*no JSON form"),
        (make_trial(seed=2**63), "TrialRecord.seed: .*64 bits"),
        (make_trial(seed=1.0), "TrialRecord.seed"),
        (make_trial(label=None), "TrialRecord.label: expected a string, got None"),
        (EvalRecord("r0", 1, 0, 0, "7", 1), "EvalRecord.episode_return: .*'7'.*step=1"),
        ({"kind": "run"}, "cannot append dict"),
    ],
)
def test_a_record_that_cannot_be_stored_is_refused_by_field(tmp_path, record, message):
    with Store.open("sqlite://") as store:
        store.append(FAMILY)
        before = content(store)
        with pytest.raises((TypeError, ValueError, OverflowError), match=message):
            store.append([*make_evals("r0", steps=(30,)), record])
        assert content(store) == before


# ------------------------------------------------------------------ the order of a run's states

DONE = {"status": "done", "ended_at": "2031-05-06T09:00:00Z", "steps_done": 100}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"steps_done": 10}, {"steps_done": 20}),
        ({"steps_done": 99}, {**DONE, "steps_done": 50}),
        ({"steps_done": 99}, {"status": "failed", "ended_at": "2031-05-06T08:00:00Z"}),
        ({"status": "interrupted", "ended_at": "2031-05-06T08:00:00Z"}, {"segments": ({}, {})}),
        ({"status": "failed", "ended_at": "2031-05-06T08:00:00Z", "segments": ({}, {})}, DONE),
        ({"segments": ({}, {}, {})}, DONE),
        ({"segments": ({}, {})}, {**DONE, "status": "diverged"}),
        # Fractions of a second do not disturb the order: '.' sorts before 'Z' in a string.
        (
            {"status": "failed", "ended_at": "2031-05-06T08:00:00Z"},
            {"status": "failed", "ended_at": "2031-05-06T08:00:00.5Z"},
        ),
    ],
)
def test_a_later_state_of_a_run_replaces_an_earlier_one_whatever_comes_first(url, earlier, later):
    states = [make_run(**earlier), make_run(**later)]
    with Store.open(url) as store:
        store.append([DATASET, make_trial()])
        for state in (*states, states[0]):
            store.append([state])
        assert store.statuses(["t0"])["t0"] == states[1]
    assert run_order_key(states[0]) < run_order_key(states[1])


RUN_STATES = st.builds(
    make_run,
    name=st.sampled_from(["r0", "r1"]),
    status=st.sampled_from(["running", "done", "failed", "diverged", "interrupted"]),
    ended_at=st.sampled_from([None, "2031-05-06T08:00:00Z", "2031-05-06T08:00:00.1Z"]),
    steps_done=st.integers(0, 3),
    segments=st.lists(st.just({"host": "a"}), max_size=2).map(tuple),
    error=st.sampled_from([None, "loss is nan", ""]),
    device=st.sampled_from(["cpu", "cuda"]),
)


def shuffled_deliveries(data, records):
    """The same records again, in another order, some twice, cut into batches."""
    order = data.draw(st.permutations(range(len(records))))
    again = data.draw(st.lists(st.sampled_from(range(len(records))), max_size=5))
    stream = [records[index] for index in [*order, *again]]
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=3).map(sorted))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), states=st.lists(RUN_STATES, min_size=1, max_size=6))
def test_any_order_and_repetition_of_records_gives_the_same_database(data, states):
    parents = [DATASET, make_trial()]
    children = [
        record
        for name in sorted({state.run_id for state in states})
        for record in (*make_evals(name), MetricRecord(name, 1, "loss", math.nan))
    ]
    # Children may precede their parents within a batch only, so runs are known beforehand.
    with Store.open("sqlite://") as expected, Store.open("sqlite://") as store:
        expected.append([*parents, *states, *children])
        first = {state.run_id: state for state in states}
        store.append([*first.values(), *parents])
        for batch in shuffled_deliveries(data, [*parents, *states, *children]):
            store.append(batch)
        assert content(store) == content(expected)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), states=st.lists(RUN_STATES, min_size=2, max_size=6))
def test_both_databases_agree_on_the_final_state_of_a_run(store, data, states):
    trial = make_trial(uuid.uuid4().hex)
    names = {name: uuid.uuid4().hex for name in ("r0", "r1")}
    states = [
        dataclasses.replace(state, run_id=names[state.run_id], trial_id=trial.trial_id)
        for state in states
    ]
    latest = {}
    for state in states:
        current = latest.setdefault(state.run_id, state)
        latest[state.run_id] = max(current, state, key=run_order_key)
    store.append([DATASET, trial])
    for batch in shuffled_deliveries(data, states):
        store.append(batch)
    stored = store.runs([trial.trial_id]).set_index("run_id")
    assert set(stored.index) == set(latest)
    for run_id, state in latest.items():
        row = stored.loc[run_id]
        assert (row.status, row.steps_done, row.device, row.error) == (
            *(state.status, state.steps_done, state.device, state.error),
        )


# ------------------------------------------------------------------ asking


def test_states_are_those_of_the_latest_attempts_and_of_trials_that_never_ran(store):
    failed = make_run("r0", status="failed", steps_done=30, error="why")
    again = make_run("r1", attempt=2, steps_done=40, started_at="2031-05-06T08:01:00Z")
    diverged = make_run("r2", "t1", status="diverged", steps_done=7, error="nan")
    trials = [make_trial(f"t{i}", seed=2 - i, variant_id="v0") for i in range(3)]
    store.append([DATASET, *trials, again, failed, diverged])
    found = {state.trial_id: state for state in store.states()}
    assert list(found) == ["t2", "t1", "t0"], "by seed"
    assert (found["t0"].status, found["t0"].steps_done, found["t0"].error) == ("running", 40, None)
    assert (found["t1"].status, found["t1"].steps_done, found["t1"].error) == ("diverged", 7, "nan")
    assert (found["t2"].status, found["t2"].steps_done, found["t2"].error) == (None, None, None)
    assert found["t0"].dataset_id == DATASET.dataset_id
    assert [state.trial_id for state in store.states(["t1", "unknown"])] == ["t1"]


def test_the_latest_attempt_is_the_status_of_a_trial(store):
    first = make_run("r0", status="failed", ended_at="2031-05-06T08:00:00Z")
    second = make_run("r1", attempt=2, started_at="2031-05-06T08:01:00Z")
    store.append([DATASET, make_trial(), second, first])
    assert store.statuses(["t0"])["t0"].run_id == "r1"
    assert store.runs(["t0"]).run_id.tolist() == ["r0", "r1"]


def test_what_is_done_is_not_undone_by_a_later_attempt(store):
    later = [make_run("r1", attempt=2), make_run("r2", attempt=3, status="diverged", error="nan")]
    store.append([DATASET, make_trial(), make_run("r0", **DONE), *later])
    assert store.statuses()["t0"].run_id == "r0"
    assert [state.status for state in store.states()] == ["done"]


def test_records_are_of_one_moment_although_others_write(url):
    with Store.open(url) as reader, Store.open(url) as writer:
        writer.append([DATASET, make_trial(), make_run(), *make_evals("r0", [10])])
        found = reader.records([RunRecord, EvalRecord])
        first = next(found)
        writer.append([make_trial("t1", seed=1), make_run("q0", "t1"), *make_evals("q0", [10])])
        assert {record.run_id for record in (first, *found)} == {"r0"}
        assert len(writer.evaluations()) == 6


def test_evaluation_means_take_one_attempt_per_trial_and_never_a_failed_one(store):
    runs = [
        make_run("r0", **DONE),
        make_run("r1", attempt=2, status="failed", ended_at="2031-05-06T08:00:00Z"),
        make_run("q0", "t1", **DONE),
        make_run("q1", "t1", attempt=2),
    ]
    trials = [make_trial("t0"), make_trial("t1", seed=1)]
    evals = [row for run in runs for row in make_evals(run.run_id, (10, 20))]
    store.append([DATASET, *trials, *runs, *evals])
    means = store.evaluation_means()
    assert means[["trial_id", "run_id", "step"]].values.tolist() == [
        *(["t0", "r0", 10], ["t0", "r0", 20], ["t1", "q0", 10], ["t1", "q0", 20]),
    ]
    assert means.mean_return.tolist() == [10.25, 20.25] * 2
    assert means.episodes.tolist() == [3] * 4
    assert means.status.tolist() == ["done"] * 4
    only_done = store.evaluation_means(["t1"], statuses=["done"])
    assert only_done.run_id.unique().tolist() == ["q0"]
    with pytest.raises(ValueError, match="'finished'"):
        store.evaluation_means(statuses=["finished"])


def test_evaluation_means_agree_with_pandas(store):
    generator = random.Random(0)
    trials = [make_trial(f"t{i}", seed=i) for i in range(4)]
    runs = [make_run(f"r{i}", f"t{i}", **DONE) for i in range(4)]
    evals = [
        EvalRecord(f"r{i}", step, episode, 0, generator.gauss(0, 5), generator.randrange(1, 99))
        for i in range(4)
        for step in (1, 2, 3)
        for episode in range(generator.randrange(1, 6))
    ]
    store.append([DATASET, *trials, *runs, *evals])
    means = store.evaluation_means(["t1", "t3"])
    groups = store.evaluations(["t1", "t3"]).groupby(["trial_id", "run_id", "step"])
    assert means.mean_return.tolist() == pytest.approx(groups.episode_return.mean().tolist())
    assert means.mean_length.tolist() == pytest.approx(groups.length.mean().tolist())
    assert means.episodes.tolist() == groups.size().tolist()


def test_a_filter_may_name_more_trials_than_a_statement_has_parameters(store):
    store.append(FAMILY)
    ids = ["t0", *(f"{number:064x}" for number in range(70_000))]
    assert store.trials(ids).trial_id.tolist() == ["t0"]
    assert len(store.evaluations(ids)) == 6
    assert set(store.statuses(ids)) == {"t0"}
    assert store.trials(["'); DROP TABLE trials; --"]).empty


def test_a_single_string_is_not_a_list_of_trials(store):
    with pytest.raises(TypeError, match="trial_ids is a list of strings, got the string 't0'"):
        store.trials("t0")


# ------------------------------------------------------------------ opening


def test_opening_twice_migrates_once_and_keeps_the_rows(url):
    with Store.open(url) as store:
        store.append(FAMILY)
        assert store.version == schema.VERSION
    with Store.open(url) as store:
        assert store.counts()["evals"] == 6
        assert store.describe()["version"] == schema.VERSION
        assert store.describe()["bytes"] > 0


def test_the_schema_version_is_the_newest_migration():
    assert migrations.known_versions()[-1] == schema.VERSION


def test_migrated_tables_equal_the_schema(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []


def make_old(url: str, version: str) -> None:
    """A database as an earlier release left it, with a row."""
    engine = connecting._postgres_engine if url.startswith("post") else connecting._sqlite_engine
    old = engine(connecting.parse_url(url), False)
    with old.begin() as connection:
        migrations.upgrade(connection, version)
        values = {**dataclasses.asdict(DATASET)}
        connection.execute(schema.datasets.insert(), values)
    old.dispose()


def test_an_old_database_is_brought_up_to_date_with_its_rows(url):
    make_old(url, "0001")
    with Store.open(url) as store:
        assert store.version == schema.VERSION
        assert store.counts()["datasets"] == 1
        indexes = sa.inspect(store._engine).get_indexes("runs")
        assert "ix_runs_trial_id_attempt" in {index["name"] for index in indexes}


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_store import *
number, start = int(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
with Store.open({url!r}) as store:
    trial = make_trial(f"t{{number}}", seed=number)
    run = make_run(f"r{{number}}", trial.trial_id)
    for step in range(5):
        store.append([DATASET, trial, run, *make_evals(run.run_id, (step,))])
    print(store.version)
"""


@pytest.mark.parametrize("kind", ["empty", "old"])
@pytest.mark.parametrize(
    "processes", [4, pytest.param(16, marks=pytest.mark.slow)], ids=lambda n: f"{n}-processes"
)
def test_processes_that_open_a_database_at_once_all_work(url, kind, processes):
    import time

    if kind == "old":
        make_old(url, "0001")
    code = WORKER.format(tests=str(ROOT / "tests"), url=url)
    start = time.time() + 0.5 * processes
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), str(start)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(processes)
    ]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert out.split() == [schema.VERSION]
    with Store.open(url) as store:
        assert store.counts()["trials"] == processes
        assert store.counts()["evals"] == processes * 15


CROWD = """
import json, os, random, sys, time
from results.store import Store
from tests.test_store import make_evals

url, writers, readers, appends, pause = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
children = []
for number in range(writers + readers):
    out, into = os.pipe()
    if os.fork() == 0:
        rng, seconds, end = random.Random(number), [], time.monotonic() + appends * pause / 2
        with Store.open(url) as store:
            store.append(make_evals("r0", [0])), store.statuses()  # connected and compiled
            for turn in range(appends) if number < writers else iter(int, 1):
                time.sleep(rng.uniform(0.0, pause))
                began = time.perf_counter()
                if number < writers:
                    store.append(make_evals("r0", [1000 * number + turn + 1], episodes=20))
                else:
                    assert len(store.statuses()) == 1
                    if time.monotonic() > end:
                        break
                seconds.append(time.perf_counter() - began)
        os.write(into, json.dumps(seconds).encode())
        os._exit(0)
    os.close(into)
    children.append(out)
told = [json.loads(os.fdopen(out).read() or "null") for out in children]
print(json.dumps({"writes": sum(told[:writers], []), "reads": sum(told[writers:], [])}))
"""


@pytest.mark.slow
def test_thirty_two_writers_and_eight_readers_lose_no_row_and_wait_little(url):
    """Each appends 20 rows about once a second, as 32 drivers with two busy workers each would."""
    writers, readers, appends = 32, 8, 20
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    with Store.open(url) as store:
        store.append([DATASET, make_trial(), make_run()])
    command = [sys.executable, "-c", CROWD, url, *map(str, (writers, readers, appends, 2.0))]
    crowd = subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True)
    told = json.loads(crowd.stdout)
    assert len(told["writes"]) == writers * appends
    assert len(told["reads"]) >= readers
    with Store.open(url) as store:
        found = store.evaluations()
    assert len(found) == writers * appends * 20 + 3
    assert found["step"].nunique() == writers * appends + 1
    p99 = {what: sorted(told[what])[int(0.99 * len(told[what]))] for what in ("writes", "reads")}
    print(f"{url.partition(':')[0]}: p99 of {len(told['writes'])} writes {p99['writes']:.3f} s, "
          f"of {len(told['reads'])} reads {p99['reads']:.3f} s")  # fmt: skip
    if busy > 2.0:
        pytest.skip(f"rows are exact; {busy:.0f} processes a core leave nothing to say about time")
    assert p99["writes"] < 0.25


def test_a_database_newer_than_the_code_is_refused(url):
    Store.open(url).close()
    engine = sa.create_engine(connecting.parse_url(url))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE migrations SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match=r"version '9999'.*newer.*Upgrade"):
        Store.open(url)


def test_tables_of_another_program_are_left_alone(url):
    engine = sa.create_engine(connecting.parse_url(url))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE runs (name TEXT)"))
    engine.dispose()
    with pytest.raises(StoreError, match="tables named runs that are not ours"):
        Store.open(url)


def test_the_shown_url_has_no_password(store, url):
    for text in (store.url, repr(store), store.describe()["url"]):
        assert "***" not in text
        password = connecting.parse_url(url).password
        assert not password or password not in text
    assert store.url.split(":")[0] == url.split(":")[0]


@pytest.mark.postgres
@pytest.mark.skipif(not POSTGRES, reason="HARNESS_TEST_POSTGRES is not set")
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgres"])
def test_postgresql_is_opened_by_each_of_its_schemes(scheme):
    url = connecting.parse_url(scheme + POSTGRES[POSTGRES.index("://") :])
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("results.db", r"not a database URL.*For a file: sqlite:///results.db"),
        ("", "not a database URL"),
        ("sqlite://results.db", "three slashes"),
        ("sqlite:///results.db?mode=ro", "give only a path"),
        ("mysql://u:hidden@h/d", r"'mysql' is not supported"),
        ("postgresql://u:hidden@host:5432", "names no database"),
        ("postgresql://u:hidden@host:port/d", "not a database URL"),
    ],
)
def test_a_wrong_url_is_explained_without_its_password(url, message):
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)
    assert "hidden" not in str(caught.value)


def test_an_unreachable_server_is_explained_without_the_password():
    pytest.importorskip("psycopg")
    url = "postgresql://someone:hidden@127.0.0.1:1/results?connect_timeout=2"
    with pytest.raises(
        StoreError, match=r"cannot reach postgresql://someone@127.0.0.1:1/"
    ) as found:
        Store.open(url)
    assert "hidden" not in str(found.value)


def test_without_psycopg_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)  # import psycopg: ImportError
    with pytest.raises(StoreError, match=r"pip install 'offline-rl-harness\[postgres\]'"):
        Store.open("postgresql://u@127.0.0.1:1/d")


# ------------------------------------------------------------------ SQLite's own


def test_sqlite_is_opened_with_wal_foreign_keys_and_a_busy_timeout(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/new/folder/results.db")
    with store, store._engine.connect() as connection:
        pragmas = {
            name: connection.scalar(sa.text(f"PRAGMA {name}"))
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_reader_is_not_blocked_by_a_writer(tmp_path):
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as reader, Store.open(url) as writer:
        writer.append(FAMILY)
        with writer._engine.begin() as connection:  # holds the write lock
            connection.execute(sa.text("DELETE FROM evals"))
            assert reader.counts()["evals"] == 6


def test_a_file_that_is_not_a_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "results.db"
    path.write_text("seed,score\n" * 200)
    with pytest.raises(StoreError, match="is not a SQLite database"):
        Store.open(f"sqlite:///{path}")
    assert path.read_text() == "seed,score\n" * 200


def test_a_folder_is_not_a_database(tmp_path):
    with pytest.raises(StoreError, match="is a folder"):
        Store.open(f"sqlite:///{tmp_path}")


def test_a_read_only_store_reads_and_refuses_to_write(tmp_path):
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as store:
        store.append(FAMILY)
    with Store.open(url, read_only=True) as store:
        assert store.counts()["evals"] == 6
        with pytest.raises(StoreError, match=r"cannot be written.*read_only=True"):
            store.append([EvalRecord("r0", 99, 0, 0, 0.0, 1)])
    with pytest.raises(StoreError, match="does not exist"):
        Store.open(f"sqlite:///{tmp_path}/other.db", read_only=True)


STRANGER = """
import os, sys
from results.store import Store
import pandas
Store.open("sqlite://").close()  # imports what another user may not be allowed to read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
assert not os.access(os.path.dirname(sys.argv[1]), os.W_OK)
with Store.open(f"sqlite:///{sys.argv[1]}", read_only=True) as store:
    print(store.counts()["runs"])
"""


def test_who_may_not_write_the_folder_sees_what_is_being_written(tmp_path):
    """A server's pages of a sweep that goes on: the newest rows are in the write-ahead log."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    path = tmp_path / "shown" / "results.db"
    with Store.open(f"sqlite:///{path}") as store:
        store.append(FAMILY)
        with store._connect() as reader:  # keeps the log from being folded in
            reader.execute(sa.text("SELECT 1"))
            store.append([make_run("r1", attempt=2)])
            path.parent.chmod(0o555)
            try:
                command = [sys.executable, "-c", STRANGER, str(path)]
                told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            finally:
                path.parent.chmod(0o755)
    assert (told.returncode, told.stdout.strip()) == (0, "2"), told.stderr


def test_labels_to_show_are_those_that_were_asked_for(store):
    store.append([DATASET, *(make_trial(f"t{i}", seed=i) for i in range(2)), make_run()])
    before = store.trials().label.tolist()
    store.show_labels({"t1": "a name of its own"})
    assert dict(zip(store.trials().trial_id, store.trials().label, strict=True)) == {
        "t0": before[0],
        "t1": "a name of its own",
    }
    assert {state.trial_id: state.label for state in store.states()}["t1"] == "a name of its own"
    assert {r.trial_id: r.label for r in store.records([TrialRecord])}["t1"] == "a name of its own"
    store.show_labels({})
    assert store.trials().label.tolist() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_is_explained(tmp_path):
    path = tmp_path / "results.db"
    Store.open(f"sqlite:///{path}").close()
    path.chmod(0o444)
    store = Store.open(f"sqlite:///{path}")
    with store, pytest.raises(StoreError, match="cannot be written"):
        store.append([DATASET])


def test_a_read_only_store_does_not_migrate(tmp_path):
    url = f"sqlite:///{tmp_path}/results.db"
    make_old(url, "0001")
    with pytest.raises(StoreError, match=r"version '0001'.*open it once for writing"):
        Store.open(url, read_only=True)


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local xfs rw 0 0
//nas/share /mnt/my\\040share cifs rw 0 0
mds@tcp:/scratch /scratch lustre rw 0 0
host:/data /data fuse.sshfs rw 0 0
/dev/sdc1 /over ext4 rw 0 0
server:/over /over nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/var/lib/results.db", None),
        ("/home/ada/results.db", "nfs4"),
        ("/home/local/results.db", None),
        ("/homework/results.db", None),
        ("/mnt/my share/new/results.db", "cifs"),
        ("/scratch/results.db", "lustre"),
        ("/data/results.db", "fuse.sshfs"),
        ("/over/results.db", "nfs"),
    ],
)
def test_a_network_file_system_is_recognised_by_the_deepest_mount(path, filesystem):
    assert connecting.network_filesystem(Path(path), MOUNTS) == filesystem


def test_sqlite_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(connecting, "network_filesystem", lambda path: "nfs4")
    with pytest.raises(StoreError, match=r"network file system \(nfs4\).*PostgreSQL"):
        Store.open(f"sqlite:///{tmp_path}/results.db")
    assert not list(tmp_path.iterdir())


def test_a_locked_database_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(connecting, "BUSY_TIMEOUT_S", 0.2)
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as store:
        other = sqlite3.connect(tmp_path / "results.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="was locked by another process"):
            store.append([DATASET])
        other.execute("ROLLBACK")
        other.close()
        assert store.append([DATASET]) == 1


def test_importing_the_store_does_not_import_pandas_or_alembic():
    code = "import results.store, sys; print('pandas' in sys.modules, 'alembic' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.split() == ["False", "False"]
