"""The command line: the composition root, and the one file that may know all four packages.

Exit codes: 0 ok, 1 some runs failed or diverged, 2 usage (a wrong argument, spec, name or
dataset), 3 environment (database, Ray, disk, a missing package), 130 interrupted. Heavy packages
are imported inside the commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.datasets.cli import app as data_app

if TYPE_CHECKING:
    from harness.home import Home
    from harness.preflight import Check
    from harness.spec import Experiment
    from results.store import Store

OK, SOME_FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

QUICKSTART_STEPS = 50_000  # of PointMaze data; about 20 s of simulation
MAP_SIDE = 101  # points of a side of a detector's map
LATENCY_COLUMNS = (
    *("method", "dataset", "seed", "mode", "batch", "ms/call", "over rounds", "p99"),
    *("ms/action", "calls"),
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Offline RL benchmarks you can trust: sweeps of stacked seeds, a results database, "
    "leaderboards with intervals.",
)
app.add_typer(data_app, name="data", help="Datasets: list, card, verify, make, import, download.")
cluster_app = typer.Typer(no_args_is_help=True)
app.add_typer(cluster_app, name="cluster", help="A Ray cluster of several nodes on this machine.")

console = Console()
errors = Console(stderr=True)

HomeOption = Annotated[
    str | None,
    typer.Option("--home", help="Folder of database and artifacts [HARNESS_HOME, ./runs]."),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--db",
        help="Database URL [HARNESS_DB, SQLite in the home folder]; to read, also an archive.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
SpecArgument = Annotated[Path, typer.Argument(help="Experiment file, such as experiments/*.yaml.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides: steps=2000 seeds=0-9 evaluation.episodes=20"),
]
OptionalSpec = Annotated[
    Path | None, typer.Argument(help="Only the trials of this experiment (default: all).")
]
NamesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Ids of runs or trials (or their beginnings), or experiment files with overrides.",
    ),
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Leave out trials without a trained policy.")
]
SelectOption = Annotated[
    str,
    typer.Option(
        "--select",
        help="Which evaluation counts: last, last-K (mean of the last K), cloning-loss or "
        "cloning-loss-K (offline: the checkpoint of the K-th lowest such loss), or best "
        "(flagged: it chooses by test rollouts).",
    ),
]


def _open(home: str | None, db: str | None) -> tuple[Home, Store]:
    from harness.home import Home
    from results.store import Store

    found = Home.find(home)
    return found, Store.open(found.database_url(db))


def _open_to_read(home: str | None, db: str | None, spec: Path | None) -> tuple[Home, Store]:
    """As `_open`, but `--db` may be an archive.

    Where there is no database yet and no spec asks for certain trials, the archives that come
    with the package are shown, and it says so.
    """
    from harness.home import Home
    from results import archive

    found = Home.find(home)
    if db is not None and db.endswith(".parquet"):
        return found, archive.open_archive(Path(db))
    shipped = _shipped(found, db, spec)
    return (found, archive.open_archive(*shipped)) if shipped else _open(home, db)


def _shipped(home: Home, db: str | None, spec: Path | None) -> list[Path]:
    """Archives to show in place of a database that is not there yet; says that it does so."""
    from results import archive

    if spec is not None or (db is not None and db.endswith(".parquet")) or home.has_database(db):
        return []
    found = archive.shipped()
    if found:
        names = ", ".join(path.parent.name for path in found)
        errors.print(f"no results database yet: these rows came with the package ({names})")
    return found


def _trial_ids(spec: Path | None, overrides: list[str] | None) -> list[str] | None:
    """Ids of a spec's trials, or None for all trials of the database."""
    if spec is None:
        return None
    from harness.spec import load_experiment

    return [trial.id for trial in load_experiment(spec, overrides or []).trials]


# ------------------------------------------------------------------------------------- sweeps


@app.command()
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
    _sweep(experiment, dry_run, retry_diverged, home, db, as_json)


def _sweep(
    experiment: Experiment,
    dry_run: bool,
    retry_diverged: bool,
    home: str | None,
    db: str | None,
    as_json: bool,
) -> None:
    from harness.display import Display
    from harness.plan import measured_rates
    from harness.preflight import Probe, check, described
    from harness.registry import Registry
    from harness.sweep import plan_sweep, run_sweep

    found, store = _open(home, db)
    retry = ("failed", "diverged") if retry_diverged else ("failed",)
    with store:
        probe = Probe(experiment.run, Registry())
        planned = plan_sweep(
            experiment, store, found, retry=retry, register=not dry_run, probe=probe
        )
        plan = planned.describe(measured_rates(store))
        if dry_run:
            checks = check(planned, store, found, probe)
            _print_plan(described(plan, planned, probe), checks, as_json)
            if any(item.state == "bad" for item in checks):
                raise typer.Exit(ENVIRONMENT)
            return
        if not as_json:
            _print_plan_line(plan)

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
            print(json.dumps({"counts": summary.counts, "errors": summary.errors}))
        else:
            _print_summary(summary, store.url)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise typer.Exit(SOME_FAILED)


