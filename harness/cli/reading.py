"""`harness leaderboard`, `table`, `figures` and `claims`: what the database says.

Also `import` and `merge`, which take rows in from elsewhere, and `archive`, which gives them out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import (
    DatabaseOption,
    HomeOption,
    JsonOption,
    OptionalSpec,
    OverridesArgument,
    SelectOption,
    SpecArgument,
    choose_trials,
    open_store,
    open_to_read,
    shipped_archives,
    show_trials,
)
from harness.cli.printing import console, print_paths, print_table

if TYPE_CHECKING:
    from results.store import Store


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
        shipped = shipped_archives(Home.find(home), db, spec)
        for path in shipped:  # studies of their own: other tasks, other protocols
            console.rule(path.parent.name)
            with archive.open_archive(path) as store:
                print_leaderboard(store, None, select, output_format, seed, interval)
        if shipped:
            return
    _, store = open_to_read(home, db, spec)
    with store:
        ids = choose_trials(store, spec, overrides)
        if html is None:
            print_leaderboard(store, ids, select, output_format, seed, interval)
            return
        from analysis.site import pages

        with console.status("writing pages"):
            first = pages.write(store, html, ids, select, seed, _defaults(), interval)
        console.print(str(first), highlight=False, soft_wrap=True)


def print_leaderboard(
    store: Store,
    trial_ids: list[str] | None,
    select: str,
    output_format: str,
    seed: int,
    interval: Any = "percentile",
) -> None:
    """Prints the methods of chosen trials, or of all, by rank.

    Raises:
        ValueError: if none of the trials ever ran.
    """
    from analysis import leaderboard as board

    built = board.build(store, trial_ids, select=select, seed=seed, interval=interval)
    if not built.rows:
        raise ValueError(board.NOTHING)
    if output_format == "rich":
        for item in built.renderables():
            console.print(item)
    else:
        print(built.render(output_format))


def _defaults() -> dict[str, dict[str, Any]]:
    """Algorithm -> its default config, of all that are registered."""
    import dataclasses

    from harness.registry import Registry

    registry = Registry()
    return {name: dataclasses.asdict(registry.get(name).config()) for name in registry.names()}


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

    _, store = open_to_read(home, db, spec)
    with store:
        made = dataset_tables.make(store, choose_trials(store, spec, overrides), select, seed)
    print(dataset_tables.render(made, output_format))


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
    found, store = open_to_read(home, db, spec)
    with store:
        ids = choose_trials(store, spec, overrides)
        if not style:
            draw_figures(store, out or found.figures, ids, select, seed)
            return
        import shlex

        from analysis import paper

        folder = out or found.figures / style
        command = shlex.join(["harness", *sys.argv[1:]])
        print_paths(paper.write(store, folder, style, ids, select, seed, command))


def draw_figures(
    store: Store, out: Path, trial_ids: list[str] | None, select: str, seed: int
) -> None:
    """Draws the figures into a folder and prints their paths."""
    from analysis import plots

    print_paths(plots.write_figures(store, out, trial_ids, select=select, seed=seed))


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
    from results.archive import is_archive

    found, store = open_to_read(home, db, spec)
    with store:
        if is_archive(db):
            # All rows of an archive are one experiment's, and its data need not be here.
            stated, ids = claims_of(spec, overrides or []), None
        else:
            experiment = load_experiment(spec, overrides or [])
            stated, ids = experiment.claims, show_trials(store, experiment)
        built = report.build(store, stated, ids, select)
    paths = report.write(built, out or found.root / "claims" / spec.stem)
    if as_json:
        print(json.dumps({"claims": report.records(built), "files": [str(path) for path in paths]}))
        return
    for title, body in report.tables(built):
        console.print(title, style="bold", highlight=False)
        print_table(report.HEADER[1:], body)
    console.print(report.caption(built), style="dim", highlight=False)
    for note in built.notes:
        console.print(f"! {note}", style="yellow", highlight=False)
    print_paths(paths)


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

    _, store = open_store(home, db)
    with store:
        runs = import_file(store, file, file_format, Told(algorithm, dataset, seed, every), label)
    cells = len({(run.algorithm, run.dataset) for run in runs})
    console.print(f"{len(runs)} imported runs of {cells} methods x datasets", highlight=False)


def archive(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Rows of an experiment as one parquet file, to publish: `leaderboard --db FILE` reads it."""
    from results import archive as archives

    _, store = open_store(home, db)
    with store:
        count = archives.write(store, out, choose_trials(store, spec, overrides))
    console.print(f"{count} rows in {out}")


def merge(
    files: Annotated[list[Path], typer.Argument(help="What `harness archive` wrote.")],
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """Put archives' rows into the database: a sweep does not train again what is done in them."""
    from results import archive as archives

    _, store = open_store(home, db)
    with store:
        merged = archives.merge(store, files)
    for file, found in zip(files, merged, strict=True):
        console.print(f"{file}: {found.rows} rows, {found.added} of them new", highlight=False)
        if found.known:
            console.print(
                f"  {found.known} trials have an outcome here already: the file's other training "
                "of them was left out"
            )
        if found.unfinished:
            console.print(
                f"  {found.unfinished} unfinished runs were left out: they can be continued only "
                "where their checkpoints are"
            )
