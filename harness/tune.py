"""Ray Tune as the engine: the only file that imports ray.

A small searcher hands Tune the next stack whose needs are met and answers "not yet" otherwise, so
no worker waits while it holds a device. Tune's own trial is one stack. What a stack leaves behind
goes through its spool, never through Tune: a lost report costs a progress line, not a row.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

# Read by ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours finishes the chunk first
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the old reporter is silent at verbose=0; the new is not
# With a searcher Tune would start one worker at a time; each takes seconds to import torch.
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "16")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import psutil
import ray
import torch
from ray import tune
from ray.tune.search import Searcher

from harness.failures import NOT_RETRIED, WORKER_DIED, EngineError, telling_line
from harness.job import Job, Progress
from harness.plan import Stage
from harness.spec import RunOptions
from harness.stages import data_key, hold_dataset, load_dataset
from harness.stopping import interruptible
from harness.storage import StackBusyError
from harness.worker import run_stack

REPORT_EVERY_S = 0.5
STACKS_OF_A_TUNER = 500
"""Tune keeps 110 kB of each trial, and writes all of them again and again."""
ROUNDS_OF_A_TUNER = 50  # or so many for each worker: at the end of a Tuner some wait for others
INIT_TRIES = 4  # Ray waits 30 s for its own processes, too little on a busy machine


class WorkQueue(Protocol):
    """What decides which stack runs next; implemented by `harness.sweep`."""

    def next(self) -> Job | None:
        """A stack that can start now, or None: not yet, or nothing left (see `exhausted`)."""

    def exhausted(self) -> bool:
        """True when no stack will ever become ready."""

    def progressed(self, job: Job, progress: Progress) -> None: ...

    def completed(self, job: Job, outcome: str, error: str = "") -> None:
        """The stack has ended: done, interrupted, diverged, busy (see `run_stack`), or failed with
        an error that would recur."""

    def failed(self, job: Job, error: str) -> None:
        """The stack's process crashed; the queue may hand it out again."""


class _Unsaved:
    """Tune pickles searcher and callbacks to be able to restore them; we never do."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _NodeData(_Unsaved):
    """Data in Ray's object store, where each node has one copy that all its workers map.

    They stay until the driver ends; Ray writes to disk what does not fit.
    """

    def __init__(self) -> None:
        self._refs: dict[str, Any] = {}  # by `data_key`

    def of(self, stage: Stage) -> Any | None:
        """A reference to a stage's data; None where its worker has to read them by itself."""
        key = data_key(stage)
        if key not in self._refs:
            try:
                self._refs[key] = ray.put(load_dataset(stage, torch.device("cpu")))
            except Exception:  # then the worker's own error fails this stack, and only this
                self._refs[key] = None
        return self._refs[key]


