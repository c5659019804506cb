"""Options and arguments that commands share, and opening what they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.printing import errors

if TYPE_CHECKING:
    from harness.home import Home
    from harness.spec import Experiment
    from results.store import Store

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
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")]
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


def open_store(home: str | None, db: str | None) -> tuple[Home, Store]:
    """The folder and the database that the options name, made where there is none yet."""
    from harness.home import Home
    from results.store import Store

    found = Home.find(home)
    return found, Store.open(found.database_url(db))


def open_to_read(home: str | None, db: str | None, spec: Path | None) -> tuple[Home, Store]:
    """As `open_store`, but `--db` may be an archive.

    Where there is no database yet and no spec asks for certain trials, the archives that come
    with the package are shown, and it says so.
    """
    from harness.home import Home
    from results import archive

    found = Home.find(home)
    if db is not None and archive.is_archive(db):
        return found, archive.open_archive(Path(db))
    shipped = shipped_archives(found, db, spec)
    return (found, archive.open_archive(*shipped)) if shipped else open_store(home, db)


def shipped_archives(home: Home, db: str | None, spec: Path | None) -> list[Path]:
    """Archives to show in place of a database that is not there yet; says that it does so."""
    from results import archive

    if spec is not None or archive.is_archive(db) or home.has_database(db):
        return []
    found = archive.shipped()
    if found:
        names = ", ".join(path.parent.name for path in found)
        errors.print(f"no results database yet: these rows came with the package ({names})")
    return found


def choose_trials(store: Store, spec: Path | None, overrides: list[str] | None) -> list[str] | None:
    """Ids of a spec's trials, which `store` then shows under the spec's labels; None for all."""
    if spec is None:
        return None
    from harness.spec import load_experiment

    return show_trials(store, load_experiment(spec, overrides or []))


def show_trials(store: Store, experiment: Experiment) -> list[str]:
    """Ids of an experiment's trials, which `store` shows under its labels from now on."""
    labels = {trial.id: trial.label for trial in experiment.trials}
    store.show_labels(labels)
    return list(labels)
