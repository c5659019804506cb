"""Stacks that run out of memory, are killed, or lose their engine: tried again, then named."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_catalog import PLUGIN

from harness.failures import EngineError, classify, kernel_oom_kills
from results.store import Store
from tests import inline

SPEC = """
name: faulty
algorithms: [faulty]
datasets: [generated/bandit2d-v0]
seeds: 0-3
steps: 20
evaluation: {every: 10, episodes: 2}
run: {log_every: 2, checkpoint_every: 2, compile: "off", device: cpu, max_stack: 4}
"""


@pytest.fixture
def spec(tmp_path: Path, bandit: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(PLUGIN))
    path = tmp_path / "faulty.yaml"
    path.write_text(SPEC)
    return path


def segments(home: Path) -> dict[int, list[tuple[int, str | None]]]:
    """Seed -> of each process that worked on it: how many seeds it had, and how it ended."""
    with Store.open(f"sqlite:///{home / 'results.db'}") as store:
        runs, trials = store.runs(), store.trials()
    seeds = dict(zip(trials["trial_id"], trials["seed"], strict=True))
    return {
        int(seeds[trial_id]): [(len(part["stack"]), part.get("ended")) for part in parts]
        for trial_id, parts in zip(runs["trial_id"], runs["segments"], strict=True)
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
         "allocate memory: you tried to allocate 4 bytes", "out of memory"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7 TiB", "out of memory"),
        ("Traceback\nMemoryError", "out of memory"),
        ("AssertionError: <class 'ray.exceptions.OutOfMemoryError'>", "out of memory"),
        ("Task was killed due to the node running low on memory.", "out of memory"),
        ("the worker process died (killed, or out of memory)", "killed"),
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
         "Some common causes include: (1) the process was killed by the OOM killer", "killed"),
        ("ValueError: MyMemoryErrors are not it", "error"),
        ("RuntimeError: out of luck", "error"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(error, kind):
    assert classify(error) == kind
    assert classify(error, stale=True) == "no progress"
    if kind == "killed":
        assert classify(error, oom_kills=1) == "out of memory"


def test_the_kernels_count_is_read(tmp_path):
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 12\noom_kill 3\ndrop_pagecache 0\n")
    assert kernel_oom_kills(vmstat) == 3
    assert kernel_oom_kills(tmp_path / "absent") == 0
    assert kernel_oom_kills() >= 0


def test_a_stack_out_of_memory_is_halved_until_it_fits_and_the_rows_are_the_same(spec, tmp_path):
    """Allocations that the system refuses; four seeds, then two, then one at a time."""
    arguments = ["config.fault=limit", "config.fit=1"]
    assert inline.sweep(spec, tmp_path / "alone", [*arguments, "run.max_stack=1"]).ok
    assert inline.sweep(spec, tmp_path / "stacked", arguments).ok
    assert inline.rows(tmp_path / "stacked") == inline.rows(tmp_path / "alone")
    lost = "out of memory"
    assert set(map(tuple, segments(tmp_path / "stacked").values())) == {
        ((4, lost), (2, lost), (1, None))
    }


def test_a_single_seed_out_of_memory_is_given_up_by_name(spec, tmp_path):
    arguments = ["config.fault=limit", "config.fit=0", "seeds=0-1", "run.max_failures=1"]
    summary = inline.sweep(spec, tmp_path / "home", arguments)
    assert summary.counts == {"failed": 2}
    for error in summary.errors.values():
        assert "DefaultCPUAllocator: can't allocate memory" in error
    assert segments(tmp_path / "home")[0] == [(2, "out of memory"), *[(1, "out of memory")] * 2]


def test_an_engine_that_dies_is_started_again_with_less_at_once(spec, tmp_path):
    """Deaths of the engine alone, in this process: what runs with what, and when it is enough."""
    waves: list[list[int]] = []

    def dying(queue, on_interrupt):
        jobs = []
        while (job := queue.next()) is not None:
            jobs.append(job)
        waves.append([len(job.stack.stages) for job in jobs])
        raise EngineError("Ray Tune ended: AssertionError: ray.exceptions.OutOfMemoryError")

    arguments = ["run.max_failures=2"]
    summary = inline.sweep(spec, tmp_path / "home", arguments, run_queue=dying)
    assert not summary.ok
    assert len(summary.errors) == 4
    assert all("OutOfMemoryError" in error for error in summary.errors.values())
    # Four seeds, then two, then one at a time; each of these is given up after three deaths.
    assert waves == [[4], [2], *[[1]] * 6, [2], *[[1]] * 6]
    assert inline.sweep(spec, tmp_path / "home").ok


def test_an_engine_that_never_starts_anything_is_an_error(spec, tmp_path):
    def dead(queue, on_interrupt):
        raise EngineError("Ray Tune ended: no resources")

    with pytest.raises(EngineError, match="no resources"):
        inline.sweep(spec, tmp_path / "home", run_queue=dead)
