"""Runs a queue of stacks in this process, where Ray is not what is being tested.

As a script it runs a whole sweep: python -m tests.inline SPEC HOME
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from rich.console import Console

from harness.display import Display
from harness.failures import NOT_RETRIED
from harness.home import Home
from harness.spec import load_experiment
from harness.storage import StackBusyError
from harness.sweep import Summary, run_sweep
from harness.worker import run_stack
from results.store import Store


def run_inline(queue, on_interrupt) -> None:
    """The work queue's contract, one stack after the other."""
    while not queue.exhausted():
        job = queue.next()
        if job is None:
            time.sleep(0.1)
            continue
        try:
            outcome = run_stack(job, lambda progress, job=job: queue.progressed(job, progress))
        except StackBusyError:
            queue.completed(job, "busy")
        except NOT_RETRIED as error:
            queue.completed(job, "failed", f"{type(error).__name__}: {error}")
        except Exception as error:
            queue.failed(job, f"{type(error).__name__}: {error}")
        else:
            queue.completed(job, outcome)


def sweep(spec: Path, home: Path, overrides=(), run_queue=run_inline, **options) -> Summary:
    """A whole sweep into the SQLite database of `home`."""
    found = Home.find(home)
    with Store.open(found.database_url()) as store:
        display = lambda total: Display(Console(file=io.StringIO()), total)  # noqa: E731
        experiment = load_experiment(spec, list(overrides))
        return run_sweep(experiment, store, found, display, run_queue, **options)


def rows(home: Path) -> dict[str, list[tuple]]:
    """What must not depend on interruptions: evaluations, metrics and the runs' outcomes."""
    with Store.open(Home.find(home).database_url()) as store:
        runs = store.runs()
        return {
            "evals": sorted(
                store.evaluations()[
                    ["run_id", "step", "episode", "env_seed", "episode_return", "length"]
                ].itertuples(index=False, name=None)
            ),
            "metrics": sorted(
                store.metrics()[["run_id", "step", "name", "value"]].itertuples(
                    index=False, name=None
                )
            ),
            "runs": sorted(
                runs[["run_id", "trial_id", "attempt", "status", "steps_done"]].itertuples(
                    index=False, name=None
                )
            ),
            "artifacts": sorted(store.artifacts()[["stage_id", "run_id"]].itertuples(index=False)),
        }


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sweep(Path(sys.argv[1]), Path(sys.argv[2]))
