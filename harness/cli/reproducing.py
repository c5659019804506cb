"""`harness reproduce` and `quickstart`: data, sweep and report in one command."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.exit_codes import SOME_FAILED
from harness.cli.options import (
    DatabaseOption,
    HomeOption,
    OverridesArgument,
    open_store,
    open_to_read,
    show_trials,
)
from harness.cli.printing import console, errors, print_table
from harness.cli.reading import draw_figures, print_leaderboard
from harness.cli.running import stoppable, sweep_experiment

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.spec import Experiment

QUICKSTART_STEPS = 50_000  # of PointMaze data; about 20 s of simulation


@stoppable()
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
    _, store = open_to_read(home, db, None)
    with store:
        report = verdicts.reproduce(
            store, what, dataset, margin, published_settings, all_tables=all_tables
        )
    if output_format != "rich":
        print(verdicts.markdown(report) if output_format == "markdown" else verdicts.json(report))
        return
    title = f"Printed numbers and ours (margin {margin:g} points)"
    print_table(verdicts.HEADER, verdicts.rows(report), title, lines=True)
    console.print(verdicts.caption(report), style="dim", highlight=False)
    for note in report.notes:
        console.print(f"! {note}", style="yellow", highlight=False)


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
    _, store = open_store(home, db)
    with store:
        ids = show_trials(store, experiment)
        path = reproduction.write(
            store, folder, ids, request, published_settings, experiment.claims, margin=margin
        )
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    if failure:
        raise failure


@stoppable()
def quickstart(
    overrides: OverridesArgument = None,
    home: HomeOption = None,
    db: DatabaseOption = None,
) -> None:
    """The main job on generated data: make it, sweep, leaderboard, figures."""
    from harness.spec import load_experiment

    spec = Path(__file__).resolve().parents[2] / "experiments" / "quickstart.yaml"
    if not spec.exists():
        raise FileNotFoundError(f"{spec} is missing: run from a checkout (pip install -e .)")
    _make_quickstart_data()
    experiment = load_experiment(spec, overrides or [])
    failure = _swept(experiment, home, db)
    found, store = open_store(home, db)
    with store:
        ids = show_trials(store, experiment)
        print_leaderboard(store, ids, "last", "rich", 0)
        console.print("figures:")
        draw_figures(store, found.figures, ids, "last", 0)
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


def _swept(experiment: Experiment, home: str | None, db: str | None) -> typer.Exit | None:
    """Runs a sweep; how it failed, if that leaves something to report."""
    try:
        sweep_experiment(experiment, False, False, home, db, False)
    except typer.Exit as exit_:
        if exit_.exit_code != SOME_FAILED:
            raise
        return exit_
    return None


def published_settings(
    algorithm: str, preset: str, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """Settings of the algorithm's table for a dataset, flat; None where it is not registered."""
    from harness.registry import UnknownAlgorithmError, hparams_for
    from harness.spec import data_spec_class, data_to_dict
    from harness.typed import config_from_dict, config_to_dict

    try:
        recipe = _registry().get(algorithm)
    except UnknownAlgorithmError:
        return None
    found = hparams_for(recipe, names, preset)
    config = config_to_dict(config_from_dict(recipe.config, found.config, algorithm))
    data = data_to_dict(data_spec_class()(**found.data))
    return {**config, **{f"data.{name}": value for name, value in data.items()}}


@functools.cache
def _registry() -> Registry:
    """One for all printed numbers: to look for packages that have algorithms takes 50 ms."""
    from harness.registry import Registry

    return Registry()