@app.command()
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
    from harness.spec import load_experiment
    from harness.stopping import stop_on_signals
    from harness.sweep import title
    from harness.work import Shard
    from harness.work import work as run
    from results.store import Store

    experiment = Shard.parse(shard).of(load_experiment(spec, overrides or []))
    found = Home.find(home).shared(experiment.run.storage)
    store = Store.open(found.database_url(db)) if found.has_database(db) else None
    display = Display(console, len({trial.variant_id for trial in experiment.trials}))
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
        )
    console.print(
        f"shard {shard}: {len(experiment.trials)} trials, {done.stacks} stacks run. "
        "`harness sweep` with the same spec and home puts the rows into the database"
    )
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if done.failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def slurm(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the Ray cluster.")] = 1,
    array: Annotated[
        int, typer.Option(help="Instead of a Ray cluster: so many independent jobs.")
    ] = 0,
    time: Annotated[str, typer.Option(help="Time limit, in Slurm's format.")] = "24:00:00",
    cpus: Annotated[int, typer.Option(help="CPUs per node.")] = 8,
    gpus: Annotated[int, typer.Option(help="GPUs per node.")] = 0,
    mem: Annotated[str, typer.Option(help="Memory per node, such as 64G.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = "",
    account: Annotated[str, typer.Option(help="Slurm account.")] = "",
    out: Annotated[Path | None, typer.Option(help="Script to write [<name>.sbatch].")] = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Write a batch script for Slurm: a Ray cluster in one job, or an array without Ray."""
    from harness.home import Home
    from harness.slurm import Resources, array_script, ray_script
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    resources = Resources(nodes, time, cpus, gpus, mem, partition, account)
    found = Home.find(home)
    program = str(Path(sys.executable).parent / "harness")
    rest = [str(spec.resolve()), *(overrides or []), "--home", str(found.root)]
    rest += ["--db", db] if db else []
    name = experiment.name
    if array:
        script = array_script(name, [program, "work", *rest], array, resources, found.root)
    else:
        script = ray_script(name, [program, "sweep", *rest], resources, found.root)
    path = out or Path(f"{name}.sbatch")
    path.write_text(script, encoding="utf-8")
    console.print(f"{path}: submit with `sbatch {path}`", highlight=False, soft_wrap=True)
    if array:
        console.print(
            "when it has ended, take the rows into the database and finish what is left: "
            f"harness sweep {spec} --home {found.root}",
            highlight=False,
            soft_wrap=True,
        )


@cluster_app.command("up")
def cluster_up(
    nodes: Annotated[int, typer.Option(help="Nodes, with the head.")] = 2,
    cpus: Annotated[int, typer.Option(help="CPUs of each [the machine's, shared].")] = 0,
    home: HomeOption = None,
) -> None:
    """Start a local cluster and print what to export; sweeps then run on it."""
    import shlex

    from harness import cluster
    from harness.home import Home

    started = cluster.up(Home.find(home).root, nodes, cpus)
    errors.print(f"{nodes} nodes run; `harness cluster down` ends them", highlight=False)
    print("export " + shlex.join(f"{k}={v}" for k, v in started.environment.items()))


@cluster_app.command("down")
def cluster_down(home: HomeOption = None) -> None:
    """End exactly the processes that `harness cluster up` started."""
    from harness import cluster
    from harness.home import Home

    console.print(f"{cluster.down(Home.find(home).root)} nodes ended", highlight=False)


def _print_plan_line(plan: dict[str, Any]) -> None:
    from harness.plan import duration

    counts = plan["counts"]
    text = f"[bold]{plan['name']}[/bold]: {counts['trials']} trials, {counts['trials_done']} done"
    if counts["stacks"]:
        text += f", {counts['stacks']} stacks to run; training left: {duration(plan['seconds'])}"
    console.print(text, highlight=False)


def _print_plan(plan: dict[str, Any], checks: list[Check], as_json: bool) -> None:
    if as_json:
        print(json.dumps({**plan, "checks": [vars(item) for item in checks]}, indent=2))
        return
    from harness.plan import plan_tables

    for item in plan_tables(plan):
        console.print(item)
    _print_checks(checks)


def _print_checks(checks: list[Check]) -> None:
    if not checks:
        return
    table = Table("check", "", "what was found")
    marks = {
        "ok": "[green]ok[/green]",
        "note": "[yellow]note[/yellow]",
        "bad": "[red]bad[/red]",
    }
    for item in checks:
        table.add_row(escape(item.name), marks[item.state], escape(item.text))
    console.print(table)


def _print_summary(summary: Any, url: str) -> None:
    from harness.provenance import git_state

    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items()))
    what = f"{summary.trained} stacks run" if summary.trained else "nothing to train"
    console.print(f"{counts} ({what} in {summary.seconds:.0f} s)", highlight=False)
    for trial_id, error in sorted(summary.errors.items()):
        if summary.statuses[trial_id] != "done":
            status = f"[red]{summary.statuses[trial_id]}[/red]"
            console.print(f"  {trial_id[:12]} {status}: {_last_line(error)}", highlight=False)
    console.print(f"database: {url}", highlight=False, soft_wrap=True)
    commit, dirty = git_state()
    if dirty:
        errors.print(
            f"[yellow]note[/yellow] the harness's code differs from commit {commit[:12]}: "
            "these runs are recorded as dirty"
        )
    if summary.interrupted:
        console.print("interrupted; the same command continues from the last checkpoints")


def _last_line(error: str | None) -> str:
    """The line of a traceback that says what happened."""
    lines = (error or "").strip().splitlines()
    return escape(lines[-1]) if lines else "no reason was recorded"


@app.command()
def status(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where trials stand: done, running, failed, diverged, never run."""
    ids = _trial_ids(spec, overrides)
    _, store = _open(home, db)
    with store:
        states = store.states(ids)
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    steps: Counter[tuple[str, str, str]] = Counter()
    for state in states:
        key = (state.label, state.dataset_id, state.variant_id[:8])
        rows.setdefault(key, Counter())[state.status or "pending"] += 1
        steps[key] = max(steps[key], state.steps_done or 0)
    never_seen = len(ids) - len(states) if ids is not None else 0
    failures = {s.trial_id: s.error for s in states if s.status in ("failed", "diverged")}
    if as_json:
        listed = [
            {"label": k[0], "dataset": k[1], "variant": k[2], "steps": steps[k], **count}
            for k, count in sorted(rows.items())
        ]
        print(json.dumps({"cells": listed, "not_planned_yet": never_seen, "errors": failures}))
        return
    known = ("done", "running", "interrupted", "failed", "diverged", "pending")
    columns = [name for name in known if any(count[name] for count in rows.values())]
    table = Table("method", "dataset", "variant", "steps", *columns)
    table.columns[1].overflow = "fold"
    for key, count in sorted(rows.items()):
        table.add_row(*key, str(steps[key]), *(str(count[c] or "") for c in columns))
    console.print(table)
    if never_seen:
        console.print(f"{never_seen} trials of the spec were never started")
    for trial_id, error in sorted(failures.items()):
        console.print(f"{trial_id[:12]}: {_last_line(error)}", highlight=False)


@app.command()
def actions(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="The parquet file to write.")] = Path("actions.parquet"),
    count: Annotated[int, typer.Option(help="Actions per trial.")] = 1000,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="At data that data.held_out kept from the learner.")
    ] = False,
    partial: PartialOption = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw actions of every finished trial's final policy at observations of its data."""
    from harness.actions import draw_actions, write_parquet
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    found, store = _open(home, db)
    with store:
        drawn = draw_actions(experiment, store, found, count, partial=partial, held_out=held_out)
    about = {"experiment": experiment.name, "count": count, "held_out": held_out}
    write_parquet(drawn.table, out, about)
    if as_json:
        summary = {"file": str(out), "trials": drawn.trials, "rows": len(drawn.table)}
        print(json.dumps({**summary, "left_out": drawn.left_out}))
        return
    console.print(f"{out}: {len(drawn.table)} actions of {drawn.trials} trials", highlight=False)
    _print_left_out(drawn.left_out)


