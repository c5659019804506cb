"""Files that nobody would write: a valid object or an error of ours, never another, never a hang.

A few hundred inputs each time; 100,000 in the slow run.
"""

from __future__ import annotations

import faulthandler
import io
import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector.episode_buffer import EpisodeBuffer

from harness.datasets import DatasetError, load_raw
from harness.datasets.d4rl import import_d4rl
from harness.datasets.record import DIGEST_FILE
from harness.datasets.writing import write_dataset
from harness.registry import Registry, UnknownAlgorithmError
from harness.spec import SpecError, load_experiment
from harness.typed import FieldError
from results import schema
from results.importing import ImportedRun, ImportFileError, Told, import_file
from results.store import Store
from tests.small_catalog import SmallCatalog

FAST = 60
HANG_S = 120.0

SPEC = """
name: fuzz
algorithms:
  bc: {config: {hidden_dim: 8}}
  late: {algorithm: idql, preset: dec2023}
datasets: [generated/line-v0, hopper-medium-v2]
seeds: 0-2,7
steps: ${config.batch_size}
config: {batch_size: 32}
data: {reward: normalize}
evaluation: {every: 500, episodes: 3}
cases: [{algorithm: bc, dataset: "generated/*", steps: 10}]
run: {compile: "off", max_stack: 2}
"""
CSV = """algorithm,dataset,seed,step,score
iql,hopper-medium-v2,0,1000,66.3
iql,hopper-medium-v2,1,1000,-1e3
bc,"a, b",0,0,0
"""


