"""Speed of the results database: appends, replays and the queries that analysis makes.

    python benchmarks/database.py                       SQLite, in a temporary folder
    python benchmarks/database.py --url postgresql://user:password@host/empty_database
    python benchmarks/database.py --rows 100000

Prints one line per figure. The default million evaluation rows are 500 trials x 200 evaluations
x 10 episodes. The database must be empty: rows are made up, and left there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

from results.records import DatasetRecord, EvalRecord, MetricRecord, RunRecord, TrialRecord
from results.store import Store

TIME = "2031-05-06T07:08:09Z"
EPISODES = 10
EVALUATIONS = 200


def make_parents(trials: int) -> list[Any]:
    dataset = DatasetRecord("bench/line/v0", "d", "Line-v0", "local", 0.0, 1.0, "made up", 1, 1)
    records: list[Any] = [dataset]
    for number in range(trials):
        name = f"{number:064x}"
        records.append(
            TrialRecord(
                trial_id=name,
                variant_id=f"{number // 10:064x}",
                label=f"method-{number // 100}",
                algorithm="made_up",
                revision=1,
                dataset_id=dataset.dataset_id,
                dataset_digest=dataset.digest,
                data={},
                config={"steps": 1_000_000},
                seed=number % 10,
                evaluation={},
                simulator="none",
                created_at=TIME,
            )
        )
        records.append(
            RunRecord(
                run_id=f"{name[-16:]}-1",
                trial_id=name,
                attempt=1,
                status="done",
                started_at=TIME,
                ended_at=TIME,
                git_commit="",
                git_dirty=False,
                versions={},
                hardware={},
                device="cpu",
                compiled=True,
                stack=tuple(range(10)),
            )
        )
    return records


def make_evals(trial: int) -> list[EvalRecord]:
    run_id = f"{trial:016x}-1"
    return [
        EvalRecord(run_id, step * 5000, episode, episode, step + episode / 7, 1000)
        for step in range(EVALUATIONS)
        for episode in range(EPISODES)
    ]


def measure(what: str, action: Callable[[], Any], rows: int | None = None) -> Any:
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    count = len(result) if rows is None else rows
    print(f"{what:58} {seconds:8.3f} s {count:10,} rows {count / seconds:12,.0f} rows/s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    trials = max(1, options.rows // (EVALUATIONS * EPISODES))
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(options.url or f"sqlite:///{folder}/results.db") as store,
    ):
        if any(store.counts().values()):
            raise SystemExit(f"{store.url} is not empty: {store.counts()}; give an empty one")
        run(store, trials)


def run(store: Store, trials: int) -> None:
    evals = [make_evals(trial) for trial in range(trials)]
    rows = sum(map(len, evals))
    store.append(make_parents(trials))
    half = trials // 2
    measure(
        f"append evaluations, {len(evals[0])} rows a transaction",
        lambda: [store.append(part) for part in evals[:half]],
        rows=sum(map(len, evals[:half])),
    )
    measure(
        "append evaluations, one transaction",
        lambda: store.append([row for part in evals[half:] for row in part]),
        rows=sum(map(len, evals[half:])),
    )
    measure("append again: nothing is new", lambda: store.append(evals[0]), rows=len(evals[0]))
    metrics = [MetricRecord(evals[0][0].run_id, step, "loss", 0.5) for step in range(20_000)]
    measure("append metrics", lambda: store.append(metrics), rows=len(metrics))
    ids = [f"{number:064x}" for number in range(trials)]
    some = ids[:: max(1, trials // 50)][:50]
    measure(f"evaluations of {len(some)} trials", lambda: store.evaluations(some))
    measure(f"evaluation means of {len(some)} trials", lambda: store.evaluation_means(some))
    means = measure(f"evaluation means of all {trials} trials", store.evaluation_means)
    assert means.episodes.sum() == rows, "the means do not cover the rows"
    measure(f"statuses of all {trials} trials", lambda: store.statuses(ids))
    measure("trials, all", store.trials)
    facts = store.describe()
    print(f"{facts['server']}: {facts['bytes'] / 1e6:,.0f} MB, {facts['counts']}")


if __name__ == "__main__":
    main()
