"""Runs of other code as records: CORL's score pickles, d3rlpy's logs, Unifloral's results, CSV.

Owns what is trusted: nothing of a file is executed. Pickles are read by an unpickler that makes
builtin values and numpy arrays, and refuses all else. Imported runs are trials of their own (their
config says `source: imported`), so they are shown as such and never pooled with runs of this
harness. Scores become returns by D4RL's references, as rows of the database are raw.

    corl       a pickle {algorithm: {dataset: [[score, ...] for each seed]}}, scores times 100
    d3rlpy     an `environment.csv`: lines of epoch, step, mean return; one seed per file
    unifloral  an `.npz` with the final policy's `final_returns`; one seed per file
    csv        columns algorithm, dataset, seed, score (times 100) or return, and optionally step
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from results.published import published_scores, reference_scores
from results.records import DatasetRecord, EvalRecord, Record, RunRecord, TrialRecord
from results.schema import canonical_json
from results.store import Store

Unit = Literal["score", "return"]
SOURCE = "imported"
"""`config["source"]` of an imported trial, and what its simulator and device are called."""


class ImportFileError(ValueError):
    """A file is not what its format says, or asks for code to be run."""


@dataclass(frozen=True)
class ImportedRun:
    """One seed of foreign code.

    Attributes:
        evaluations: step -> values of its episodes, or their mean alone.
        unit: "score" (normalised, times 100) or "return".
        config: settings that the file tells of.
    """

    algorithm: str
    dataset: str
    seed: int
    evaluations: Mapping[int, list[float]]
    unit: Unit
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a file may not say, told by whoever imports it; None where nothing was said."""

    algorithm: str | None = None
    dataset: str | None = None
    seed: int | None = None
    every: int | None = None  # gradient steps between evaluations

    def need(self, name: str, path: Path) -> Any:
        value = getattr(self, name)
        if value is None:
            raise ImportFileError(f"{path.name} does not say the {name}: give --{name}")
        return value


# ------------------------------------------------------------------------------------- pickles

_ADMITTED = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
}


class SafeUnpickler(pickle.Unpickler):
    """Makes builtin values and numpy arrays; refuses every other name, before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise ImportFileError(
                f"the pickle asks for {module}.{name}, which is neither a builtin value nor a "
                "numpy array; nothing of it was executed"
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise ImportFileError("the pickle refers to objects outside of it")


def load_pickle(file: Any) -> Any:
    """What a pickle of builtin values and numpy arrays holds.

    Raises:
        ImportFileError: if it holds anything else, or is no pickle.
    """
    try:
        return SafeUnpickler(file).load()
    except ImportFileError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ImportFileError(f"not a pickle that can be read: {error}") from error


# ------------------------------------------------------------------------------------- formats


def read_corl(path: Path, told: Told) -> list[ImportedRun]:
    """CORL's `bin/offline_scores.pickle`. Without --every, steps count evaluations."""
    try:
        with path.open("rb") as file:
            content = load_pickle(file)
    except ImportFileError as error:
        raise ImportFileError(
            f"{path.name}: {error}. Expected CORL's offline_scores.pickle"
        ) from error
    try:
        curves = {
            (str(algorithm), str(dataset), seed): list(curve)
            for algorithm, datasets in content.items()
            for dataset, seeds in datasets.items()
            for seed, curve in enumerate(seeds)
        }
    except (AttributeError, TypeError) as error:
        raise ImportFileError(
            f"{path.name}: expected {{algorithm: {{dataset: [[score, ...], ...]}}}} ({error})"
        ) from error
    names = {
        s.name: s.algorithm for s in published_scores() if s.table.paper == "CORL" and s.algorithm
    }
    _refuse_one_name_for_many(path, "algorithm", {name for name, _, _ in curves}, told.algorithm)
    every = told.every or 1
    runs = []
    for (algorithm, dataset, seed), curve in curves.items():
        place = f"{path.name}: {algorithm} on {dataset}, seed {seed}"
        if not curve:
            raise ImportFileError(f"{place}: no evaluation")
        runs.append(
            ImportedRun(
                told.algorithm or names.get(algorithm, algorithm),
                dataset,
                seed,
                {every * i: [_number(value, place)] for i, value in enumerate(curve, 1)},
                "score",
                {"steps": every * len(curve)} if told.every else {},
            )
        )
    return runs