def fuzzed(few: int, many: int) -> Any:
    """A test of so many inputs, fast or slow; `check` gets them one by one."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(count: int, inputs: Any, check: Callable[[Any], None]) -> None:
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def run(value: Any) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
        began = time.monotonic()
        check(value)
        assert time.monotonic() - began < HANG_S / 2, "nearly a hang"

    try:
        run()
    finally:
        faulthandler.cancel_dump_traceback_later()


def said(error: Exception) -> None:
    assert str(error).strip(), "an error says something"


def edited(seeds: list[bytes], pieces: list[bytes] = []) -> Any:  # noqa: B006
    """Valid files with a few bytes changed, taken out or put in; also plain noise."""
    piece = st.binary(min_size=1, max_size=8)
    if pieces:
        piece |= st.sampled_from(pieces)
    edit = st.tuples(st.floats(0, 1), st.sampled_from(["over", "in", "out", "cut"]), piece)

    def apply(seed: bytes, edits: list[Any]) -> bytes:
        content = bytearray(seed)
        for where, how, new in edits:
            at = int(where * len(content))
            if how == "over":
                content[at : at + len(new)] = new
            elif how == "in":
                content[at:at] = new
            elif how == "out":
                del content[at : at + 8 * len(new)]
            else:
                del content[at:]
        return bytes(content)

    changed = st.builds(apply, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=5))
    return changed | changed | changed | st.binary(max_size=300)


# ---------------------------------------------------------------------------------- experiments

_PIECES = [
    *(b"${", b"}", b": ", b"- ", b"*a", b"&a ", b"!!python/object/apply:os.abort []", b"\n", b"\t"),
    *(b"'", b"[", b"{", b"null", b"1e999", b"-1", b"0x", b"~", b"<<: ", b"\xff", b"\x00", b".nan"),
    *(b"???", b"seeds", b"algorithms", b"${oc.env:HOME}", b"${steps}", b"9" * 30),
]
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["bc", "generated/line-v0", "*", "0-3", "${seeds}", "on"])
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["config", "steps"]), children,
                          max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
_DOCUMENTS = st.fixed_dictionaries({}, optional=dict.fromkeys(yaml.safe_load(SPEC), _VALUES)).map(
    lambda changes: yaml.safe_dump({**yaml.safe_load(SPEC), **changes}).encode()
)
_KEYS = [
    *("steps", "seeds", "config.lr", "algorithms", "algorithms.bc.steps", "cases[0].steps", "name"),
    *("evaluation.every", "run.max_stack", "datasets", "data.reward", "a.b", "", "["),
]
_OVERRIDES = st.lists(
    st.builds(lambda key, value: f"{key}={value}", st.sampled_from(_KEYS),
              st.text(max_size=8) | _SCALARS.map(str)) | st.text(max_size=8),
    max_size=2,
)  # fmt: skip


@fuzzed(2 * FAST, 12_000)
def test_any_experiment_resolves_or_is_refused(count, tmp_path):
    registry, path = Registry(), tmp_path / "spec.yaml"

    def check(given: tuple[bytes, list[str]]) -> None:
        path.write_bytes(given[0])
        try:
            experiment = load_experiment(path, given[1], registry, SmallCatalog())
        except (FieldError, UnknownAlgorithmError, DatasetError) as error:
            said(error)
        else:
            assert experiment.trials

    documents = edited([SPEC.encode()], _PIECES) | _DOCUMENTS
    fuzz(count, st.tuples(documents, st.just([]) | _OVERRIDES), check)


def test_aliases_that_grow_without_end_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = tmp_path / "spec.yaml"
    path.write_text("\n".join(lines))
    began = time.monotonic()
    with pytest.raises(SpecError, match=r"spec\.yaml: not valid YAML: .*expansion"):
        load_experiment(path, [])
    assert time.monotonic() - began < 10.0


# ---------------------------------------------------------------------------------- foreign runs


@pytest.fixture
def store():
    with Store.open("sqlite://") as found:
        yield found


def check_import(store: Store, path: Path, format: str, told: Told) -> Callable[[bytes], None]:
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            runs = import_file(store, path, format, told)
        except ImportFileError as error:
            said(error)
            assert not any(store.counts().values()), "all or nothing"
        else:
            assert all(isinstance(run, ImportedRun) for run in runs)
            assert store.counts()["runs"] == len(runs)
            with store._engine.begin() as connection:  # a new database would take 30 ms
                for table in reversed(schema.metadata.sorted_tables):
                    connection.execute(table.delete())

    return check


@fuzzed(2 * FAST, 40_000)
def test_any_csv_is_imported_or_refused(count, tmp_path, store):
    pieces = [b",", b'"', b"\n", b"\r", b"\x00", b"nan", b"1e999", b"-1", b"9" * 25, b"\xff", b"''"]
    check = check_import(store, tmp_path / "runs.csv", "csv", Told())
    fuzz(count, edited([CSV.encode()], pieces), check)


def archive(**members: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


_NPZ = [
    archive(final_returns=np.arange(4.0)),
    archive(
        final_returns=np.arange(4.0),
        args=np.array({"algorithm": "iql", "seed": 1, "num_updates": 10}, dtype=object),
    ),
]


@fuzzed(FAST, 30_000)
def test_any_npz_is_imported_or_refused(count, tmp_path, store):
    told = Told("iql", "hopper-medium-v2", 0)
    pieces = [
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"\xff\xff\xff\xff",
        b"(99999999999,)",
        b"|O",
        b"\x93NUMPY",
    ]
    check = check_import(store, tmp_path / "returns.npz", "unifloral", told)
    fuzz(count, edited(_NPZ, pieces), check)


@fuzzed(FAST, 8_000)
def test_any_pickle_is_imported_or_refused(count, tmp_path, store):
    scores = {"IQL": {"hopper-medium-v2": [[1.0, 2.0], np.arange(3.0)]}}
    seeds = [pickle.dumps(scores, protocol) for protocol in (0, 2, 4)]
    fuzz(count, edited(seeds), check_import(store, tmp_path / "scores.pickle", "corl", Told()))


# ---------------------------------------------------------------------------------- datasets


def original(path: Path) -> bytes:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(12, 3)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (12, 2)).astype(np.float32)
        file["rewards"] = rng.normal(size=12).astype(np.float32)
        file["terminals"] = np.arange(12) == 5
        file["timeouts"] = np.arange(12) == 11
    return path.read_bytes()


@fuzzed(FAST, 5_000)
def test_any_hdf5_is_imported_or_refused(count, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    path = tmp_path / "d4rl.hdf5"
    seed = original(path)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            raw = import_d4rl(path, "tiny/imported-v0", overwrite=True)
        except DatasetError as error:
            said(error)
        else:
            assert np.isfinite(raw.obs).all()
            assert len(raw.obs) == raw.num_steps + raw.num_episodes

    fuzz(count, edited([seed]), check)


@fuzzed(FAST, 5_000)
def test_any_stored_dataset_loads_or_is_refused(count, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    rng = np.random.default_rng(0)
    episode = EpisodeBuffer(
        observations=rng.normal(size=(6, 3)),
        actions=rng.uniform(-1, 1, (5, 2)).astype(np.float32),
        rewards=rng.normal(size=5),
        terminations=np.zeros(5, bool),
        truncations=np.arange(5) == 4,
    )
    written = write_dataset(
        "tiny/a-v0",
        [episode],
        observation_space=gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        action_space=gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
    )
    folder = tmp_path / "store" / "tiny" / "a-v0"
    files = {name: folder / "data" / name for name in ("main_data.hdf5", "metadata.json")}
    whole = {name: path.read_bytes() for name, path in files.items()}
    record = (folder / DIGEST_FILE).read_bytes()

    def check(given: tuple[str, bytes]) -> None:
        name, content = given
        for each, path in files.items():
            path.write_bytes(content if each == name else whole[each])
        (folder / DIGEST_FILE).write_bytes(record)
        try:
            raw = load_raw("tiny/a-v0")
        except DatasetError as error:
            said(error)
        else:
            assert raw.digest == written.digest, "what is loaded is what was recorded"

    inputs = st.one_of(
        *(st.tuples(st.just(name), edited([seed])) for name, seed in whole.items()),
        st.tuples(st.just("metadata.json"), _metadata(json.loads(whole["metadata.json"]))),
    )
    fuzz(count, inputs, check)


def _metadata(valid: dict[str, Any]) -> Any:
    """Metadata with some of its values exchanged for others."""
    changes = st.dictionaries(st.sampled_from(sorted(valid)), _VALUES, max_size=2)
    return changes.map(lambda change: json.dumps({**valid, **change}, default=str).encode())
