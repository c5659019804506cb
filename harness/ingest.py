"""From spools to the database: the driver is the database's only writer.

Where homes are not shared, the spools of all nodes are read from the storage.
Appends are idempotent, so a spool may be read again after any crash. Records of trials and
datasets are made here, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from harness import datasets, spool, storage
from harness.home import Home
from harness.provenance import utc_now
from harness.spec import TrialSpec
from results.records import ArtifactRecord, DatasetRecord, Record, RunRecord, TrialRecord
from results.store import MissingParentError, Store


def trial_record(trial: TrialSpec) -> TrialRecord:
    """The database's row of a trial."""
    return TrialRecord(
        trial_id=trial.id,
        variant_id=trial.variant_id,
        label=trial.label,
        algorithm=trial.algorithm,
        revision=trial.revision,
        dataset_id=trial.dataset_id,
        dataset_digest=trial.dataset_digest,
        data=dict(trial.data),
        config=dict(trial.config),
        seed=trial.seed,
        evaluation=asdict(trial.evaluation),
        simulator=trial.evaluation.simulator,
        precision=trial.precision,
        created_at=utc_now(),
    )


def dataset_record(dataset_id: str, digest: str) -> DatasetRecord:
    """The database's row of a dataset, with the references its scores are normalised with."""
    card = datasets.card(dataset_id)
    return DatasetRecord(
        dataset_id=dataset_id,
        digest=digest,
        env_id=card["env_id"],
        relation=card["relation"],
        ref_min=card["ref_min"],
        ref_max=card["ref_max"],
        ref_source=card["ref_source"] or "",
        num_steps=card["steps"],
        num_episodes=card["episodes"],
        card={name: value for name, value in card.items() if name != "folder"},
    )


class Ingester:
    """Reads what is new in the spools and appends it to the store.

    Args:
        store: the open results database.

    Attributes:
        damaged: stage id -> what of its rows cannot be read, and what to do. Its earlier rows are
            taken in, and every other stage's: a sweep does not wait for somebody to mend a file.
    """

    def __init__(self, store: Store, home: Home) -> None:
        self.store, self.home = store, home
        self.storage = storage.of(home)
        self.damaged: dict[str, str] = {}
        self._offsets: dict[Path, int] = {}
        self._seen: dict[str, set[str]] = {}  # stage id -> names in the storage
        self._foreign: set[str] = set()  # runs of trials that the database does not know
        self._shared: set[str] = set()  # stages whose spools have rows of such runs
        self._unknown: dict[str, RunRecord] = {}  # by trial: the run of such a trial that counts

    def register(self, trials: Iterable[TrialSpec]) -> None:
        """Makes sure that trials and their datasets are in the database."""
        trials = list(trials)
        pairs = sorted({(trial.dataset_id, trial.dataset_digest) for trial in trials})
        stored = self.store.datasets()
        known = set(zip(stored["dataset_id"], stored["digest"], strict=True))
        # A card takes a reading of the whole dataset, and the first one stays.
        records: list[Record] = [dataset_record(*pair) for pair in pairs if pair not in known]
        records += [trial_record(trial) for trial in trials]
        self.store.append(records)

    def stage(self, stage_id: str) -> int:
        """Rows of one stage's spool that were new."""
        if self.storage is None:
            return self._file(self.home.spool(stage_id))
        count, seen = 0, self._seen.setdefault(stage_id, set())
        with self._reading(stage_id):
            for name, lines in storage.new_rows(self.storage, stage_id, seen):
                count += self._append(stage_id, spool.parse(lines, f"{self.storage.url}: {name}"))
                seen.add(name)
        return count

    def has_all(self, stage_id: str) -> bool:
        """Whether the database has every run of what was read of a stage's spool."""
        return stage_id not in self._shared and stage_id not in self.damaged

    def statuses(self, trial_ids: Iterable[str]) -> dict[str, RunRecord]:
        """As `Store.statuses`; of trials that the database does not know, what their spools say.

        So a plan that registers nothing (a dry run) knows what `harness work` has done.
        """
        ids = list(trial_ids)
        known = self.store.statuses(ids)
        return {i: self._unknown[i] for i in ids if i in self._unknown} | known

    def leftovers(self) -> int:
        """Rows that an earlier driver did not get to read, from all spools.

        Of this home, but for stages that the storage knows, and of the storage.

        Spools of trials that this database does not know (it was moved or replaced) are left
        alone: they are read when a sweep plans these trials again.
        """
        count = 0
        shared: list[str] = []
        if self.storage is not None:
            shared = storage.stages(self.storage)
        for path in sorted(self.home.work.glob("*/spool.jsonl")):
            if path.parent.name not in shared:
                with contextlib.suppress(MissingParentError):
                    count += self._file(path)
        for stage_id in shared:
            with contextlib.suppress(MissingParentError):
                count += self.stage(stage_id)
        return count

    def _file(self, path: Path) -> int:
        stage_id, count = path.parent.name, 0
        start = self._offsets.get(path, 0)
        with self._reading(stage_id):
            records, end = spool.read_from(path, start)
            count = self._append(stage_id, records) if records else 0
            self._offsets[path] = end
        return count

    @contextlib.contextmanager
    def _reading(self, stage_id: str) -> Iterator[None]:
        """Notes damage, and takes in what comes before it; the next look reads it again."""
        self.damaged.pop(stage_id, None)
        try:
            yield
        except (spool.SpoolError, storage.DamagedError) as error:
            self.damaged[stage_id] = str(error)
            if isinstance(error, spool.SpoolError) and error.records:
                self._append(stage_id, error.records)

    def _append(self, stage_id: str, records: list[Record]) -> int:
        """Appends what belongs to trials that the database knows.

        One training may serve trials of several experiments (another evaluation of the same
        policy), and `harness work` registers none: those of the others wait for their own sweep.
        An artifact may come from a run in another database; it is there without a row, too.
        """
        try:
            return self.store.append(records)
        except MissingParentError:
            runs = {run.run_id: run.trial_id for run in records if isinstance(run, RunRecord)}
            known = set(self.store.trials(set(runs.values()))["trial_id"])
            self._foreign |= {run for run, trial in runs.items() if trial not in known}
            for run in records:
                if isinstance(run, RunRecord) and run.run_id in self._foreign:
                    before = self._unknown.get(run.trial_id)
                    if before is None or before.status != "done":
                        self._unknown[run.trial_id] = run
            kept = [row for row in records if getattr(row, "run_id", None) not in self._foreign]
            if len(kept) < len(records):
                self._shared.add(stage_id)
            made = {row.run_id for row in kept if isinstance(row, ArtifactRecord)} - runs.keys()
            unknown = made - {None, *self.store.runs()["run_id"]} if made else set()
            kept = [
                row
                for row in kept
                if not (isinstance(row, ArtifactRecord) and row.run_id in unknown)
            ]
            if len(kept) == len(records):
                raise
            return self.store.append(kept)