def read_d3rlpy(path: Path, told: Told) -> list[ImportedRun]:
    """The log of d3rlpy's EnvironmentEvaluator. Algorithm, dataset and seed have to be told."""
    evaluations: dict[int, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            place = f"{path.name}, line {number}"
            if len(row) != 3:
                raise ImportFileError(f"{place}: expected epoch, step, value; got {row}")
            evaluations[_step(row[1], place)] = [_number(row[2], place)]
    algorithm, dataset, seed = (told.need(n, path) for n in ("algorithm", "dataset", "seed"))
    config = {"steps": max(evaluations, default=0)}
    return [ImportedRun(algorithm, dataset, seed, evaluations, "return", config)]


def read_unifloral(path: Path, told: Told) -> list[ImportedRun]:
    """The returns of a final policy, with the arguments kept beside them."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            returns = np.load(io.BytesIO(archive.read("final_returns.npy")), allow_pickle=False)
            members = archive.namelist()
            arguments = _arguments(archive.read("args.npy")) if "args.npy" in members else {}
    except ImportFileError as error:
        raise ImportFileError(f"{path.name}: {error}") from error
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything for damage
        raise ImportFileError(f"{path.name}: not a result of Unifloral: {error}") from error
    named = re.fullmatch(r"(.+)_([^_]+-v\d+)_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", path.stem)
    if named:
        arguments = {"algorithm": named[1], "dataset": named[2], **arguments}
    for name in ("algorithm", "dataset", "seed"):
        if getattr(told, name) is not None or arguments.get(name) is None:
            arguments[name] = told.need(name, path)
    steps = arguments.get("num_updates")
    place = f"{path.name}: final_returns"
    return [
        ImportedRun(
            str(arguments["algorithm"]),
            str(arguments["dataset"]),
            _step(arguments["seed"], f"{path.name}: seed"),
            {int(steps or 1): [_number(value, place) for value in returns.ravel().tolist()]},
            "return",
            {} if steps is None else {"steps": int(steps)},
        )
    ]


def _arguments(data: bytes) -> dict[str, Any]:
    """The dictionary that numpy saved as an object array: a header, then a pickle."""
    import numpy as np

    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read_header:
        raise ImportFileError(f"args.npy has version {version}; expected 1.0 or 2.0")
    read_header[version](file)
    found = load_pickle(file)
    arguments = found.item() if isinstance(found, np.ndarray) and found.size == 1 else found
    if not isinstance(arguments, dict):
        raise ImportFileError(f"args.npy holds {type(arguments).__name__}; expected a dictionary")
    return arguments


def read_csv(path: Path, told: Told) -> list[ImportedRun]:
    """Lines with algorithm, dataset, seed, score or return, and optionally step."""
    values: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    said: dict[str, set[str]] = {"algorithm": set(), "dataset": set()}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        units: list[Unit] = [u for u in ("score", "return") if u in columns]  # type: ignore[misc]
        if len(units) != 1:
            raise ImportFileError(
                f"{path.name}: expected one column score or return; has {columns}"
            )
        for row in reader:
            place = f"{path.name}, line {reader.line_num}"
            algorithm, dataset, seed = (
                row[n] if n in columns else told.need(n, path)
                for n in ("algorithm", "dataset", "seed")
            )
            said["algorithm"].add(algorithm)
            said["dataset"].add(dataset)
            key = (told.algorithm or algorithm, told.dataset or dataset, _step(seed, place))
            step = _step(row["step"], place) if "step" in columns else 1
            values.setdefault(key, {}).setdefault(step, []).append(_number(row[units[0]], place))
    for name, found in said.items():
        _refuse_one_name_for_many(path, name, found, getattr(told, name))
    known = "step" in columns
    return [
        ImportedRun(*key, steps, units[0], {"steps": max(steps)} if known else {})
        for key, steps in values.items()
    ]


FORMATS: dict[str, Callable[[Path, Told], list[ImportedRun]]] = {
    "corl": read_corl,
    "d3rlpy": read_d3rlpy,
    "unifloral": read_unifloral,
    "csv": read_csv,
}


def _refuse_one_name_for_many(path: Path, name: str, found: set[str], told: str | None) -> None:
    if told is not None and len(found) > 1:
        raise ImportFileError(
            f"{path.name} has several values of {name} ({', '.join(sorted(found))}); --{name} "
            f"{told} would pool them: leave --{name} out, or split the file"
        )


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ImportFileError(f"{place}: {value!r} is not a finite number")
    return number


def _step(value: Any, place: str) -> int:
    try:
        step = int(value)
    except (TypeError, ValueError, OverflowError):
        step = -1
    if not 0 <= step < 2**63:
        raise ImportFileError(f"{place}: {value!r} is not a whole number from 0 to 2**63 - 1")
    return step


# ------------------------------------------------------------------------------------- records


def import_file(
    store: Store, path: Path, format: str, told: Told = Told(), label: str | None = None
) -> list[ImportedRun]:
    """Writes a file's runs into the database, all or none, and returns them.

    Importing the same file again changes nothing.

    Args:
        label: shown instead of the algorithm; another label makes other trials.
    Raises:
        ImportFileError: if the file is not valid, or its trials were imported from another one.
        FileNotFoundError: if there is no such file.
    """
    if format not in FORMATS:
        raise ImportFileError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; expected a file of format {format}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        runs = FORMATS[format](path, told)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ImportFileError(f"{path.name}: not text of format {format}: {error}") from error
    if not runs or not all(run.evaluations for run in runs):
        raise ImportFileError(f"{path.name}: no runs in it, or one without evaluations")
    versions = {SOURCE: format, "file": path.name, "sha256": sha256}
    records = list(_records(runs, versions, label))
    trials = [record.trial_id for record in records if isinstance(record, TrialRecord)]
    for row in store.runs(trials).itertuples():
        known: Any = row.versions
        if known["sha256"] != sha256:
            raise ImportFileError(
                f"{path.name}: such a run was imported from another file ({known['file']}); give "
                "another --label or --seed to keep both"
            )
    store.append(records)
    return runs


def _records(
    runs: Iterable[ImportedRun], versions: Mapping[str, str], label: str | None
) -> Iterable[Record]:
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    for run in runs:
        dataset = _dataset(run)
        yield dataset
        shown = f"{label or run.algorithm} ({SOURCE})"
        config = {**run.config, "source": SOURCE, "format": versions[SOURCE], "label": shown}
        variant = [run.algorithm, dataset.dataset_id, dataset.digest, config]
        trial_id = _hash([*variant, run.seed])
        yield TrialRecord(
            trial_id=trial_id,
            variant_id=_hash(variant),
            label=shown,
            algorithm=run.algorithm,
            revision=0,
            dataset_id=dataset.dataset_id,
            dataset_digest=dataset.digest,
            data={},
            config=config,
            seed=run.seed,
            evaluation={"source": SOURCE},
            simulator=SOURCE,
            created_at=now,
        )
        run_id = f"{trial_id[:32]}-1"
        yield RunRecord(
            run_id=run_id,
            trial_id=trial_id,
            attempt=1,
            status="done",
            started_at=now,
            ended_at=now,
            git_commit="",
            git_dirty=False,
            versions=versions,
            hardware={},
            device=SOURCE,
            compiled=False,
            stack=(run.seed,),
            steps_done=run.config.get("steps", 0),
        )
        for step, values in run.evaluations.items():
            for episode, value in enumerate(values):
                yield EvalRecord(run_id, step, episode, 0, _return(value, run, dataset), 0)


def _dataset(run: ImportedRun) -> DatasetRecord:
    """The dataset as its name says; scores on unknown ones are kept on a scale of their own."""
    known = reference_scores().get(run.dataset)
    if known is not None:
        relation, source = "original", f"D4RL constants ({run.dataset})"
    else:
        relation = "local"
        source = "imported scores" if run.unit == "score" else ""
    low, high = known or ((0.0, 100.0) if run.unit == "score" else (None, None))
    digest = SOURCE if known or run.unit == "return" else f"{SOURCE} scores"
    return DatasetRecord(run.dataset, digest, "", relation, low, high, source, 0, 0)


def _return(value: float, run: ImportedRun, dataset: DatasetRecord) -> float:
    if run.unit == "return":
        return value
    assert dataset.ref_min is not None
    assert dataset.ref_max is not None
    return dataset.ref_min + value / 100 * (dataset.ref_max - dataset.ref_min)


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
