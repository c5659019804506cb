"""`harness actions`, `synthetic`, `latency` and `export`: what trained policies do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness.cli.options import (
    DatabaseOption,
    HomeOption,
    JsonOption,
    NamesArgument,
    OverridesArgument,
    OverwriteOption,
    PartialOption,
    SpecArgument,
    open_store,
)
from harness.cli.printing import console, errors, print_left_out

if TYPE_CHECKING:
    from harness.spec import TrialSpec
    from results.records import LatencyRecord

LATENCY_NUMBERS = ("batch", "ms/call", "over rounds", "p99", "ms/action", "calls")


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
    found, store = open_store(home, db)
    with store:
        drawn = draw_actions(experiment, store, found, count, partial=partial, held_out=held_out)
    about = {"experiment": experiment.name, "count": count, "held_out": held_out}
    write_parquet(drawn.table, out, about)
    if as_json:
        summary = {"file": str(out), "trials": drawn.trials, "rows": len(drawn.table)}
        print(json.dumps({**summary, "left_out": drawn.left_out}))
        return
    console.print(f"{out}: {len(drawn.table)} actions of {drawn.trials} trials", highlight=False)
    print_left_out(drawn.left_out)


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
    overwrite: OverwriteOption = False,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the data that finished trials generate, against simulator and data; or store them."""
    from harness import synthetic as made
    from harness.actions import write_parquet
    from harness.spec import load_experiment

    experiment = load_experiment(spec, overrides or [])
    strengths = strengths_of(coefs)
    if write and len(strengths) > 1:
        raise ValueError(f"--write stores one strength of guidance; got {coefs}")
    found, store = open_store(home, db)
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
    print_left_out(left_out)


def strengths_of(coefs: str) -> list[float | None]:
    """`0,0.3,1` as numbers; nothing is the strength of training, None."""
    try:
        return [float(part) for part in coefs.split(",") if part.strip()] or [None]
    except ValueError:
        raise ValueError(
            f"--coefs is {coefs!r}; expected numbers with commas, such as 0,0.3,1"
        ) from None


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

    found, store = open_store(home, db)
    registry = Registry()
    with store, counted(errors) as report:
        trained, left_out = policies.named(names, store, found, registry, partial)
        loader = policies.Loader(registry, resolve_device(device))
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
    for table in latency_tables(records, of_run):
        console.print(table)
    hardware = records[0].hardware
    where = f"{records[0].device} ({hardware.get('gpu') or hardware['cpu']})"
    console.print(
        f"A call is one seed's act(), from observations on the device to actions on it, on "
        f"{where}, {threads} thread(s). Median and p99 over all calls of {rounds} rounds; beside "
        "them the lowest and highest median of a round.",
        highlight=False,
    )
    print_left_out(left_out)


def latency_tables(
    records: Sequence[LatencyRecord], trials: Mapping[str, TrialSpec]
) -> Iterator[Table]:
    """A table for each dataset; a narrow terminal folds what was measured, never a number.

    Args:
        trials: by run id.
    """
    tables: dict[str, Table] = {}
    for record in records:
        trial = trials[record.run_id]
        if trial.dataset_id not in tables:
            table = tables[trial.dataset_id] = Table(
                title=trial.dataset_id, pad_edge=False, padding=0
            )
            table.add_column("method, seed, mode", overflow="fold")
            for name in LATENCY_NUMBERS:
                table.add_column(name, justify="right", no_wrap=True)
        low, high = min(record.round_medians_ms), max(record.round_medians_ms)
        tables[trial.dataset_id].add_row(
            f"{trial.label}, {trial.seed}, {'compiled' if record.compiled else 'eager'}",
            str(record.batch),
            f"{record.median_ms:.4g}",
            f"{low:.4g} to {high:.4g}",
            f"{record.p99_ms:.4g}",
            f"{record.median_ms / record.batch:.4g}",
            str(record.calls),
        )
    yield from tables.values()


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

    found, store = open_store(home, db)
    registry = Registry()
    with store:
        trained, left_out = policies.named(names, store, found, registry, partial)
    loader = policies.Loader(registry, resolve_device("cpu"))
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
    print_left_out(left_out)
