"""Spools: what was acknowledged is on disk, whatever happens next."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.spool import Spool, SpoolError, read, read_from
from results.records import (
    ArtifactRecord,
    DatasetRecord,
    EvalRecord,
    MetricRecord,
    Record,
    RunRecord,
    TrialRecord,
)

RUN = RunRecord(
    run_id="r-1",
    trial_id="t",
    attempt=1,
    status="running",
    started_at="2031-01-01T00:00:00.000000Z",
    ended_at=None,
    git_commit="",
    git_dirty=False,
    versions={"torch": "2"},
    hardware={"cores": 2, "cpu": "µ"},
    device="cpu",
    compiled=False,
    stack=(0, 3),
    timings={"train": 1.5},
    steps_done=10,
    segments=({"from_step": 0, "stack": [0, 3]},),
    error="Traceback:\n  line\r\nend",
)
RECORDS: list[Record] = [
    DatasetRecord("d-v0", "digest", "Env-v0", "local", None, None, "", 10, 2, {"a": [1, None]}),
    TrialRecord("t", "v", "bc", "bc", 1, "d-v0", "digest", {}, {"lr": 1e-3}, 3, {}, "none", "now"),
    RUN,
    *(EvalRecord("r-1", 5, episode, episode, -1.5 * episode, 7) for episode in range(3)),
    EvalRecord("r-2", 5, 0, 0, math.inf, 7, 3),
    MetricRecord("r-1", 5, "loss", math.nan),
    MetricRecord("r-1", 5, "q", -math.inf),
    dataclasses.replace(RUN, status="done", ended_at="2031-01-01T00:00:01.000000Z", error=None),
    ArtifactRecord("s", "r-1", "policy", "s", "0" * 64, 100, "now"),
]


def same(found: list[Record], expected: list[Record]) -> bool:
    """Equality in which nan equals nan."""
    return [repr(record) for record in found] == [repr(record) for record in expected]


def test_every_kind_of_record_survives(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "spool.jsonl"
    with Spool(path) as spool:
        assert spool.append(RECORDS) == len(RECORDS)
        assert same(list(spool.records()), RECORDS)
    assert same(list(read(path)), RECORDS)
    lines = path.read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["dataset", "trial", "run", "evals", "evals", "metrics", "run", "artifact"]


finite_or_not = st.floats(allow_nan=True, allow_infinity=True)
evaluations = st.builds(
    EvalRecord,
    st.sampled_from(["r-1", "r-2"]),
    st.integers(0, 10**9),
    st.integers(0, 10**4),
    st.integers(0, 2**31),
    finite_or_not,
    st.integers(0, 10**6),
)
metrics = st.builds(
    MetricRecord, st.sampled_from(["r-1", "r-2"]), st.integers(0, 10**9), st.text(), finite_or_not
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(st.one_of(evaluations, metrics), max_size=6), max_size=4))
def test_batches_come_back_in_the_order_written(tmp_path: Path, batches: list[list[Any]]) -> None:
    path = tmp_path / "spool.jsonl"
    path.unlink(missing_ok=True)
    with Spool(path) as spool:
        for batch in batches:
            spool.append(batch)
    assert same(list(read(path)), [record for batch in batches for record in batch])


def test_evaluations_written_before_modes_were_recorded_are_read(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    with Spool(path) as spool:
        spool.append([EvalRecord("r-1", 5, 0, 9, -1.5, 7)])
    text = path.read_text()
    assert text.count("7, null]") == 1
    path.write_text(text.replace("7, null]", "7]"))
    assert list(read(path)) == [EvalRecord("r-1", 5, 0, 9, -1.5, 7, None)]


def test_a_missing_spool_is_an_empty_one(tmp_path: Path) -> None:
    assert list(read(tmp_path / "none.jsonl")) == []
    assert read_from(tmp_path / "none.jsonl", 0) == ([], 0)


def test_a_file_cut_at_any_byte_holds_the_whole_lines_before_and_can_be_continued(
    tmp_path: Path,
) -> None:
    path = tmp_path / "spool.jsonl"
    ends = [0]
    with Spool(path) as spool:
        for step in range(4):
            spool.append([MetricRecord("r", step, "loss", 0.1 * step), RUN])
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    newlines = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in newlines)
        assert len(list(read(path))) == complete  # one record a line here
        if cut % 7 == 0:
            with Spool(path) as spool:
                spool.append(MetricRecord("r", 99, "loss", 9.0))
            found = list(read(path))
            assert len(found) == complete + 1
            assert found[-1] == MetricRecord("r", 99, "loss", 9.0)


def test_a_tail_of_zeros_after_a_power_cut_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    with Spool(path) as spool:
        spool.append(RECORDS)
    with path.open("ab") as file:
        file.write(b"\0" * 3_000_000)
    assert same(list(read(path)), RECORDS)
    with Spool(path) as spool:
        spool.append(RUN)
    assert same(list(read(path)), [*RECORDS, RUN])


def test_a_damaged_line_is_named_after_the_records_before_it(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    with Spool(path) as spool:
        spool.append(RECORDS)
        before = path.stat().st_size
        spool.append(RUN)
        spool.append(RUN)
    content = bytearray(path.read_bytes())
    content[before] = ord("[")
    path.write_bytes(content)
    records = read(path)
    found: list[Record] = []
    with pytest.raises(SpoolError, match=f"at byte {before}"):
        found.extend(iter(lambda: next(records), None))
    with pytest.raises(SpoolError) as caught:
        list(read(path))
    assert same(caught.value.records, RECORDS)


@pytest.mark.parametrize("line", ["[]", "3", '{"kind": "what"}', "{}", '{"kind": "run"}', "\xff"])
def test_a_line_that_is_no_record_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "spool.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(SpoolError, match="at byte 0"):
        list(read(path))


def test_reading_on_from_an_offset_sees_each_record_once(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    seen: list[Record] = []
    offset = 0
    with Spool(path) as spool:
        for record in RECORDS:
            spool.append(record)
            with path.open("ab") as file:
                file.write(b'{"kind": "torn')  # another record on its way
            found, offset = read_from(path, offset)
            seen += found
            spool._repair()
    assert same(seen, RECORDS)
    path.write_bytes(b"")  # replaced by a shorter file
    assert read_from(path, offset) == ([], 0)


def test_misuse_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    with pytest.raises(TypeError, match="not a record"):
        spool.append([{"kind": "run"}])  # type: ignore[list-item]
    spool.append([])
    spool.close()
    spool.close()
    with pytest.raises(ValueError, match="is closed"):
        spool.append(RUN)
    assert list(read(spool.path)) == []


APPEND_FOREVER = """
import sys
from harness.spool import Spool
from results.records import EvalRecord, MetricRecord

with Spool(sys.argv[1]) as spool:
    step = int(sys.argv[2])
    while True:
        spool.append([MetricRecord("r", step, "x" * (step % 50), float(step))])
        print(step, flush=True)
        step += 1
"""


def test_a_writer_killed_at_any_moment_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    rng = random.Random(2)
    following = 0
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", APPEND_FOREVER, str(path), str(following)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        acknowledged = [int(line) for line in (first + rest).split(b"\n")[:-1] if line]
        steps = [record.step for record in read(path)]  # type: ignore[union-attr]
        assert steps == list(range(len(steps)))
        assert acknowledged[-1] < len(steps) <= acknowledged[-1] + 2
        following = len(steps)
        with path.open("ab") as file:
            file.write(b'{"kind": "metrics", "ru')  # and this time the kill tore a line