class _ReadyStacks(_Unsaved, Searcher):
    """Tune's searcher over the work queue."""

    def __init__(self, queue: WorkQueue, jobs: dict[str, Job], data: _NodeData, most: int) -> None:
        super().__init__()
        self._queue, self._jobs, self._data, self._most = queue, jobs, data, most

    @property
    def is_full(self) -> bool:
        """Whether as many stacks were handed out as one `Tuner` is to have."""
        return len(self._jobs) >= self._most

    def suggest(self, trial_id: str) -> Any:
        if self.is_full:
            return Searcher.FINISHED
        job = self._queue.next()
        if job is not None:
            self._jobs[trial_id] = job
            return {"job": job, "data": self._data.of(job.stack.stages[0])}
        return Searcher.FINISHED if self._queue.exhausted() else None

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Completion is handled by the callback, which also sees the error's text."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: a sweep resumes by planning again from the database."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Listener(_Unsaved, tune.Callback):
    """Passes Tune's events to the work queue."""

    def __init__(self, queue: WorkQueue, jobs: dict[str, Job]) -> None:
        self._queue, self._jobs = queue, jobs

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        if "progress" in result:
            self._queue.progressed(self._jobs[trial.trial_id], Progress(**result["progress"]))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        last = trial.last_result
        job, outcome = self._jobs[trial.trial_id], last.get("outcome", "done")
        self._queue.completed(job, outcome, last.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._queue.failed(self._jobs[trial.trial_id], _error_text(trial))


def _error_text(trial: Any) -> str:
    with contextlib.suppress(Exception):
        if trial.error_file and os.path.exists(trial.error_file):
            with open(trial.error_file, encoding="utf-8") as file:
                return file.read().strip()[-4000:]
    return f"{WORKER_DIED} (killed, or out of memory)"


@functools.cache
def _end_with_parent() -> None:
    """Ends this worker soon after its node's Ray has died (with a killed driver, say).

    Ray notices by itself, but a thread that is busy training can outlive it long enough to hold
    the locks of its seeds against the sweep that is started next.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _train_stack(config: dict[str, Any]) -> None:
    """What a Ray worker runs."""
    _end_with_parent()
    last: list[Any] = [0.0, ""]  # when and in which phase a report was sent

    def report(progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == last[1] and now - last[0] < REPORT_EVERY_S:
            return
        last[:] = [now, progress.phase]
        tune.report({"progress": vars(progress), "outcome": progress.phase})

    try:
        if config["data"] is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # else it reads them by itself
                hold_dataset(config["job"], functools.partial(ray.get, config["data"]))
        outcome = run_stack(config["job"], report)
    except StackBusyError:
        outcome = "busy"
    except NOT_RETRIED as error:
        tune.report({"outcome": "failed", "error": f"{type(error).__name__}: {error}"})
        return
    tune.report({"outcome": outcome})


def _code_folder() -> str:
    """The working folder that Ray is started in.

    Ray puts it in front of what its workers import from, where a folder `harness` of somebody's
    project would be taken for ours. A checkout is its own; for an installed package, which workers
    find as the driver did, any folder without code does.
    """
    root = Path(__file__).resolve().parents[1]
    return str(root if (root / "pyproject.toml").is_file() else os.sep)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A connection to the cluster of `RAY_ADDRESS`, or a local one that ends with the block."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        "include_dashboard": False,
    }
    if os.environ.get("RAY_ADDRESS"):
        options.pop("include_dashboard")
    address = os.environ.get("RAY_ADDRESS")
    folder = _code_folder()
    if relative := os.environ.get("MINARI_DATASETS_PATH"):
        os.environ["MINARI_DATASETS_PATH"] = os.path.abspath(os.path.expanduser(relative))
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    for attempt in range(1, INIT_TRIES + 1):
        try:
            with _quiet_logs(), contextlib.chdir(folder):
                ray.init(**options)
            break
        except Exception as error:
            # A busy machine can time out while the local cluster starts.
            _end_start(before)
            if not address and attempt < INIT_TRIES:
                tries = f"try {attempt} of {INIT_TRIES}, after {time.monotonic() - started:.0f} s"
                print(f"Ray did not start ({tries}); trying again", file=sys.stderr, flush=True)
                continue
            raise ConnectionError(not_started(error, address)) from error
    try:
        yield
    finally:
        ray.shutdown()


def not_started(error: Exception, address: str | None) -> str:
    """Why there is no Ray, and what to do."""
    advice = (
        f"Tried the cluster at RAY_ADDRESS={address}; unset it to run locally"
        if address
        else "Tried a local cluster; is the machine out of memory or very busy? Try again later"
    )
    reason = str(error).rstrip(". \n")
    return f"Ray could not start: {reason}. {advice}, or `harness work SPEC`, which needs no Ray"


def _end_start(before: set[psutil.Process]) -> None:
    """Ends Ray and the processes that a start left.

    Ray leaves those of a start that timed out; with a second set of them the next try is slower.
    They are listed before it shuts down as well: what its processes started is then no child of
    this one any more.

    Args:
        before: children of this process that are none of Ray's.
    """
    left = set(psutil.Process().children(recursive=True)) - before
    ray.shutdown()
    left |= set(psutil.Process().children(recursive=True)) - before
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=10.0)


def resources() -> str:
    """What the connected cluster offers."""
    found = ray.cluster_resources()
    return f"{found.get('CPU', 0):.0f} CPU, {found.get('GPU', 0):.0f} GPU"


def run_queue(queue: WorkQueue, run: RunOptions, on_interrupt: Callable[[], None]) -> None:
    """Runs stacks until the queue is exhausted.

    Args:
        on_interrupt: called on the first Ctrl-C; the second one raises KeyboardInterrupt.
    Raises:
        EngineError: if Tune ends by itself, with the stacks that were running.
    """
    slots = ray.cluster_resources().get("CPU", 1.0) / max(run.cpus_per_stack, 1e-3)
    slots = min(slots, run.max_concurrent or slots)
    most, data = int(max(STACKS_OF_A_TUNER, ROUNDS_OF_A_TUNER * slots)), _NodeData()
    while _fit(queue, run, on_interrupt, data, most) and not queue.exhausted():
        gc.collect()  # Tune's objects refer to each other


def _fit(
    queue: WorkQueue, run: RunOptions, on_interrupt: Callable[[], None], data: _NodeData, most: int
) -> bool:
    """One `Tuner`, and whether there may be work for another."""
    jobs: dict[str, Job] = {}
    stacks = _ReadyStacks(queue, jobs, data, most)
    needed = {"cpu": run.cpus_per_stack, "gpu": run.gpus_per_stack}
    scratch = tempfile.mkdtemp(prefix="harness-tune-")
    tuner = tune.Tuner(
        tune.with_resources(_train_stack, needed),
        tune_config=tune.TuneConfig(
            search_alg=stacks,
            num_samples=-1,
            max_concurrent_trials=run.max_concurrent or None,
            reuse_actors=True,  # starting a process and importing torch takes seconds
            trial_name_creator=lambda trial: f"stack-{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"stack-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=scratch,
            verbose=0,
            callbacks=[_Listener(queue, jobs)],
            failure_config=tune.FailureConfig(max_failures=0),  # the queue decides what is retried
        ),
    )
    try:
        with interruptible(on_interrupt), _quiet_logs():
            tuner.fit()
        return stacks.is_full
    except Exception as error:
        why = f"{type(error).__name__}: {telling_line(str(error))}"
        raise EngineError(f"Ray Tune ended: {why}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Hides the warnings that ray and tune print through Python's logging and warnings."""
    import warnings

    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
