"""`harness sweep`, `work` and `status`: running what a spec asks for, and how far it has come."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from harness.cli.exit_codes import ENVIRONMENT, INTERRUPTED, SOME_FAILED
from harness.cli.options import (
    DatabaseOption,
    HomeOption,
    JsonOption,
    OptionalSpec,
    OverridesArgument,
    SpecArgument,
    open_store,
    show_trials,
)
from harness.cli.printing import console, errors, print_checks, styled
from harness.stopping import signals_interrupt

if TYPE_CHECKING:
    from harness.home import Home
    from harness.preflight import Check
    from harness.spec import Experiment
    from results.store import Store, TrialState

CONTINUES = "the same command continues from the last checkpoints"


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A signal is an interruption from the first line of a command to its last."""
    try:
        with signals_interrupt():
            yield
    except KeyboardInterrupt:
        errors.print(f"interrupted; {CONTINUES}")
        raise typer.Exit(INTERRUPTED) from None


@stoppable()
def sweep(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, run nothing.")
    ] = False,
    retry_diverged: Annotated[
        bool, typer.Option("--retry-diverged", help="Run diverged trials again, from step 0.")
    ] = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train and evaluate what a spec asks for and the database does not have yet."""
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    sweep_experiment(experiment, dry_run, retry_diverged, home, db, as_json)


def sweep_experiment(
    experiment: Experiment,
    dry_run: bool,
    retry_diverged: bool,
    home: str | None,
    db: str | None,
    as_json: bool,
) -> None:
    """Plans, checks and runs an experiment; leaves by `typer.Exit` unless all went well."""
    from harness.artifacts import ArtifactStore
    from harness.display import Display
    from harness.memory import Capacity
    from harness.plan import measured_rates
    from harness.preflight import Probe, check, described
    from harness.registry import Registry
    from harness.sweep import plan_sweep, run_sweep

    found, store = open_store(home, db)
    retry = ("failed", "diverged") if retry_diverged else ("failed",)
    with store:
        probe = Probe(experiment.run, Registry())
        planned = plan_sweep(
            experiment, store, found, retry=retry, register=not dry_run, probe=probe
        )
        slots = Capacity.of(experiment.run).slots
        plan = planned.describe(measured_rates(store), slots)
        if dry_run:
            checks = check(planned, store, found, probe)
            _print_plan(described(plan, planned, probe), checks, as_json)
            if any(item.state == "bad" for item in checks):
                raise typer.Exit(ENVIRONMENT)
            return
        if not as_json:
            _print_plan_line(plan)

        ArtifactStore(found.artifacts).clean()

        def run_queue(queue: Any, on_interrupt: Any) -> None:
            from harness import tune

            with tune.cluster():
                tune.run_queue(queue, experiment.run, on_interrupt)

        def display(total: int) -> Display:
            return Display(errors if as_json else console, total)

        summary = run_sweep(
            experiment, store, found, display, run_queue, retry=retry, plan=planned, probe=probe
        )
        if as_json:
            said = {"counts": summary.counts, "errors": summary.errors}
            print(json.dumps({**said, "damaged": list(summary.damaged)}))
        else:
            _print_summary(summary, store.url)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(SOME_FAILED)


def _print_plan_line(plan: dict[str, Any]) -> None:
    from harness.plan_text import duration, numbered

    counts = plan["counts"]
    text = f": {numbered(counts['trials'], 'trial')}, {counts['trials_done']} done"
    if counts["stacks"]:
        stacks = numbered(counts["stacks"], "stack")
        text += f", {stacks} to run; training left: {duration(plan['seconds'])}"
    console.print(styled(plan["name"], "bold", text), highlight=False)


def _print_plan(plan: dict[str, Any], checks: list[Check], as_json: bool) -> None:
    if as_json:
        print(json.dumps({**plan, "checks": [vars(item) for item in checks]}, indent=2))
        return
    from harness.plan_text import plan_tables

    for item in plan_tables(plan):
        console.print(item)
    print_checks(checks)


def _print_summary(summary: Any, url: str) -> None:
    from harness.plan_text import numbered
    from harness.provenance import git_state

    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items()))
    what = f"{numbered(summary.trained, 'stack')} run" if summary.trained else "nothing to train"
    console.print(f"{counts} ({what} in {summary.seconds:.0f} s)", highlight=False)
    for trial_id, error in sorted(summary.errors.items()):
        if summary.statuses[trial_id] != "done":
            line = styled(summary.statuses[trial_id], "red", f": {_last_line(error)}")
            console.print(f"  {trial_id[:12]}", line, highlight=False)
    console.print(f"database: {url}", highlight=False, soft_wrap=True)
    for text in summary.damaged:
        errors.print(styled("note", "yellow", f": {text}"), highlight=False, soft_wrap=True)
    commit, dirty = git_state()
    if dirty:
        errors.print(
            styled("note", "yellow"),
            f"the harness's code differs from commit {commit[:12]}: these runs are recorded as "
            "dirty",
        )
    if summary.interrupted:
        console.print(f"interrupted; {CONTINUES}")


def _last_line(error: str | None) -> str:
    """The line of a traceback that says what happened."""
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else "no reason was recorded"


@stoppable()
def work(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    shard: Annotated[
        str, typer.Option(help="INDEX/COUNT: the share of the trials to work on.")
    ] = "0/1",
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """A share of a sweep in this process, without Ray; `harness sweep` then takes in the rows."""
    from harness.display import Display
    from harness.home import Home
    from harness.plan_text import numbered
    from harness.spec import load_experiment
    from harness.stopping import stop_on_signals
    from harness.sweep import title
    from harness.work import Shard
    from harness.work import work as run
    from results.store import Store

    experiment = Shard.parse(shard).of(load_experiment(spec, overrides or []))
    if not experiment.trials:
        console.print(
            f"shard {shard} has nothing to do: there are more shards than trials", highlight=False
        )
        return
    found = Home.find(home).shared(experiment.run.storage)
    store = Store.open(found.database_url(db)) if found.has_database(db) else None
    display = Display(console, 0)

    def planned(stacks: int) -> None:
        display.total = stacks

    with (
        stop_on_signals(found.stop_file()) as stop_file,
        display,
    ):
        done = run(
            experiment,
            found,
            store,
            lambda stack, progress: display.update(
                stack.id, title(stack), len(stack.seeds), progress
            ),
            lambda stack, text: display.end(stack.id, f"{title(stack)}: {text}"),
            stop_file,
            planned=planned,
        )
    so_far = (
        f"shard {shard}: {numbered(len(experiment.trials), 'trial')}, "
        f"{numbered(done.stacks, 'stack')} run"
    )
    if done.interrupted:
        console.print(f"{so_far}; interrupted; {CONTINUES}", highlight=False)
        raise typer.Exit(INTERRUPTED)
    console.print(
        f"{so_far}. `harness sweep` with the same spec and home puts the rows into the database",
        highlight=False,
    )
    if done.failed:
        raise typer.Exit(SOME_FAILED)


def _only_in_spools(
    store: Store, home: Home, experiment: Experiment, known: list[TrialState]
) -> list[TrialState]:
    """Trials that `harness work` has begun or done and no sweep has taken in yet."""
    from harness.ingest import Ingester
    from results.store import TrialState

    absent = {trial.id: trial for trial in experiment.trials}
    for state in known:
        absent.pop(state.trial_id, None)
    if not absent:
        return []
    ingester = Ingester(store, home)
    ingester.leftovers()
    found = []
    for trial_id, run in ingester.statuses(absent).items():
        trial = absent[trial_id]
        place = (trial.label, trial.dataset_id, trial.variant_id)
        found.append(TrialState(trial_id, *place, run.status, run.steps_done, run.error))
    return found


def status(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where trials stand: done, running, failed, diverged, never run."""
    from harness.spec import load_experiment

    found, store = open_store(home, db)
    with store:
        experiment = load_experiment(spec, overrides or []) if spec else None
        states = store.states(show_trials(store, experiment) if experiment else None)
        spooled = _only_in_spools(store, found, experiment, states) if experiment else []
    states += spooled
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    steps: Counter[tuple[str, str, str]] = Counter()
    for state in states:
        key = (state.label, state.dataset_id, state.variant_id[:8])
        rows.setdefault(key, Counter())[state.status or "pending"] += 1
        steps[key] = max(steps[key], state.steps_done or 0)
    never_seen = len(experiment.trials) - len(states) if experiment else 0
    failures = {s.trial_id: s.error for s in states if s.status in ("failed", "diverged")}
    if as_json:
        listed = [
            {"label": k[0], "dataset": k[1], "variant": k[2], "steps": steps[k], **count}
            for k, count in sorted(rows.items())
        ]
        told = {"cells": listed, "not_planned_yet": never_seen, "not_in_database": len(spooled)}
        print(json.dumps({**told, "errors": failures}))
        return
    known = ("done", "running", "interrupted", "failed", "diverged", "pending")
    columns = [name for name in known if any(count[name] for count in rows.values())]
    table = Table("method", "dataset", "variant", "steps", *columns)
    table.columns[1].overflow = "fold"
    for key, count in sorted(rows.items()):
        table.add_row(*key, str(steps[key]), *(str(count[c] or "") for c in columns))
    console.print(table)
    if never_seen:
        console.print(f"trials of the spec that were never started: {never_seen}")
    if spooled:
        console.print(
            f"not yet in the database: {len(spooled)} trials of `harness work`; `harness sweep` "
            "with the same spec takes in their rows",
            highlight=False,
        )
    for trial_id, error in sorted(failures.items()):
        console.print(f"{trial_id[:12]}: {_last_line(error)}", highlight=False)