@app.command()
def synthetic(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    coefs: Annotated[
        str, typer.Option(help="Strengths of guidance, as in 0,0.3,1; none: that of training.")
    ] = "",
    out: Annotated[Path, typer.Option(help="The parquet file to write.")] = Path(
        "synthetic.parquet"
    ),
    write: Annotated[
        str, typer.Option(help="Also store the data under this id; for one trial and strength.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing dataset.")
    ] = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the data that finished trials generate, against simulator and data; or store them."""
    from harness import synthetic as made
    from harness.actions import write_parquet
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    strengths: list[float | None] = [float(part) for part in coefs.split(",") if part]
    strengths = strengths or [None]
    if write and len(strengths) > 1:
        raise ValueError(f"--write stores one strength of guidance; got {coefs}")
    found, store = _open(home, db)
    left_out: dict[str, str] = {}
    with store:
        if write:
            _, table = made.write(experiment, store, found, write, strengths[0], overwrite)
        else:
            table, left_out = made.quality(experiment, store, found, strengths)
    write_parquet(table, out, {"experiment": experiment.name, "coefs": coefs})
    if as_json:
        print(json.dumps({"file": str(out), "dataset": write or None, "left_out": left_out}))
        return
    console.print(f"{out}: {table.trial_id.nunique()} trials", highlight=False)
    if write:
        console.print(f"{write}: harness data card {write}", highlight=False)
    _print_left_out(left_out)


@app.command()
def ood(
    dataset: Annotated[str, typer.Argument(help="Minari id or D4RL name.")],
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    steps: Annotated[int, typer.Option(help="Gradient steps of each detector.", min=1)] = 20_000,
    width: Annotated[int, typer.Option(help="Of the networks' hidden layers.", min=1)] = 256,
    only: Annotated[
        list[str] | None, typer.Option("--detector", help="Only this one; may be repeated.")
    ] = None,
    actions_file: Annotated[
        Path | None,
        typer.Option("--actions", help="Also what trained policies do: of `harness actions`."),
    ] = None,
    count: Annotated[int, typer.Option(help="Actions of each kind and seed.", min=10)] = 2000,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("ood"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare detectors of out-of-distribution actions: held-out data against other actions."""
    import torch

    from algorithms.detectors import DetectorConfig
    from analysis import detection
    from analysis.plots import save_figure
    from harness import datasets
    from harness import ood as benchmark
    from harness.display import counted
    from harness.spec import parse_seeds

    chosen = parse_seeds(seeds)
    data = datasets.load(dataset)
    spec = data.spec
    policies = {}
    if actions_file is not None:
        import pandas as pd

        policies = benchmark.policy_actions(pd.read_parquet(actions_file), spec.id)
    flat = spec.obs_dim == spec.action_dim == 1
    config = DetectorConfig(steps=steps, hidden_dim=width)
    with counted(errors) as tell:
        found = benchmark.compare(
            data, chosen, only or (), config, count, policies, device,
            grid=MAP_SIDE if flat else 0, report=lambda name, done, steps: tell(done, steps, name),
        )  # fmt: skip
    rows = [m for s in found for m in detection.measure(s.detector, s.data, s.against)]
    _, store = _open(home, db)
    with store:
        store.append(benchmark.records(spec, chosen, found, rows))
    source = {"dataset": spec.id, "digest": spec.digest, "seeds": list(chosen),
              "steps": steps, "width": width, "held_out": benchmark.HELD_OUT,
              "perturbation": benchmark.PERTURBATION,
              "interval": "95 % bootstrap over seeds"}  # fmt: skip
    curves = detection.draw_curves({s.detector: (s.data, s.against) for s in found})
    files = save_figure(curves, out / "detectors", source)
    if flat:
        obs, action = (axis.cpu().numpy() for axis in benchmark.grid_axes(data, MAP_SIDE))
        pairs = torch.cat((data.obs, data.action), dim=1).cpu().numpy()
        maps = {s.detector: s.grid for s in found if s.grid is not None}
        files += save_figure(detection.draw_maps(maps, obs, action, pairs), out / "maps", source)
    if as_json:
        values = [
            {"detector": m.detector, "against": m.against, "auroc": m.auroc.tolist(),
             "aupr": m.aupr.tolist(), "fpr95": m.fpr95.tolist()}
            for m in rows
        ]  # fmt: skip
        print(json.dumps({"detections": values, "files": [str(path) for path in files]}))
        return
    body = [
        (m.detector, m.against, *map(detection.with_interval, (m.auroc, m.aupr, m.fpr95)))
        for m in rows
    ]
    _print_table(("detector", "against", "AUROC", "AUPR", "FPR at 95 % TPR"), body)
    caption = f"{spec.id}: {len(chosen)} seeds, {steps} steps, 95 % bootstrap intervals over seeds"
    console.print(caption, highlight=False)
    _print_paths(files)


@app.command()
def latency(
    names: NamesArgument,
    batch: Annotated[int, typer.Option(help="The larger batch; 1 is always measured.")] = 256,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also measure the call compiled as one graph.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch on the CPU.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each; all others in between.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of timed calls for each, all rounds.")] = 2.0,
    partial: PartialOption = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the final policies' `act`: one seed, batch 1 and N; kept with the runs."""
    import dataclasses

    from harness import policies
    from harness.display import counted
    from harness.latency import measure
    from harness.registry import Registry
    from harness.trainer import resolve_device

    found, store = _open(home, db)
    registry = Registry()
    with store, counted(errors) as report:
        trained, left_out = policies.named(names, store, found, registry, partial)
        loader = policies.Loader(found, registry, resolve_device(device))
        records = measure(
            trained,
            loader,
            batches=(1, batch),
            compiled=compiled,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            report=report,
        )
        store.append(records)
    of_run = {each.run_id: each.trial for each in trained}
    if as_json:
        rows = [
            {
                "label": of_run[record.run_id].label,
                "dataset_id": of_run[record.run_id].dataset_id,
                "seed": of_run[record.run_id].seed,
                **dataclasses.asdict(record),
                "median_ms_per_action": record.median_ms / record.batch,
            }
            for record in records
        ]
        print(json.dumps({"latencies": rows, "left_out": left_out}))
        return
    table = Table(*LATENCY_COLUMNS)
    for record in records:
        trial = of_run[record.run_id]
        low, high = min(record.round_medians_ms), max(record.round_medians_ms)
        table.add_row(
            trial.label,
            trial.dataset_id,
            str(trial.seed),
            "compiled" if record.compiled else "eager",
            str(record.batch),
            f"{record.median_ms:.4g}",
            f"{low:.4g} to {high:.4g}",
            f"{record.p99_ms:.4g}",
            f"{record.median_ms / record.batch:.4g}",
            str(record.calls),
        )
    console.print(table)
    hardware = records[0].hardware
    where = f"{records[0].device} ({hardware.get('gpu') or hardware['cpu']})"
    console.print(
        f"A call is one seed's act(), from observations on the device to actions on it, on "
        f"{where}, {threads} thread(s). Median and p99 over all calls of {rounds} rounds; beside "
        "them the lowest and highest median of a round.",
        highlight=False,
    )
    _print_left_out(left_out)


@app.command()
def export(
    names: NamesArgument,
    out: Annotated[Path, typer.Option(help="Folder; a policy's files go to <out>/<run id>.")],
    output_format: Annotated[
        str, typer.Option("--format", help="safetensors, torch.export or onnx.")
    ] = "safetensors",
    rows: Annotated[int, typer.Option(help="Observations of the data to compare at.")] = 256,
    partial: PartialOption = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write final policies as files that work without their runs, compared action by action."""
    from harness import policies
    from harness.display import counted
    from harness.export import export as export_policy
    from harness.registry import Registry
    from harness.trainer import resolve_device

    found, store = _open(home, db)
    registry = Registry()
    with store:
        trained, left_out = policies.named(names, store, found, registry, partial)
    loader = policies.Loader(found, registry, resolve_device("cpu"))
    exported = []
    with counted(errors) as report:
        for place, each in enumerate(trained):
            report(place, len(trained), f"{output_format}: {each.title}")
            exported.append(export_policy(each, loader, out, output_format, rows))
    if as_json:
        written = [
            {
                "run_id": policy.trained.run_id,
                "files": [str(path) for path in policy.files],
                "max_abs_difference": policy.difference,
                "observations": policy.rows,
            }
            for policy in exported
        ]
        print(json.dumps({"exported": written, "left_out": left_out}))
        return
    table = Table("policy", "observations", "largest difference", "files")
    for policy in exported:
        where = f"{policy.files[0].parent}: {', '.join(path.name for path in policy.files)}"
        difference = f"{policy.difference:.3g}"
        table.add_row(policy.trained.title, str(policy.rows), difference, where)
    table.columns[3].overflow = "fold"
    console.print(table)
    _print_left_out(left_out)


# ------------------------------------------------------------------------------------ analysis


@app.command()
def leaderboard(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    select: SelectOption = "last",
    output_format: Annotated[
        str, typer.Option("--format", help="rich, markdown, csv, latex or json.")
    ] = "rich",
    html: Annotated[
        Path | None, typer.Option(help="Write static pages into this folder instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    interval: Annotated[
        str, typer.Option(help="percentile, bca, or t (covers at 3 to 10 seeds).")
    ] = "percentile",
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Methods ranked by IQM with 95 % intervals over seeds."""
    from harness.home import Home
    from results import archive

    if html is None and output_format == "rich":
        shipped = _shipped(Home.find(home), db, spec)
        for path in shipped:  # studies of their own: other tasks, other protocols
            console.rule(path.parent.name)
            with archive.open_archive(path) as store:
                _leaderboard(store, None, select, output_format, seed, interval)
        if shipped:
            return
    _, store = _open_to_read(home, db, spec)
    with store:
        ids = _trial_ids(spec, overrides)
        if html is None:
            _leaderboard(store, ids, select, output_format, seed, interval)
            return
        from analysis.site import pages

        with console.status("writing pages"):
            first = pages.write(store, html, ids, select, seed, _defaults(), interval)
        console.print(str(first), highlight=False, soft_wrap=True)


def _defaults() -> dict[str, dict[str, Any]]:
    """Algorithm -> its default config, of all that are registered."""
    import dataclasses

    from harness.registry import Registry

    registry = Registry()
    return {name: dataclasses.asdict(registry.get(name).config()) for name in registry.names()}


def _leaderboard(
    store: Store,
    trial_ids: list[str] | None,
    select: str,
    output_format: str,
    seed: int,
    interval: Any = "percentile",
) -> None:
    from analysis import leaderboard as board

    built = board.build(store, trial_ids, select=select, seed=seed, interval=interval)
    if output_format == "rich":
        for item in built.renderables():
            console.print(item)
    else:
        print(built.render(output_format))


@app.command()
def reproduce(
    what: Annotated[
        str | None,
        typer.Argument(help="Only this algorithm (default: all), or an experiment file to run."),
    ] = None,
    overrides: OverridesArgument = None,
    dataset: Annotated[str, typer.Option(help="Glob over our dataset ids and D4RL's names.")] = "*",
    margin: Annotated[
        float, typer.Option(help="Points within which two means count as equal.")
    ] = 3.0,
    all_tables: Annotated[
        bool,
        typer.Option("--all-tables", help="Also others' runs and quotations of the same method."),
    ] = False,
    output_format: Annotated[
        str, typer.Option("--format", help="rich, markdown or json.")
    ] = "rich",
    out: Annotated[
        Path | None,
        typer.Option(help="With an experiment: folder of its report [<home>/reproduction/<name>]."),
    ] = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Printed numbers beside ours, with verdicts; of an experiment: run it, then report."""
    from analysis import verdicts

    if what is not None and Path(what).suffix in (".yaml", ".yml"):
        if (dataset, all_tables, output_format) != ("*", False, "rich"):
            raise ValueError("--dataset, --all-tables and --format are for stored runs; an "
                             "experiment's report is Markdown about all of its trials")  # fmt: skip
        _reproduce(Path(what), overrides or [], margin, out, home, db)
        return
    if overrides or out is not None:
        raise ValueError(
            f"overrides and --out go with an experiment file (.yaml); {what!r} is not one"
        )
    if output_format not in ("rich", "markdown", "json"):
        raise ValueError(f"unknown format {output_format!r}; expected rich, markdown or json")
    _, store = _open_to_read(home, db, None)
    with store:
        report = verdicts.reproduce(
            store, what, dataset, margin, _published_settings, all_tables=all_tables
        )
    if output_format != "rich":
        print(verdicts.markdown(report) if output_format == "markdown" else verdicts.json(report))
        return
    table = Table(*verdicts.HEADER, title=f"Printed numbers and ours (margin {margin:g} points)")
    for column in table.columns:
        column.overflow = "fold"
    for row in verdicts.rows(report):
        table.add_row(*map(escape, row), end_section=True)
    console.print(table)
    console.print(verdicts.caption(report), style="dim", highlight=False)
    for note in report.notes:
        console.print(f"! {escape(note)}", style="yellow", highlight=False)


def _reproduce(
    spec: Path,
    overrides: list[str],
    margin: float,
    out: Path | None,
    home: str | None,
    db: str | None,
) -> None:
    """Gets the data, runs or continues the sweep, writes the report."""
    from omegaconf import OmegaConf

    from analysis import reproduction
    from harness.datasets.obtaining import obtain
    from harness.home import Home
    from harness.spec import dataset_names, load_experiment

    for name in obtain(dataset_names(spec, overrides), errors.print):
        console.print(f"dataset {name}: here now", highlight=False)
    experiment = load_experiment(spec, overrides)
    failure = _swept(experiment, home, db)
    folder = out or Home.find(home).root / "reproduction" / experiment.name
    request = reproduction.Request(
        experiment.name,
        experiment.description,
        OmegaConf.to_yaml(OmegaConf.create(dict(experiment.source))),
        f"harness reproduce {reproduction.SPEC} --out .",
    )
    ids = [trial.id for trial in experiment.trials]
    _, store = _open(home, db)
    with store:
        path = reproduction.write(
            store, folder, ids, request, _published_settings, experiment.claims, margin=margin
        )
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    if failure:
        raise failure


def _swept(experiment: Experiment, home: str | None, db: str | None) -> typer.Exit | None:
    """Runs a sweep; how it failed, if that leaves something to report."""
    try:
        _sweep(experiment, False, False, home, db, False)
    except typer.Exit as exit_:
        if exit_.exit_code != SOME_FAILED:
            raise
        return exit_
    return None


def _published_settings(
    algorithm: str, preset: str, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """Settings of the algorithm's table for a dataset, flat; None where it is not registered."""
    from harness.registry import Registry, UnknownAlgorithmError, hparams_for
    from harness.spec import data_spec_class, data_to_dict
    from harness.typed import config_from_dict, config_to_dict

    try:
        recipe = Registry().get(algorithm)
    except UnknownAlgorithmError:
        return None
    found = hparams_for(recipe, names, preset)
    config = config_to_dict(config_from_dict(recipe.config, found.config, algorithm))
    data = data_to_dict(data_spec_class()(**found.data))
    return {**config, **{f"data.{name}": value for name, value in data.items()}}


@app.command("import")
def import_runs(
    file: Annotated[Path, typer.Argument(help="What other code wrote.")],
    file_format: Annotated[str, typer.Option("--format", help="corl, d3rlpy, unifloral or csv.")],
    algorithm: Annotated[str | None, typer.Option(help="Where the file does not say it.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the file does not say it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Where the file does not say it.")] = None,
    every: Annotated[
        int | None, typer.Option(help="Gradient steps between evaluations (corl).")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Shown instead of the algorithm.")] = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Take in runs of other code, shown as imported; nothing in the file is executed."""
    from results.importing import Told, import_file

    _, store = _open(home, db)
    with store:
        runs = import_file(store, file, file_format, Told(algorithm, dataset, seed, every), label)
    cells = len({(run.algorithm, run.dataset) for run in runs})
    console.print(f"{len(runs)} imported runs of {cells} methods x datasets", highlight=False)


@app.command()
def archive(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Rows of an experiment as one parquet file, to publish: `leaderboard --db FILE` reads it."""
    from results import archive as archives

    _, store = _open(home, db)
    with store:
        count = archives.write(store, out, _trial_ids(spec, overrides))
    console.print(f"{count} rows in {out}")


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="What `harness archive` wrote.")],
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Put archives' rows into the database: a sweep does not train again what is done in them."""
    from results import archive as archives

    _, store = _open(home, db)
    with store:
        counts = archives.merge(store, files)
    for file, (rows, added) in zip(files, counts, strict=True):
        console.print(f"{file}: {rows} rows, {added} of them new", highlight=False)


@app.command()
def figures(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    select: SelectOption = "last",
    style: Annotated[
        str, typer.Option(help="For a paper: neurips, icml or iclr (also SVG, data, more figures).")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder [<home>/figures].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Learning curves, aggregate intervals and more, with their sources beside them."""
    found, store = _open_to_read(home, db, spec)
    with store:
        ids = _trial_ids(spec, overrides)
        if not style:
            _figures(store, out or found.figures, ids, select, seed)
            return
        import shlex

        from analysis import paper

        folder = out or found.figures / style
        command = shlex.join(["harness", *sys.argv[1:]])
        _print_paths(paper.write(store, folder, style, ids, select, seed, command))


def _figures(store: Store, out: Path, trial_ids: list[str] | None, select: str, seed: int) -> None:
    from analysis import plots

    _print_paths(plots.write_figures(store, out, trial_ids, select=select, seed=seed))


@app.command()
def table(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    select: SelectOption = "last",
    output_format: Annotated[
        str, typer.Option("--format", help="markdown, latex or csv.")
    ] = "markdown",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap behind what is bold.")] = 0,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """A row per dataset, a column per method, averages of groups, for a paper."""
    from analysis import dataset_tables

    _, store = _open_to_read(home, db, spec)
    with store:
        made = dataset_tables.make(store, _trial_ids(spec, overrides), select, seed)
    print(dataset_tables.render(made, output_format))


@app.command()
def claims(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    select: SelectOption = "last",
    out: Annotated[
        Path | None, typer.Option(help="Folder of page, numbers and figure [<home>/claims/<name>].")
    ] = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether what an experiment claims does show: differences by seed, with verdicts."""
    from analysis import claims as report
    from harness.spec import claims_of, load_experiment

    found, store = _open_to_read(home, db, spec)
    with store:
        if db is not None and db.endswith(".parquet"):
            # All rows of an archive are one experiment's, and its data need not be here.
            stated, ids = claims_of(spec, overrides or []), None
        else:
            experiment = load_experiment(spec, overrides or [])
            stated, ids = experiment.claims, [trial.id for trial in experiment.trials]
        built = report.build(store, stated, ids, select)
    paths = report.write(built, out or found.root / "claims" / spec.stem)
    if as_json:
        print(json.dumps({"claims": report.records(built), "files": [str(path) for path in paths]}))
        return
    for title, body in report.tables(built):
        console.print(title, style="bold", highlight=False)
        _print_table(report.HEADER[1:], body)
    console.print(report.caption(built), style="dim", highlight=False)
    for note in built.notes:
        console.print(f"! {escape(note)}", style="yellow", highlight=False)
    _print_paths(paths)


@app.command()
def bandit(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote for the 2-D bandit.")],
    out: Annotated[Path, typer.Option(help="Folder of report, numbers and figure.")] = Path(
        "bandit"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge and draw the 2-D bandit of the Diffusion-QL paper: numbers, claims, figure."""
    from analysis import bandit as report

    built = report.build(file, seed)
    paths = report.write(built, out)
    if as_json:
        claims = [vars(claim) for claim in built.claims]
        print(json.dumps({"claims": claims, "files": [str(path) for path in paths]}))
        return
    body = [(claim.text, claim.measured, claim.verdict) for claim in built.claims]
    _print_table(("claim", "measured", "verdict"), body)
    _print_paths(paths)


@app.command()
def guidance(
    files: Annotated[list[Path], typer.Argument(help="What `harness synthetic` wrote.")],
    beside: Annotated[
        list[str] | None,
        typer.Option(help="GUIDED=LEVEL: labels to compare, such as guided data and a model's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of page, numbers and figure.")] = Path(
        "guidance"
    ),
    as_json: JsonOption = False,
) -> None:
    """Judge and draw generated data by strength of guidance: errors, likelihood."""
    from analysis import guidance as report

    levels = {}
    for pair in beside or []:
        guided, _, level = pair.partition("=")
        if not (guided and level):
            raise ValueError(f"--beside {pair!r} is not a pair; expected GUIDED=LEVEL")
        levels[guided] = level
    built = report.read(*files)
    comparisons = report.compare(built, levels)
    paths = report.write(built, out, comparisons)
    if as_json:
        found = [dict(zip(report.HEADER, row, strict=True)) for row in report.rows(comparisons)]
        print(json.dumps({"comparisons": found, "files": [str(path) for path in paths]}))
        return
    _print_table(report.HEADER, report.rows(comparisons))
    _print_paths(paths)


@app.command()
def ring(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote for the 2-D ring.")],
    out: Annotated[Path, typer.Option(help="Folder of report, numbers and figure.")] = Path("ring"),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge and draw VDD's ring of eight modes: divergence, covered modes, figure."""
    from analysis import ring as report

    built = report.build(file, seed)
    paths = report.write(built, out)
    if as_json:
        _print_numbers(built.numbers, paths)
        return
    _print_table(*report.rows(built))
    _print_paths(paths)


@app.command()
def likelihood(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote, best --held-out.")],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """How likely the policies in a file of actions find the data's own actions."""
    from analysis import likelihood as report

    built = report.build(file, seed)
    if as_json:
        print(json.dumps(json.loads(built.numbers.to_json(orient="records"))))
        return
    _print_table(*report.rows(built))
    console.print(report.caption(built), highlight=False)


@app.command()
def modes(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of page, numbers and figure.")] = Path("modes"),
    count: Annotated[
        int | None, typer.Option("--modes", help="How many solutions there are; none: all seen.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which solutions of a task the final policies use: success and task entropy, with a figure."""
    from analysis import modes as report

    _, store = _open_to_read(home, db, spec)
    with store:
        built = report.build(store, _trial_ids(spec, overrides), count, seed)
    paths = report.write(built, out)
    if as_json:
        _print_numbers(built.numbers, paths)
        return
    _print_table(*report.rows(built))
    for note in built.notes:
        console.print(note, highlight=False)
    _print_paths(paths)


def _print_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> None:
    table = Table(*header)
    for column in table.columns:
        column.overflow = "fold"
    for row in body:
        table.add_row(*row)
    console.print(table)


def _print_numbers(numbers: Any, paths: Iterable[Path]) -> None:
    records = json.loads(numbers.to_json(orient="records"))
    print(json.dumps({"numbers": records, "files": [str(path) for path in paths]}))


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def _print_left_out(left_out: Mapping[str, str]) -> None:
    for trial_id, reason in left_out.items():
        console.print(f"  left out {trial_id[:12]}: {reason}", highlight=False)


# ---------------------------------------------------------------------------------- quickstart


@app.command()
def quickstart(
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """The main job on generated data: make it, sweep, leaderboard, figures."""
    from harness.spec import load_experiment

    spec = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"
    if not spec.exists():
        raise FileNotFoundError(f"{spec} is missing: run from a checkout (pip install -e .)")
    _make_quickstart_data()
    experiment = load_experiment(spec, overrides or [])
    failure = _swept(experiment, home, db)
    ids = [trial.id for trial in experiment.trials]
    found, store = _open(home, db)
    with store:
        _leaderboard(store, ids, "last", "rich", 0)
        console.print("figures:")
        _figures(store, found.figures, ids, "last", 0)
        console.print(f"database: {store.url}", highlight=False, soft_wrap=True)
    if failure:
        raise failure


def _make_quickstart_data() -> None:
    """Generates what the quickstart trains on, unless it is there."""
    from harness.datasets.bandit2d import make_bandit2d
    from harness.datasets.local import is_stored
    from harness.datasets.pointmaze import make_pointmaze

    for dataset_id, make in (
        ("generated/pointmaze/umaze-v0", lambda: make_pointmaze("umaze", QUICKSTART_STEPS)),
        ("generated/bandit2d-v0", make_bandit2d),
    ):
        if is_stored(dataset_id):
            console.print(f"dataset {dataset_id}: there already", highlight=False)
            continue
        with console.status(f"making {dataset_id} in the simulator"):
            make()
        console.print(f"dataset {dataset_id}: made", highlight=False)


# -------------------------------------------------------------------------- what is there to use


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="Show one algorithm's config.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Registered algorithms, or one algorithm's config fields, their defaults and its presets."""
    import dataclasses

    from harness.registry import Registry, presets_of

    registry = Registry()
    if name is not None:
        recipe = registry.get(name)
        defaults = dataclasses.asdict(recipe.config())
        presets = presets_of(recipe)
        if as_json:
            shown = {"name": name, "revision": recipe.revision, "config": defaults}
            print(json.dumps({**shown, "presets": presets}))
            return
        console.print(f"[bold]{name}[/bold] revision {recipe.revision}: {recipe.summary}")
        table = Table("field", "default", "type")
        for item in dataclasses.fields(recipe.config):
            table.add_row(item.name, repr(defaults[item.name]), str(item.type))
        console.print(table)
        for preset, source in presets.items():
            console.print(f"[bold]preset {preset}[/bold]: {source}")
        return
    rows = [(recipe.name, recipe) for recipe in map(registry.get, registry.names())]
    if as_json:
        print(json.dumps([{"name": n, "revision": r.revision, "paper": r.paper} for n, r in rows]))
        return
    table = Table("name", "revision", "summary", "paper")
    for label, recipe in rows:
        table.add_row(label, str(recipe.revision), recipe.summary, recipe.paper)
    console.print(table)


@app.command()
def doctor(home: HomeOption = None, db: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Check the environment: versions, compiler, simulator, database, Ray, disk."""
    from harness.doctor import check

    checks = list(check(home, db))
    if as_json:
        print(json.dumps([vars(item) for item in checks]))
    else:
        _print_checks(checks)
    if any(item.state == "bad" for item in checks):
        raise typer.Exit(ENVIRONMENT)


# ------------------------------------------------------------------------------------------ main


def exit_code(error: BaseException) -> int:
    """The exit code that an exception stands for."""
    from harness.datasets import DatasetError
    from results.store import StoreError

    if isinstance(error, (StoreError, ImportError)):
        return ENVIRONMENT
    if isinstance(error, (DatasetError, ValueError, TypeError, KeyError, FileNotFoundError)):
        return USAGE
    return ENVIRONMENT


def main(arguments: Iterable[str] | None = None) -> None:
    """Runs the command line; prints one error line instead of a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("HARNESS_DEBUG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors.print(f"[red]error[/red] {text}", highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
