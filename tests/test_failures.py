"""Stacks that run out of memory, are killed, or lose their engine: tried again, then named."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest
from small_catalog import PLUGIN

from harness.failures import EngineError, classify, kernel_oom_kills, telling_line
from results.store import Store
from tests import inline
from tests.processes import REPOSITORY, harness

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


def test_the_line_about_memory_is_told_else_the_last():
    monitor = "Task was killed due to the node running low on memory.\nSee the docs\nAdvice\n"
    assert telling_line(monitor) == "Task was killed due to the node running low on memory."
    assert telling_line("Traceback\n  there\nKeyError: 3\n") == "KeyError: 3"
    assert telling_line("") == "no message"


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
        ("RuntimeError: Refer to ... how to address the out of memory issue: URL", "out of memory"),
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


# ------------------------------------------------------------------------------- through real Ray


def sweep_with_ray(
    spec: Path, home: Path, faults: int, *overrides: str, **environment: str
) -> tuple[int, str]:
    """`harness sweep` in a process of its own: its exit code and what it printed.

    Args:
        faults: how often the plugin's fault happens; afterwards it does not.
    """
    tickets = home.with_name(f"{home.name}-tickets")
    tickets.mkdir()
    for number in range(faults):
        (tickets / str(number)).touch()
    path = os.pathsep.join((str(PLUGIN), str(REPOSITORY)))
    environment |= {"PYTHONPATH": path, "FAULTY_TICKETS": str(tickets), "COLUMNS": "200"}
    arguments = ("sweep", str(spec), "--home", str(home), *overrides)
    process = harness(*arguments, env={**os.environ, **environment})
    try:
        output, _ = process.communicate(timeout=1500)
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.slow
def test_a_worker_that_kills_itself_once_is_tried_again_and_the_rows_are_the_same(spec, tmp_path):
    overrides = ("config.fault=killed", "seeds=0-1", "run.max_stack=1")
    assert inline.sweep(spec, tmp_path / "whole", list(overrides)).ok
    code, output = sweep_with_ray(spec, tmp_path / "home", 1, *overrides)
    assert code == 0, output
    assert re.search(
        r"faulty generated/bandit2d-v0 seeds [01]: killed .*; again \(1 of 3\)", output
    )
    assert inline.rows(tmp_path / "home") == inline.rows(tmp_path / "whole")
    parts = sorted(segments(tmp_path / "home").values(), key=len)
    assert parts == [[(1, None)], [(1, "killed"), (1, None)]]


@pytest.mark.slow
def test_a_worker_that_always_kills_itself_is_named_and_the_other_trials_are_done(spec, tmp_path):
    spec.write_text(
        spec.read_text().replace(
            "[faulty]",
            "{well: {algorithm: faulty}, ill: {algorithm: faulty, config: {fault: killed}}}",
        )
    )
    overrides = ("seeds=0-1", "run.max_stack=2", "run.max_failures=2")
    home = tmp_path / "home"
    code, output = sweep_with_ray(spec, home, 100, *overrides)
    assert code == 1, output
    assert len(list((tmp_path / "home-tickets").iterdir())) == 97, "tried once and twice more"
    assert re.search(r"ill generated/bandit2d-v0 seeds 0-1: killed .*; again \(2 of 2\)", output)
    assert re.search(r"ill generated/bandit2d-v0 seeds 0-1: failed", output)
    with Store.open(f"sqlite:///{home / 'results.db'}") as store:
        runs = store.runs().merge(store.trials()[["trial_id", "label"]], on="trial_id")
    assert sorted(zip(runs["label"], runs["status"], strict=True)) == [
        ("ill", "failed"), ("ill", "failed"), ("well", "done"), ("well", "done"),
    ]  # fmt: skip
    for run in runs[runs["label"] == "ill"].itertuples():
        assert [part["ended"] for part in run.segments] == ["killed"] * 3
        assert "died" in run.error


@pytest.mark.slow
def test_a_stack_that_rays_memory_monitor_kills_is_halved_and_the_sweep_goes_on(spec, tmp_path):
    """The monitor of this sweep's own Ray; it ends no process but workers of that Ray."""
    memory, gib = psutil.virtual_memory(), 2**30
    if memory.available < 8 * gib:
        pytest.skip("less than 8 GiB of memory are available")
    # Ray, driver and worker take 2 GiB of the 4 that are left by this limit; the fault up to 4.
    limit = (memory.total - memory.available + 4 * gib) / memory.total
    overrides = ("config.fault=monitored", "seeds=0-1", "run.max_stack=2")
    assert inline.sweep(spec, tmp_path / "whole", list(overrides)).ok
    code, output = sweep_with_ray(
        spec, tmp_path / "home", 1, *overrides,
        RAY_memory_usage_threshold=f"{limit:.3f}", RAY_memory_monitor_refresh_ms="100",
    )  # fmt: skip
    assert code == 0, output
    assert "out of memory; again with 1 seed at a time" in output
    assert inline.rows(tmp_path / "home") == inline.rows(tmp_path / "whole")
    for parts in segments(tmp_path / "home").values():
        assert parts == [(2, "out of memory"), (1, None)]
